"""The walk: exact forwards, sharing that changes nothing, resuming, failures that stay alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import (
    CALIBRATION,
    GPTQ,
    RTN,
    SEQUENTIAL,
    cell,
    content,
    failures,
    part,
    quantize,
    windows,
)

from harness.core import plugins
from harness.core.cell import (
    Cell,
    Method,
    Model,
    Override,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
    freeze,
    quantize_key,
)
from harness.core.errors import StoreError
from harness.core.events import Progress, Quantized
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.pipeline.passes import run_pass

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
AWQ = Method("awq", transform=part("awq", "transform"), rounding=part("rtn"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_quantizes_every_matrix(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_model(family)
    cells = [cell(folder, RTN), cell(folder, GPTQ)]
    events = quantize(cells, folder, tmp_path / "store")
    assert not failures(events), failures(events)
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3]
    assert len([event for event in events if isinstance(event, Quantized)]) == 2
    errors = {}
    for c in cells:
        manifest = Checkpoint.open(tmp_path / "store" / quantize_key(c)).manifest
        assert manifest["coverage"]["linears"] == 3 * 7
        assert 4 < manifest["bits_per_weight"] < 5 < manifest["bits_per_weight_total"]
        errors[c.method.name] = {(e["block"], e["linear"]): e for e in manifest["layer_errors"]}
    # GPTQ trades weight error for output error; its Hessian's statistics are in the report, RTN has none
    assert all("output_error" not in e for e in errors["rtn"].values())
    assert all(
        e["weight_error"] >= errors["rtn"][k]["weight_error"] * 0.99
        for k, e in errors["gptq"].items()
        if k[0] == 0
    )
    assert all(e["output_error"] < 0.05 for e in errors["gptq"].values())


def all_kinds(folder: Path) -> list[Cell]:
    return [
        cell(folder, RTN),
        cell(folder, GPTQ),
        cell(folder, GPTQ, bits=3),
        cell(folder, GPTQ, bits=3, inputs="full_precision"),
        cell(folder, SEQUENTIAL),
        cell(folder, AWQ, inputs="full_precision"),
        cell(folder, AWQ, bits=3),
    ]


def test_alone_and_in_company_give_the_same_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("qwen3")
    cells = all_kinds(folder)
    assert not failures(quantize(cells, folder, tmp_path / "company"))
    for c in cells:
        assert not failures(quantize([c], folder, tmp_path / "alone"))
        key = quantize_key(c)
        assert content(tmp_path / "alone" / key) == content(tmp_path / "company" / key), c.title


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_killed_pass_resumes_to_the_same_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path, stop_after: int
) -> None:
    folder = tiny_model("llama")
    cells = all_kinds(folder)
    quantize(cells, folder, tmp_path / "undisturbed")
    quantize(cells, folder, tmp_path / "killed", stop_after=stop_after)
    key = quantize_key(cells[1])
    assert not (tmp_path / "killed" / key / "manifest.json").exists()
    (
        tmp_path / "killed" / key / f"block-{stop_after - 1:05}.json"
    ).unlink()  # one cell stands a block behind the others
    assert not failures(quantize(cells, folder, tmp_path / "killed"))
    for c in cells:
        key = quantize_key(c)
        assert content(tmp_path / "killed" / key) == content(tmp_path / "undisturbed" / key), (
            c.title
        )


@pytest.mark.parametrize(
    "name", ["quarot", "aweq"]
)  # data-free, and calibrated; both add parameters to blocks
@pytest.mark.parametrize(
    "stop_after", [1, 3]
)  # in the middle, and before the manifest alone is missing
def test_what_a_method_adds_is_counted_after_a_kill(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str, stop_after: int
) -> None:
    folder = tiny_model("llama")
    c = cell(
        folder,
        Method(
            name,
            transform=part(name, "transform"),
            rounding=part("aweq" if name == "aweq" else "rtn"),
        ),
    )
    assert not failures(quantize([c], folder, tmp_path / "undisturbed"))
    quantize([c], folder, tmp_path / "killed", stop_after=stop_after)
    assert not failures(quantize([c], folder, tmp_path / "killed"))
    assert content(tmp_path / "killed" / quantize_key(c)) == content(
        tmp_path / "undisturbed" / quantize_key(c)
    )


def test_a_finished_checkpoint_is_left_alone(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    c = cell(folder, RTN)
    quantize([c], folder, tmp_path)
    before = (tmp_path / quantize_key(c) / "manifest.json").read_bytes()
    quantize([c], folder, tmp_path)
    assert (tmp_path / quantize_key(c) / "manifest.json").read_bytes() == before


def test_a_damaged_manifest_is_written_again(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    c = cell(folder, GPTQ)
    quantize([c], folder, tmp_path)
    before = content(tmp_path / quantize_key(c))
    for damage in ("", '{"trunc', "[]", "3"):
        (tmp_path / quantize_key(c) / "manifest.json").write_text(damage)
        assert not failures(quantize([c], folder, tmp_path))
        assert content(tmp_path / quantize_key(c)) == before


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, {"key": "a", "version": 1})
    with pytest.raises(StoreError, match=r"key: 'a' .*'b'"):
        CheckpointWriter(tmp_path, {"key": "b", "version": 1})


def test_nan_inputs_fail_the_cells_that_read_them(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokens = windows()
    tokens[0, 0] = 7
    cells = [
        cell(folder, RTN),
        cell(folder, GPTQ),
        cell(folder, Method("corrected biases", rounding=part("aweq"))),
    ]
    events = quantize(cells, folder, tmp_path / "store", tokens)
    for failure in (found := failures(events)):
        assert (
            "NaN or infinity" in failure.reason
            and "block 0" in failure.stage
            and "Traceback" in failure.detail
        )
    assert len(found) == 2
    assert (tmp_path / "store" / quantize_key(cells[0]) / "manifest.json").exists()
    assert not any(
        (tmp_path / "store" / quantize_key(cell) / "manifest.json").exists() for cell in cells[1:]
    )


def test_one_cells_error_is_its_own(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    wrong = [
        cell(folder, Method("x", rounding=Part("nothing"))),
        cell(folder, RTN, group_size=7),
        cell(folder, RTN),
    ]
    events = quantize(wrong, folder, tmp_path)
    assert len(failures(events)) == 2 and 'no rounding "nothing"' in failures(events)[0].reason
    assert len([event for event in events if isinstance(event, Quantized)]) == 1


OUT_OF_MEMORY = (  # of torch's CPU allocator, and of a device's
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes. "
    "Error code 12 (Cannot allocate memory)",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
)


@pytest.mark.parametrize(
    "error", [*(RuntimeError(text) for text in OUT_OF_MEMORY), MemoryError(), ValueError("no")]
)
def test_memory_that_runs_out_in_a_rounding_is_known_as_such(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """Only then is the cell retried; the other cells of the pass go on."""

    def exhausted(*_: object) -> None:
        raise error

    monkeypatch.setattr(plugins.load("rounding", "rtn"), "round_layer", exhausted)
    folder = tiny_model("llama")
    cells = [cell(folder, RTN), cell(folder, GPTQ)]
    events = quantize(cells, folder, tmp_path)
    (failed,) = failures(events)
    assert failed.kind == ("error" if isinstance(error, ValueError) else "out_of_memory")
    assert failed.cell_keys == (cell_key(cells[0]),) and failed.stage == "block 0"
    assert type(error).__name__ in failed.reason and "Traceback" in failed.detail
    assert [event.cell_keys for event in events if isinstance(event, Quantized)] == [
        (cell_key(cells[1]),)
    ]


def test_a_failing_layer_is_named_once(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for found in failures(quantize([cell(folder, RTN), cell(folder, GPTQ)], folder, tmp_path)):
        assert found.reason.startswith("block 1, mlp.down_proj: the weight holds NaN or infinity")
        assert found.reason.count("down_proj") == 1


def test_a_failing_full_precision_stream_leaves_streams_of_their_own(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transform of the residual stream starts a stream of its own, whatever happens to that of the original blocks."""
    from harness.quantization.pipeline import walk

    folder = tiny_model("llama")
    rotated = Method("rotated", transform=part("quarot", "transform"), rounding=part("gptq"))
    cells = [cell(folder, method, inputs="full_precision") for method in (GPTQ, rotated)]
    original = walk.Walk._observe
    calls: list[int] = []

    def failing(self: walk.Walk, *arguments: object) -> object:
        calls.append(len(calls))
        if len(calls) == 1:  # the first stream of a block is the full-precision one
            raise RuntimeError("no room")
        return original(self, *arguments)

    monkeypatch.setattr(walk.Walk, "_observe", failing)
    events = quantize(cells, folder, tmp_path)
    assert [event.cell_keys for event in failures(events)] == [(cell_key(cells[0]),)]
    assert [event.cell_keys for event in events if isinstance(event, Quantized)] == [
        (cell_key(cells[1]),)
    ]


