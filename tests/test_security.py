"""What must never happen: secrets in anything that is kept, code from a model folder, a door open beyond the loopback interface."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.config.grid import load_sweep
from harness.core import text
from harness.core.cell import Model
from harness.core.errors import ConfigError, HarnessError, ModelError
from harness.data import model_folders
from harness.execution import provenance
from harness.quantization.formats.weight_files import WeightReader

SECRETS = {
    "HF_TOKEN": "hf_canarycanarycanarycanarycanary01",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/0123456789abcdefghijklmnop",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-password",
    "RAY_AUTH_TOKEN": "canary-ray-token-canary-ray-token-0",
    "WANDB_API_KEY": "canary0000000000000000000000000000000001",
    "MY_PASSWORD": "canary-my-password",
}


@pytest.mark.slow
def test_secrets_of_the_environment_are_kept_nowhere(tmp_path: Path) -> None:
    """A real run in worker processes, tracked in MLflow: no file holds a canary."""
    words = [
        "model=demo",
        "method=rtn",
        "scheme=w4",
        "baseline=false",
        "evaluations=demo_perplexity",
        "evaluations.limit=2",
        f"runs={tmp_path}/runs",
        "tracking=sqlite",
        "device=cpu",
        "cluster=local",
        "cluster.workers=2",
    ]
    environment = {
        **os.environ,
        **SECRETS,
        "OMP_NUM_THREADS": "1",
        "HARNESS_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "harness", "run", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in kept) and any(
        path.name == "log.txt" for path in kept
    )
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
        assert not [path for path in kept if secret.encode() in path.read_bytes()]


def test_passwords_in_addresses_stay_out_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["harness", "run", "demo", "tracking.uri=http://me:canary@server:5000"]
    )
    assert provenance.typed_command() == "harness run demo tracking.uri=http://server:5000"
    assert (
        text.without_password("http://me:can@ary@server:5000/a and http://b@c")
        == "http://server:5000/a and http://c"
    )


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "code was run"))


def test_pickled_weights_are_refused_unread(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, proof = tiny_model("llama"), tmp_path / "proof"
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(ModelError, match="pickled"):
        WeightReader(folder)
    with pytest.raises(ModelError, match="unpickled, which is refused"):
        model_folders.model_folder(Model("hostile", str(folder)))
    # a pickle by another name
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(ModelError, match="not a readable safetensors"):
        WeightReader(folder)
    assert not proof.exists()


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/part.safetensors", "weights.bin", "..", 7],
)
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (
        tmp_path / "outside.safetensors",
        folder / "sub" / "part.safetensors",
        folder / "weights.bin",
    ):
        path.write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="no safetensors file of this folder"):
        WeightReader(folder)


def test_an_index_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["../a"]}')
    with pytest.raises(ModelError, match="weight_map is no mapping"):
        WeightReader(tmp_path)


def test_code_in_a_model_folder_is_not_run(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from harness.execution.worker import load_tokenizer

    folder, proof = tiny_model("llama"), tmp_path / "proof"
    (folder / "evil.py").write_text(
        f"open({str(proof)!r}, 'w').write('code was run')\nclass Evil: pass\n"
    )
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text()) if settings.exists() else {}
    content |= {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    settings.write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(folder)
    except (ValueError, OSError, HarnessError):
        pass  # refused; a tokenizer of transformers' own is as good
    from harness.quantization import models

    models.shapes(folder)
    assert not proof.exists()


TAGS = (
    "!!python/object/apply:os.system ['touch PROOF']",
    "!!python/name:os.system",
    "!include /etc/passwd",
)


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_text(f"# Hostile\nmodel: demo\ngrids:\n  - method: rtn\n    scheme: {tag}\n")
    with pytest.raises(ConfigError):
        load_sweep(str(path), [])
    assert not (tmp_path / "PROOF").exists()


def test_a_sweep_cannot_write_outside_the_store(tmp_path: Path) -> None:
    """Names that become file names."""
    path = tmp_path / "s.yaml"
    table = "tables:\n  - {name: ../../escaped, columns: [checkpoint/bits_per_weight]}\n"
    path.write_text(f"# Hostile\nmodel: demo\ngrids:\n  - {{method: rtn, scheme: w4}}\n{table}")
    with pytest.raises(ConfigError, match="escaped"):
        load_sweep(str(path), [f"runs={tmp_path}/a/b/runs"])


LISTEN = """
import json, sys, psutil
from harness.execution.executors import ray_cluster
from harness.core.sweep import Cluster, Runtime
from pathlib import Path
cluster = ray_cluster.RayCluster(Runtime(Path(sys.argv[1]), cluster=Cluster("ray", workers=1), device="cpu"), 1)
found = []
own = psutil.Process()
for process in [own, *own.children(recursive=True)]:
    try:
        found += [(process.name(), c.laddr.ip, c.laddr.port) for c in process.net_connections("inet") if c.status == "LISTEN"]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
cluster.close()
print("FOUND", json.dumps(found))
"""


@pytest.mark.slow
def test_ray_listens_on_the_loopback_interface_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTEN, str(tmp_path)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:]
    )
    assert found, "Ray listens nowhere: the test has lost its subject"
    assert not [
        each for each in found if each[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ], found