def test_data_is_needed_where_it_is_needed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    cells = [cell(folder, RTN), cell(folder, GPTQ)]
    writers = {quantize_key(c): CheckpointWriter(tmp_path / quantize_key(c), {}) for c in cells}
    events = list(run_pass(cells, folder, None, writers))
    assert ["hessian" in event.reason for event in failures(events)] == [True]


def test_full_precision_inputs_differ_after_block_0_only(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    cells = [
        cell(folder, GPTQ, bits=2, inputs=inputs) for inputs in ("quantized", "full_precision")
    ]
    quantize(cells, folder, tmp_path)
    one, other = (Checkpoint.open(tmp_path / quantize_key(c)) for c in cells)
    same = [
        all(
            torch.equal(w.dequantize(), other.block(i).weights[n].dequantize())
            for n, w in one.block(i).weights.items()
        )
        for i in range(3)
    ]
    assert same == [True, False, False]


def test_a_prefix_of_equal_schemes_is_one_stream(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Cells that differ from block 2 on share forwards before it, and still give what they give alone."""
    from harness.quantization.pipeline import passes

    folder = tiny_model("llama")
    late = Scheme(
        "late",
        WeightScheme(group_size=32),
        overrides=(Override(("down_proj",), (2,), freeze({"bits": 8})),),
    )
    cells = [cell(folder, GPTQ), cell(folder, GPTQ, scheme=late)]
    streams: list[int] = []
    original = passes._Pass._walk_block

    def counting(self: passes._Pass, index: int) -> None:
        streams.append(len(self.streams))
        original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes._Pass, "_walk_block", counting)
        quantize(cells, folder, tmp_path / "company")
    assert streams == [1, 1, 1]
    quantize(cells[1:], folder, tmp_path / "alone")
    key = quantize_key(cells[1])
    assert content(tmp_path / "alone" / key) == content(tmp_path / "company" / key)


def test_real_models_quantize(shared: Path, tmp_path: Path) -> None:
    """A trained model: GPTQ at 3 bits stays closer to it than rounding does."""
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("../shared/models/stories260K is not here")
    model = Model("stories", str(folder), digest="stories260K")
    scheme = Scheme("w3", WeightScheme(bits=3))
    cells = [Cell(model, method, scheme, CALIBRATION) for method in (RTN, GPTQ)]
    tokens = windows(16, 64, 512)
    assert not failures(quantize(cells, folder, tmp_path, tokens))
