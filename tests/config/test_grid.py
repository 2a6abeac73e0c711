"""Sweep files and overrides become cells, or one message that says everything that is wrong."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config import context, evaluations, renamed, runtime, schemes, yaml_files
from harness.config import grid as grid_module
from harness.config.axes import GROUPS
from harness.config.grid import load_sweep
from harness.config.locations import list_names
from harness.config.reproduce import command_for
from harness.core import plugins
from harness.core.cell import (
    Cell,
    Method,
    Model,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
    quantize_key,
    score_key,
    to_json,
)
from harness.core.errors import ConfigError
from harness.core.package import PACKAGE
from harness.core.sweep import Sweep
from harness.data import task_files

ROOT = Path(__file__).resolve().parents[2]
GRID = ["model=demo", "calibration=demo"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without configs of its own, and no hub."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HARNESS_CONF", "HARNESS_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Sweep]:
    def load(text: str, *overrides: str) -> Sweep:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return load_sweep(str(path), overrides)

    return load


def titles(sweep: Sweep) -> list[str]:
    return [cell.title for cell in sweep.cells]


def quantized(sweep: Sweep) -> list[Cell]:
    return [cell for cell in sweep.cells if not cell.method.is_baseline]


def problem(*overrides: str, name: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sweep(name, overrides)
    return str(caught.value)


# --- everything that ships -----------------------------------------------------------------------------------------------------

SHIPPED = [(folder, entry.name) for folder in GROUPS.values() for entry in list_names(folder)]


@pytest.mark.parametrize("group, name", SHIPPED)
def test_every_yaml_composes_and_says_what_it_is(group: str, name: str) -> None:
    assert isinstance(yaml_files.compose(group, name), dict)
    (title,) = [entry.title for entry in list_names(group) if entry.name == name]
    assert title, f"conf/{group}/{name}.yaml needs a first line that says what it is"


@pytest.mark.parametrize("name", [entry.name for entry in list_names("models")])
def test_every_model_resolves_without_network(name: str) -> None:
    (cell,) = load_sweep(None, [f"model={name}", "method=none"]).cells
    assert cell.model.digest and cell.model.name == name


@pytest.mark.parametrize(
    "name", [entry.name for entry in list_names("schemes") if entry.name != "full"]
)
def test_every_scheme_resolves(name: str) -> None:
    (cell,) = quantized(
        load_sweep(None, ["model=demo", "method=rtn", "calibration=demo", f"scheme={name}"])
    )
    assert cell.scheme.name == name


@pytest.mark.parametrize(
    "name", [entry.name for entry in list_names("methods") if entry.name != "none"]
)
def test_every_method_resolves(name: str) -> None:
    (cell,) = quantized(load_sweep(None, [*GRID, f"method={name}", "scheme=w4"]))
    assert cell.method.name == name


@pytest.mark.parametrize("name", [entry.name for entry in list_names("evaluations")])
def test_every_evaluation_resolves(name: str) -> None:
    (cell,) = load_sweep(None, ["model=demo", "method=none", f"evaluations={name}"]).cells
    assert cell.evaluations
    for evaluation in cell.evaluations:
        assert score_key(cell, evaluation)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_sweep_resolves(path: Path, request: pytest.FixtureRequest) -> None:
    if "shared" in path.read_text():
        request.getfixturevalue("shared")
    sweep = load_sweep(path.stem)
    assert sweep.cells and sweep.title and sweep.path == path
    keys = Counter((cell_key(cell), cell.title) for cell in sweep.cells)
    assert max(keys.values()) == 1


def test_a_scheme_file_says_what_its_name_says() -> None:
    for entry in list_names("schemes"):
        if schemes.SCHEME_NAME.fullmatch(entry.name) or schemes.FORMAT_NAME.fullmatch(entry.name):
            (cell,) = quantized(
                load_sweep(
                    None, ["model=demo", "method=rtn", "calibration=demo", f"scheme={entry.name}"]
                )
            )
            parsed = schemes.scheme_by_name(entry.name, "")
            for part in ("weight", "activation", "kv"):
                for field, value in (parsed[part] or {}).items():
                    assert getattr(getattr(cell.scheme, part), field) == value, (
                        entry.name,
                        part,
                        field,
                    )


# --- the grid ------------------------------------------------------------------------------------------------------------------


def test_the_product_has_its_baseline_first() -> None:
    sweep = load_sweep(None, [*GRID, "method=rtn,gptq", "scheme=w4,w3g32"])
    points = ["none · full", "rtn · w4", "rtn · w3g32", "gptq · w4", "gptq · w3g32"]
    assert titles(sweep) == [f"demo · {point}" for point in points]
    assert titles(load_sweep(None, [*GRID, "method=rtn", "scheme=w4", "baseline=false"])) == [
        "demo · rtn · w4"
    ]


def test_schemes_by_name() -> None:
    (cell,) = quantized(load_sweep(None, ["model=demo", "method=rtn", "scheme=w3g48syma6kv2"]))
    assert (
        cell.scheme.weight.bits,
        cell.scheme.weight.group_size,
        cell.scheme.weight.symmetric,
    ) == (3, 48, True)
    assert cell.scheme.activation is not None and cell.scheme.activation.bits == 6
    assert cell.scheme.kv is not None and cell.scheme.kv.bits == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mxfp4", WeightScheme("mxfp4", 4, 32, scale_dtype="e8m0")),
        ("nvfp4a8", WeightScheme("nvfp4", 4, 16, scale_dtype="float8_e4m3")),
        ("fp8", WeightScheme("fp8_e4m3", 8, -1, scale_dtype="float32")),
        ("fp8_e5m2g128kv4", WeightScheme("fp8_e5m2", 8, 128, scale_dtype="float32")),
        ("mxfp6", WeightScheme("mxfp6_e2m3", 6, 32, scale_dtype="e8m0")),
        ("nf4", WeightScheme("nf4", 4, 64, scale_dtype="float32")),
    ],
)
def test_schemes_of_number_formats_by_name(name: str, expected: WeightScheme) -> None:
    (cell,) = quantized(load_sweep(None, ["model=demo", "method=rtn", f"scheme={name}"]))
    assert cell.scheme.weight == expected
    assert (cell.scheme.activation is not None) == ("a8" in name) and (
        cell.scheme.kv is not None
    ) == ("kv4" in name)


def test_one_key_whether_a_scheme_is_a_file_or_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (by_file,) = quantized(load_sweep(None, ["model=demo", "method=rtn", "scheme=w4g32"]))
    (tmp_path / "conf" / "scheme").mkdir(parents=True)
    (tmp_path / "conf" / "scheme" / "mine.yaml").write_text("weight: {bits: 4.0, group_size: 32}\n")
    monkeypatch.setenv("HARNESS_CONF", str(tmp_path / "conf"))
    (mine,) = quantized(load_sweep(None, ["model=demo", "method=rtn", "scheme=mine"]))
    assert quantize_key(mine) == quantize_key(by_file) and mine.title != by_file.title


def test_axes_of_the_override_grammar() -> None:
    sweep = load_sweep(
        None, [*GRID, "method=gptq", "scheme=glob(w4g*,exclude=[*sym,*signed])", "seed=range(2,5)"]
    )
    cells = quantized(sweep)
    assert {cell.scheme.name for cell in cells} == {"w4g32", "w4g64", "w4g128"}
    assert sorted({cell.seed for cell in cells}) == [2, 3, 4]
    assert titles(load_sweep(None, [*GRID, "method=[rtn,gptq]", "+scheme='w4'"])) == titles(
        load_sweep(None, [*GRID, "method=rtn,gptq", "scheme=w4"])
    )


def test_the_seed_feeds_the_calibration_unless_that_has_its_own() -> None:
    cells = quantized(load_sweep(None, [*GRID, "method=gptq", "scheme=w4", "seed=0,1"]))
    assert [cell.calibration and cell.calibration.seed for cell in cells] == [0, 1]
    (cell, *_) = quantized(
        load_sweep(None, [*GRID, "method=gptq", "scheme=w4", "seed=5", "calibration.seed=7"])
    )
    assert cell.calibration is not None and (cell.seed, cell.calibration.seed) == (5, 7)


def test_a_data_free_method_has_one_cell_whatever_the_calibration() -> None:
    cells = quantized(
        load_sweep(
            None,
            [*GRID, "method=rtn", "scheme=w4", "seed=0,1,2", "inputs=quantized,full_precision"],
        )
    )
    assert [cell.calibration for cell in cells] == [None]


def test_edited_fields_apply_where_they_exist_and_name_what_differs() -> None:
    edits = ["rounding.damping_fraction=0.01,0.1", "calibration.samples=8"]
    sweep = load_sweep(None, [*GRID, "method=rtn,gptq", "scheme=w4", *edits])
    methods = ["rtn", "gptq[damping_fraction=0.01]", "gptq[damping_fraction=0.1]"]
    assert titles(sweep)[1:] == [f"demo · {method} · w4" for method in methods]
    last = sweep.cells[-1]
    assert last.method.rounding is not None and last.method.rounding["damping_fraction"] == 0.1
    assert last.calibration is not None and last.calibration.samples == 8
    edits = ["rounding.damping_fraction=1", "model.dtype=bfloat16"]
    (cell,) = quantized(load_sweep(None, [*GRID, "method=gptq", "scheme=w4", *edits]))
    assert cell.method.name == "gptq" and cell.model.dtype == "bfloat16"
    assert (
        cell.method.rounding is not None and type(cell.method.rounding["damping_fraction"]) is float
    )


def test_a_rounding_around_another_has_all_settings_of_its_base() -> None:
    def eora(*overrides: str) -> Cell:
        (found,) = load_sweep(None, [*GRID, "scheme=w4g32", "baseline=false", *overrides]).cells
        return found

    def base(cell: Cell) -> dict[str, object]:
        assert cell.method.rounding is not None
        settings = to_json(cell.method.rounding)["settings"]
        return {"name": settings["base"], **settings["base_settings"]}

    on_gptq, on_rtn = eora("method=gptq_eora"), eora("method=rtn_eora")
    rtn = load_sweep(None, [*GRID, "scheme=w4g32", "method=rtn"]).cells[1].method.rounding
    assert rtn is not None and base(on_rtn) == {"name": "rtn", **dict(rtn.settings)}
    assert base(on_gptq)["damping_fraction"] == 0.01 and base(on_gptq)["name"] == "gptq"
    edited = eora("method=gptq_eora", "rounding.base_settings.damping_fraction=0.1")
    assert base(edited) == {**base(on_gptq), "damping_fraction": 0.1}
    assert len({quantize_key(each) for each in (on_gptq, on_rtn, edited)}) == 3
    # settings of another base do not remain
    changed = eora(
        "method=gptq_eora", "rounding.base_settings.range_search=true", "rounding.base=rtn"
    )
    assert base(changed) == {**base(on_rtn), "range_search": True}
    for cell in (on_rtn, edited, changed):
        (again,) = load_sweep(None, [*shlex.split(command_for(cell))[2:], "baseline=false"]).cells
        assert quantize_key(again) == quantize_key(cell)
    for wrong, message in (
        ("rounding.base_settings.dampin=1", "base_settings.dampin=1: .*damping_fraction"),
        ("rounding.base=gptqq", 'no rounding "gptqq"'),
        ("rounding.base=svdquant", "name one without a base"),
    ):
        with pytest.raises(ConfigError, match=message):
            eora("method=gptq_eora", wrong)


def test_a_method_is_calibrated_as_published_unless_told() -> None:
    inputs = {
        cell.method.name: cell.inputs
        for cell in quantized(load_sweep(None, [*GRID, "method=awq,gptq", "scheme=w4g32"]))
    }
    assert inputs == {"awq": "full_precision", "gptq": "quantized"}
    (told,) = quantized(load_sweep(None, [*GRID, "method=awq", "scheme=w4g32", "inputs=quantized"]))
    assert told.inputs == "quantized"


def test_slots_replace_the_method(sweep_file: Callable[..., Sweep]) -> None:
    text = "model: demo\ncalibration: demo\ngrids:\n  - {method: [none, rtn, awq], scheme: [w4]}\n"
    assert titles(sweep_file(text, "rounding=gptq,rtn"))[1:] == [
        "demo · gptq · w4",
        "demo · rtn · w4",
    ]
    assert titles(sweep_file(text, "rounding=gptq", "transform=awq"))[1:] == [
        "demo · awq_gptq · w4"
    ]
    edited = sweep_file(text, "transform=null")
    assert titles(edited)[1:] == ["demo · rtn · w4", "demo · rounding=awq · w4"], (
        "AWQ's clipping alone is not AWQ"
    )


def test_overrides_replace_axes_of_every_grid(sweep_file: Callable[..., Sweep]) -> None:
    text = """
model: demo
calibration: demo
grids:
  - {method: rtn, scheme: [w8, w4]}
  - zip: {method: [gptq, awq], scheme: [w3, w4]}
"""
    assert titles(sweep_file(text))[1:] == [
        "demo · rtn · w8",
        "demo · rtn · w4",
        "demo · gptq · w3",
        "demo · awq · w4",
    ]
    assert titles(sweep_file(text, "scheme=w2"))[1:] == [
        "demo · rtn · w2",
        "demo · gptq · w2",
        "demo · awq · w2",
    ]
    assert titles(sweep_file(text, "method=rtn"))[1:] == [
        "demo · rtn · w8",
        "demo · rtn · w4",
        "demo · rtn · w3",
    ]


def test_settings_of_a_grid_go_with_its_own_methods(sweep_file: Callable[..., Sweep]) -> None:
    """The sweep of all methods may be narrowed to one of them, although its grids set what that one does not have."""
    text = """
model: demo
calibration: demo
scheme: w4
grids:
  - {method: [gptq, rtn]}
  - {method: gptq, rounding.damping_fraction: [0.05, 0.1]}
  - {method: autoround, rounding.iterations: 20}
skip:
  - {rounding.iterations: 30, reason: too long}
"""
    assert len(sweep_file(text).cells) == 6
    assert titles(sweep_file(text, "method=awq")) == ["demo · none · full", "demo · awq · w4"]
    kept = titles(sweep_file(text, "method=gptq"))
    assert kept[1] == "demo · gptq · w4" and len(kept) == 4, kept
    with pytest.raises(ConfigError, match=r"override rounding.step=3: no setting of a rounding"):
        sweep_file(text, "method=gptq", "rounding.step=3")


def test_skips_have_reasons(sweep_file: Callable[..., Sweep]) -> None:
    text = """
model: demo
calibration: demo
grids: {method: [rtn, gptq], scheme: [w4, w3, w2]}
skip:
  - {method: gptq, scheme: [w2, w3], reason: not published}
  - {scheme.weight.bits: 2, reason: useless}
"""
    sweep = sweep_file(text)
    assert titles(sweep)[1:] == ["demo · rtn · w4", "demo · rtn · w3", "demo · gptq · w4"]
    assert {skip.reason: skip.titles for skip in sweep.skips} == {
        "not published": ("demo · gptq · w3", "demo · gptq · w2"),
        "useless": ("demo · rtn · w2",),
    }
    bad = (
        text
        + "  - {method: gtpq, reason: x}\n  - {scheme.weight.bit: 2, reason: x}\n  - {method: rtn}\n"
    )
    with pytest.raises(ConfigError) as caught:
        sweep_file(bad)
    for said in (
        'did you mean "gptq"',
        'did you mean "bits"',
        "skip[4]: axes to match and a reason",
    ):
        assert said in str(caught.value)


def test_what_comes_first_is_said_as_skips_are(sweep_file: Callable[..., Sweep]) -> None:
    """Each entry ranks its cells and their baseline; the order of the cells, and so of the tables, stays."""
    text = """
model: demo
calibration: demo
grids: {method: [rtn, gptq], scheme: [w4, w3]}
first:
  - {method: gptq, scheme: w3}
  - {scheme.weight.bits: 4}
"""
    sweep = sweep_file(text)
    assert titles(sweep) == titles(sweep_file(text.partition("first:")[0]))
    ranks = {cell.title: sweep.priority_tier(cell_key(cell)) for cell in sweep.cells}
    assert ranks == {
        "demo · none · full": 0,
        "demo · gptq · w3": 0,
        "demo · rtn · w4": 1,
        "demo · gptq · w4": 1,
        "demo · rtn · w3": 2,
    }
    bad = text + "  - {method: gtpq}\n  - {scheme.weight.bit: 2}\n  - {methd: rtn}\n  - rtn\n"
    with pytest.raises(ConfigError) as caught:
        sweep_file(bad)
    for said in (
        'did you mean "gptq"',
        'did you mean "bits"',
        'did you mean "method"',
        "first[5]: axes to match are expected",
    ):
        assert said in str(caught.value)


def test_a_sweep_file_says_its_title_and_runtime(
    sweep_file: Callable[..., Sweep], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    head = "# A title\n# And what it claims.\nmodel: demo\nmethod: none\n"
    text = head + "data: {root: data}\ncluster: local\ncluster.workers: 3\nruns: kept\n"
    sweep = sweep_file(text, "cluster.workers=1", "tracking=none")
    assert (sweep.name, sweep.title, sweep.description) == (
        "study",
        "A title",
        "And what it claims.",
    )
    assert (
        sweep.runtime.data_root == tmp_path / "data" and sweep.runtime.runs == Path.cwd() / "kept"
    )
    assert (
        sweep.runtime.cluster.kind,
        sweep.runtime.cluster.workers,
        sweep.runtime.tracking.kind,
    ) == ("local", 1, "none")


def test_runtime_changes_no_key() -> None:
    grid = [*GRID, "method=gptq", "scheme=w4", "evaluations=demo_perplexity"]
    elsewhere = [
        "cluster=local",
        "tracking=none",
        "runs=/elsewhere",
        "device=cpu",
        "batch_size=3",
        "fail_fast=true",
        "priority=5",
    ]
    for one, other in zip(
        load_sweep(None, grid).cells, load_sweep(None, [*grid, *elsewhere]).cells, strict=True
    ):
        assert (quantize_key(one), cell_key(one)) == (quantize_key(other), cell_key(other))
        assert [score_key(one, e) for e in one.evaluations] == [
            score_key(other, e) for e in other.evaluations
        ]
    assert load_sweep(None, [*grid, *elsewhere]).runtime.runs == Path("/elsewhere")


def test_keys_do_not_depend_on_where_data_lies(tmp_path: Path) -> None:
    for place in ("a", "b"):
        folder = tmp_path / place / "text" / "wikitext-2-raw"
        folder.mkdir(parents=True)
        for split in ("valid", "test"):
            (folder / f"{split}.jsonl").write_text(f'{{"text": "{split}"}}\n')
    grid = [
        "model=demo",
        "method=gptq",
        "scheme=w4",
        "calibration=wikitext2",
        "evaluations=wikitext2",
    ]
    (one, other) = (
        quantized(load_sweep(None, [*grid, f"data.root={tmp_path / place}"]))[0]
        for place in ("a", "b")
    )
    assert quantize_key(one) == quantize_key(other)
    assert score_key(one, one.evaluations[0]) == score_key(other, other.evaluations[0])
    (hub,) = quantized(load_sweep(None, grid))
    assert score_key(hub, hub.evaluations[0]) != score_key(one, one.evaluations[0])


def test_models_and_calibrations_may_be_paths(tmp_path: Path) -> None:
    model = PACKAGE / "data" / "demo" / "model"
    shutil.copytree(model, tmp_path / "my model")
    (tmp_path / "text.txt").write_text("some words " * 100)
    axes = [
        f"model='{tmp_path}/my model'",
        "method=gptq",
        "scheme=w4",
        f"calibration={tmp_path}/text.txt",
    ]
    (cell,) = quantized(load_sweep(None, axes))
    assert (
        cell.model.name == "my model"
        and cell.calibration is not None
        and cell.calibration.name == "text"
    )
    (demo,) = quantized(load_sweep(None, [*GRID, "method=rtn", "scheme=w4"]))
    assert cell.model.digest == demo.model.digest
    (hub,) = load_sweep(None, ["model=owner/Some-Model-7B", "method=none"]).cells
    assert (hub.model.name, hub.model.source) == ("Some-Model-7B", "owner/Some-Model-7B")


def test_fields_younger_than_a_key_leave_it_as_it_was() -> None:
    cell = Cell(
        Model("a", "b", digest="d"),
        Method("rtn", rounding=Part("rtn")),
        Scheme("w4g32", WeightScheme("int", 4, 32)),
    )
    assert quantize_key(cell) == "0121462a424511a8690d2833397a878327d89fc49876dd89d997b13674f2621e"
    floating = Scheme("w4g32", WeightScheme("int", 4, 32, zero_point="float"))
    assert quantize_key(dataclasses.replace(cell, scheme=floating)) != quantize_key(cell)
    symmetric = Scheme("w4g32sym", WeightScheme("int", 4, 32, True))
    signed = Scheme("w4g32signed", WeightScheme("int", 4, 32, True, signed_scales=True))
    keys = {quantize_key(dataclasses.replace(cell, scheme=each)) for each in (symmetric, signed)}
    assert len(keys) == 2


def test_settings_younger_than_a_key_leave_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "aged.py").write_text(
        '"""A method that got a setting later."""\n\n\n'
        "class Rounding:\n"
        '    settings_added_later = {"search": "none"}\n'
    )
    monkeypatch.setenv("HARNESS_PLUGINS", str(tmp_path))
    plugins.find.cache_clear()
    try:
        keys = {}
        for settings in ((), (("search", "none"),), (("search", "range"),)):
            part = Part("aged", settings)
            cell = Cell(Model("a", "b", digest="d"), Method("aged", rounding=part), Scheme("w4"))
            keys[settings] = quantize_key(cell)
        old, default, other = keys.values()
        assert old == default != other
    finally:
        monkeypatch.undo()
        plugins.find.cache_clear()


def test_the_name_of_a_scheme_may_ask_for_signed_scales() -> None:
    from harness.config.schemes import scheme_by_name

    weight = scheme_by_name("w4g32signed", "here")["weight"]
    assert weight["symmetric"] and weight["signed_scales"]
    assert not scheme_by_name("w4g32sym", "here")["weight"]["signed_scales"]


# --- evaluations and tables ----------------------------------------------------------------------------------------------------


def test_suites_expand_and_settings_can_be_edited() -> None:
    overrides = [
        *GRID,
        "method=rtn",
        "scheme=w4",
        "evaluations=demo_perplexity,demo,demo_facts",
        "evaluations.limit=20",
    ]
    (_, cell) = load_sweep(None, [*overrides, "evaluations.demo_perplexity.length=64"]).cells
    assert [e.name for e in cell.evaluations] == [
        "demo_perplexity",
        "demo_facts",
        "demo_add",
        "demo_count",
        "demo_copy",
    ]
    assert {e.limit for e in cell.evaluations} == {20} and cell.evaluations[0]["length"] == 64
    (whole, _) = load_sweep(None, overrides[:-1]).cells
    assert score_key(cell, cell.evaluations[1]) != score_key(cell, whole.evaluations[1])


def test_tables_are_checked(sweep_file: Callable[..., Sweep]) -> None:
    text = """
model: demo
method: none
evaluations: [demo_perplexity]
tables:
  - name: one
    columns: [demo_perplexity/perplexity, {metric: checkpoint/bits_per_weight, digits: 3}]
"""
    (table,) = sweep_file(text).tables
    assert [column.higher_is_better for column in table.columns] == [False, None] and table.columns[
        1
    ].digits == 3
    with pytest.raises(ConfigError) as caught:
        sweep_file(
            text
            + "  - name: one\n    published: no/such\n    columns: [demo_perplexty/perplexity, {metric: x, digit: 1}]"
        )
    for said in (
        'mean "demo_perplexity"',
        'mean "digits"',
        "no sweeps/published/no/such",
        "two tables are called one",
    ):
        assert said in str(caught.value)


# --- what is wrong is said -----------------------------------------------------------------------------------------------------


def test_all_offenders_at_once_with_the_nearest_name() -> None:
    said = problem(
        "model=dmeo", "method=gtpq", "scheme=w4q8", "evaluations=demo_perplexty", "cluster=lokal"
    )
    for near in ("demo", "gptq", "demo_perplexity", "local"):
        assert f'did you mean "{near}"' in said
    assert (
        'no scheme "w4q8"' in said
        and said.startswith("5 problems")
        and "Nothing was started." in said
    )


@pytest.mark.parametrize(
    "override, expected",
    [
        ("clustr=local", 'did you mean "cluster"'),
        ("rounding.damping=0.1", 'did you mean "rounding.damping_fraction"'),
        ("rounding.block_size=1.5", "block_size: a whole number is expected, not 1.5"),
        ("rounding.act_order=1", "act_order: true or false is expected, not 1"),
        ("calibration.sampels=1", 'did you mean "samples"'),
        ("calibration.samples=0", "samples: 0 is below 1"),
        ("calibration.packing=windows", 'did you mean "window"'),
        ("model.dtype=float16x", 'did you mean "float16"'),
        ("model.digest=abc", "digest cannot be set"),
        ("scheme.weight.bits=nine", "bits: a number is expected"),
        ("scheme.weight.bits=9", "integers have 1 to 8 bits"),
        ("scheme.weight.group_size=0", "group_size 0"),
        ("inputs=full_precison", 'did you mean "full_precision"'),
        ("seed=-1", "seed: a whole number from 0"),
        ("scheme=full", "scheme full belongs to method none"),
        ("cluster.workers=two", "workers: a whole number is expected"),
        ("runs=a,b", "only axes of the grid take several values"),
        ("tracking.uir=x", 'did you mean "uri"'),
        ("data.root=/nowhere/at/all", "/nowhere/at/all is not a folder"),
        ("data.rot=x", 'did you mean "data.root"'),
        ("evaluations.limit=0", "limit: a whole number from 1"),
        ("evaluations.demo_perplexity.lenght=3", 'did you mean "length"'),
        ("evaluations.demo_facts.task=x", 'no evaluation "demo_facts"'),
        ("model=[", "override model=[: unbalanced bracket"),
        ("method=", "no value; `harness list methods`"),
        ("~model", "nothing can be deleted"),
    ],
)
def test_a_wrong_override_is_answered(override: str, expected: str) -> None:
    key = override.split("=")[0]
    grid = [*GRID, "method=gptq", "scheme=w4", "evaluations=demo_perplexity"]
    assert expected in problem(*(entry for entry in grid if entry.split("=")[0] != key), override)


@pytest.mark.parametrize(
    "override",
    [
        "method=gtpq",
        "scheme=w99x",
        "calibration.samples=0",
        "cluster.workers=two",
        "rounding.damping_fraction=abc",
        "tracking.uir=x",
        "evaluations=[demo_perplexty]",
        "device=gpu",
    ],
)
def test_what_was_typed_is_blamed_and_not_the_file(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep("demo", ["method=gptq", override] if "method" not in override else [override])
    text = str(caught.value)
    assert f"override {override}: " in text and "demo.yaml" not in text, text


def test_what_stands_in_the_file_is_blamed_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: demo\nmethod: gtpq\nscheme: w4\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: no method \"gtpq\""):
        load_sweep(str(file), ["scheme=w3"])


def test_a_setting_that_may_be_null_takes_null_and_no_other_type() -> None:
    grid = [*GRID, "method=spqr", "scheme=w3g16"]
    (cell,) = quantized(
        load_sweep(None, [*grid, "rounding.outlier_threshold=null", "rounding.scale_bits=null"])
    )
    assert cell.method.rounding is not None
    assert (cell.method.rounding["outlier_threshold"], cell.method.rounding["scale_bits"]) == (
        None,
        None,
    )
    assert "damping_fraction: a number is expected, not None" in problem(
        *grid, "rounding.damping_fraction=null"
    )
    assert "outlier_threshold: a number is expected, not 'few'" in problem(
        *grid, "rounding.outlier_threshold=few"
    )
    # null unless set: the annotation says what it may be
    binary = [*GRID, "method=pb_llm", "scheme=w1.7"]
    (cell,) = quantized(load_sweep(None, [*binary, "rounding.low_fraction=0.5"]))
    assert cell.method.rounding is not None and cell.method.rounding["low_fraction"] == 0.5
    assert "low_fraction: a number is expected, not 'half'" in problem(
        *binary, "rounding.low_fraction=half"
    )


def test_what_a_grid_lacks_is_said() -> None:
    assert "no model; add model=<name>" in problem("method=rtn", "scheme=w4")
    assert "no method; add method=<name>" in problem("model=demo", "scheme=w4")
    assert "needs a scheme" in problem("model=demo", "method=rtn")
    assert "gptq (hessian) needs calibration data; add calibration=<name>" in problem(
        "model=demo", "method=gptq", "scheme=w4"
    )
    assert 'did you mean "demo"' in problem(name="dmo")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: demo\nmethod: [rtn\n", r"study\.yaml, line 3: not valid YAML"),
        ("model: demo\nmodel: other\n", "duplicate key"),
        (
            "model: !!python/object/apply:os.system ['true']\n",
            "line 1: not valid YAML: could not determine a constructor",
        ),
        ("- a\n- b\n", "a mapping is expected"),
        ("model: demo\ngrid: {method: rtn}\n", 'no key "grid"; did you mean "grids"'),
        ("model: demo\ngrids: {metod: rtn}\n", 'did you mean "method"'),
        (
            "model: demo\ngrids: {zip: {method: [rtn, gptq], scheme: [w4]}}\n",
            "paired axes differ in length: method 2, scheme 1",
        ),
        ("model: demo\ngrids: {method: [], scheme: [w4]}\n", "an axis without values"),
        (
            "model: demo\nmethod: rtn\nscheme: w4\nskip: [{method: rtn, reason: because}]\n",
            "every cell is skipped",
        ),
    ],
)
def test_a_wrong_sweep_file_is_answered(
    sweep_file: Callable[..., Sweep], text: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        sweep_file(text)


# --- what docs/sweeps.md shows -------------------------------------------------------------------------------------------------

DOCUMENT = (ROOT / "docs" / "sweeps.md").read_text()
COMMANDS = [
    line.partition(" #")[0] for line in DOCUMENT.splitlines() if line.startswith("harness run ")
]


def test_the_documented_sweep_resolves(sweep_file: Callable[..., Sweep]) -> None:
    sweep = sweep_file(DOCUMENT.split("```yaml\n")[1].split("```")[0])
    assert (
        sweep.title == "GPTQ and RTN on Llama 2 at 4 and 3 bits"
        and len(sweep.skips) == 2
        and len(sweep.cells) > 10
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_commands_resolve(command: str) -> None:
    words = shlex.split(command)[2:]
    name = None if "=" in words[0] else words.pop(0)
    assert load_sweep(name, words).cells


# --- where configs are found ---------------------------------------------------------------------------------------------------


def test_configs_of_ones_own_come_first_and_compose(tmp_path: Path) -> None:
    folder = tmp_path / "here" / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# Mine\ndefaults: [demo, _self_]\ndtype: bfloat16\n")
    (tmp_path / "here" / "sweeps").mkdir()
    (tmp_path / "here" / "sweeps" / "study.yaml").write_text(
        "# My study\nmodel: mine\nmethod: none\n"
    )
    assert ("mine", "Mine") in [(entry.name, entry.title) for entry in list_names("models")]
    assert ("study", "My study") in [(entry.name, entry.title) for entry in list_names("sweeps")]
    (cell,) = load_sweep("study").cells
    assert (cell.model.name, cell.model.source, cell.model.dtype) == ("mine", "demo", "bfloat16")


def test_an_installed_package_carries_its_configs(tmp_path: Path) -> None:
    """The layout of a wheel: conf/ and sweeps/ inside the package, no checkout around it."""
    package = tmp_path / "site" / "harness"
    shutil.copytree(ROOT / "harness", package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("conf", "sweeps"):
        shutil.copytree(ROOT / folder, package / folder)
    imports = "from harness.config.grid import load_sweep; from harness.config.locations import list_names"
    code = f"{imports}; s = load_sweep('demo'); print(s.path, len(s.cells), len(list_names('methods')))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    path, cells, methods = ran.stdout.rsplit(maxsplit=2)
    assert Path(path) == package / "sweeps" / "demo.yaml" and int(cells) >= 16 and int(methods) >= 4


def test_a_benchmark_of_ones_own_is_its_wording_and_its_code(tmp_path: Path) -> None:
    def data_digest(wording: str, code: str, place: str) -> str:
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "own.yaml").write_text(f"task: own\ninclude: base.yaml\ndoc_to_text: {wording}\n")
        (folder / "base.yaml").write_text(
            "dataset_path: json\nprocess_results: !function marks.right\n"
        )
        (folder / "marks.py").write_text(code)
        return evaluations.task_digest(
            task_files.members("own", str(folder)), {"include": str(folder)}
        )

    first = data_digest("Q", "right = len", "study/tasks")
    assert data_digest("Q", "right = len", "study/moved") == first
    assert (
        data_digest("Question", "right = len", "study/tasks")
        != first
        != data_digest("Q", "right = max", "study/tasks")
    )
    assert data_digest("Q", "right = len", "lm_eval/tasks") == first, (
        "a folder of lm-eval's name is not lm-eval's"
    )
    assert data_digest("Question", "right = len", "lm_eval/tasks") != first


def test_static_scales_of_named_layers_need_calibration(tmp_path: Path) -> None:
    (tmp_path / "here" / "conf" / "scheme").mkdir(parents=True)
    (tmp_path / "here" / "conf" / "scheme" / "down_static.yaml").write_text(
        "weight: {bits: 8}\nactivation: {bits: 8}\n"
        "overrides: [{linears: [down_proj], activation: {granularity: tensor, dynamic: false}}]\n"
    )
    (cell,) = quantized(load_sweep(None, [*GRID, "method=rtn", "scheme=down_static"]))
    assert cell.calibration is not None
    assert "a scheme with static scales needs calibration" in problem(
        "model=demo", "method=rtn", "scheme=down_static"
    )


def test_names_are_listed_without_hydra() -> None:
    code = "import sys; from harness.config.locations import list_names; list_names('methods');"
    code += " sys.exit(bool({'hydra', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_thousand_cells_compose_each_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: Counter[str] = Counter()
    real_compose, real_hydra = yaml_files.compose, yaml_files.compose_with_hydra

    def compose(group: str, name: str, where: str = "") -> dict[str, object]:
        composed[f"{group}/{name}"] += 1
        return real_compose(group, name, where)

    def hydra(root: Path, name: str, overrides: list[str]) -> dict[str, object]:
        composed[name] += 1
        return real_hydra(root, name, overrides)

    monkeypatch.setattr(context, "compose", compose)
    monkeypatch.setattr(runtime, "compose_with_hydra", hydra)
    sweep = load_sweep(
        None, [*GRID, "method=gptq,awq", "scheme=glob(w*)", "seed=range(0,25)", "evaluations=demo"]
    )
    assert len(sweep.cells) > 1000
    assert max(composed.values()) == 1 and composed["config"] == 1
    assert len({cell_key(cell) for cell in sweep.cells}) == len(sweep.cells)


def test_models_that_a_table_names_must_be_in_the_sweep(tmp_path: Path) -> None:
    text = """
model: demo
method: rtn
scheme: w4
evaluations: [demo_perplexity]
tables: [{name: t, models: [demoo], columns: [{metric: demo_perplexity/perplexity, title: ppl, model: dmo}]}]
"""
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        grid_module.load_sweep(str(path))
    for part in (
        'no model "demoo"; did you mean "demo"',
        'no model "dmo"; did you mean "demo"',
        "tables[0]",
    ):
        assert part in str(error.value)
    # narrowed: the file's table stays, with gaps
    assert grid_module.load_sweep(str(path), ["model=demo_weight_outliers"]).tables


def test_two_evaluations_must_not_report_under_one_name() -> None:
    said = problem("model=demo", "method=rtn", "scheme=w4", "evaluations=[mmlu,mmlu_zeroshot]")
    assert "evaluations mmlu and mmlu_zeroshot both report mmlu_" in said and "two sweeps" in said
    assert load_sweep(
        None, ["model=demo", "method=rtn", "scheme=w4", "evaluations=[mmlu,arc_easy]"]
    ).cells


# --- names of before -----------------------------------------------------------------------------------------------------------


def test_old_names_of_methods_are_read_and_the_new_one_is_said(
    sweep_file: Callable[..., Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    renamed._announce.cache_clear()
    text = """
model: demo
grids: {method: [rtn, keep], scheme: [w8a8, w4a8]}
skip: [{method: keep, scheme: w4a8, reason: once is enough}]
first: [{method: keep}]
evaluations: [demo_perplexity]
tables: [{name: t, methods: {keep: weights as they are}, columns: [demo_perplexity/perplexity]}]
findings: [{text: t, table: t, column: demo_perplexity/perplexity, better: [{method: keep}, {method: rtn}]}]
"""
    old = sweep_file(text)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and '"keep"' in said[0] and '"activation_only"' in said[0]
    new = sweep_file(text.replace("keep", "activation_only"))
    assert (old.cells, old.skips, old.first) == (new.cells, new.skips, new.first)
    assert (old.tables, old.findings) == (new.tables, new.findings)
    assert not capsys.readouterr().err
    grid = ["model=demo", "scheme=w8a8"]
    (cell,) = quantized(load_sweep(None, [*grid, "method=keep"]))
    assert cell.method.name == "activation_only" and cell.method.rounding is not None
    assert cell.method.rounding.name == "keep"
    recorded = dataclasses.replace(cell, method=dataclasses.replace(cell.method, name="keep"))
    assert command_for(recorded) == "harness run model=demo method=activation_only scheme=w8a8"


def test_a_file_of_ones_own_may_have_an_old_name(tmp_path: Path) -> None:
    folder = tmp_path / "here" / "conf" / "method"
    folder.mkdir(parents=True)
    (folder / "keep.yaml").write_text("# Mine\nrounding: rtn\n")
    (cell,) = quantized(load_sweep(None, ["model=demo", "scheme=w4", "method=keep"]))
    assert cell.method.name == "keep"


def test_old_keys_are_read_and_the_new_one_is_said(
    sweep_file: Callable[..., Sweep],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(renamed.KEYS, "corpus", "calibration")
    old = sweep_file("model: demo\nmethod: gptq\nscheme: w4\ncorpus: demo\ncorpus.samples: 8\n")
    new = sweep_file(
        "model: demo\nmethod: gptq\nscheme: w4\ncalibration: demo\n", "corpus.samples=8"
    )
    assert old.cells == new.cells and quantized(new)[0].calibration is not None
    assert '"corpus.samples" is now called "calibration.samples"' in capsys.readouterr().err


# --- messages that help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, facts",
    [
        ("+model=модель/ёж", ["quotes", "+model='модель/ёж'"]),
        ("model=demo,ж", ["quotes", "model=demo,'ж'"]),
        ("evaluations=[demo,ё]", ["quotes", "evaluations=[demo,'ё']"]),
        ("model=[demo", ["unbalanced bracket", "]"]),
        ("model=demo)", ["unbalanced bracket", "("]),
        ("model", ["KEY=VALUE"]),
        ("model=demo,", ["last comma"]),
        ("model='a", ["quotes"]),
    ],
)
def test_an_unreadable_override_is_answered_in_plain_words(override: str, facts: list[str]) -> None:
    said = problem("method=rtn", "scheme=w4", override)
    for fact in facts:
        assert fact in said
    for word in ("token", "viable", "mismatched", "extraneous", "EOF"):
        assert word not in said


def test_what_the_message_says_to_type_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "here" / "модель"
    shutil.copytree(PACKAGE / "data" / "demo" / "model", folder / "ёж")
    said = problem("+model=модель/ёж", "method=none")
    (word,) = shlex.split(said.partition("write ")[2].splitlines()[0])
    (cell,) = load_sweep(None, [word, "method=none"]).cells
    assert cell.model.name == "ёж"


def test_of_many_names_the_nearest_three_are_said_and_the_command_that_lists_all() -> None:
    said = problem("model=demo", "method=rtn", "scheme=w4gq128")
    assert 'did you mean "w4g128"' in said and "`harness list schemes` lists all" in said
    assert len(said) < 400


def test_grids_without_a_file_have_names_of_their_own() -> None:
    def name(*overrides: str) -> str:
        return load_sweep(None, [*GRID, *overrides]).name

    first = name("method=rtn,gptq", "scheme=w4,w3")
    assert first.startswith("demo-rtn-gptq-w4-w3-")
    assert first == name("scheme=w3,w4", "method=gptq,rtn", "device=cpu").replace(
        "gptq-rtn-w3-w4", "rtn-gptq-w4-w3"
    ), "the digest is that of the cells in any order"
    assert first == name("method=rtn,gptq", "scheme=w4,w3", "evaluations=demo", "cluster=local")
    others = {name("method=rtn", "scheme=w4"), name("method=rtn", "scheme=w3")}
    others |= {name("method=gptq", "scheme=w4", f"seed={seed}") for seed in (0, 1)}
    assert len(others) == 4
    long = name("method=rtn", "scheme=w2,w3,w4,w5,w6,w7,w8,w2g16,w3g16,w4g16,w5g16,w6g16,w7g16")
    assert len(long) < 64 and all(each.isascii() and "/" not in each for each in (long, *others))


def test_a_task_that_does_not_use_the_given_data_root_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "here" / "conf" / "evaluation"
    folder.mkdir(parents=True)
    task = "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
    (tmp_path / "here" / "tasks").mkdir()
    (tmp_path / "here" / "tasks" / "mine.yaml").write_text(task)
    text = "# Mine\nevaluator: lm_eval_tasks\nsettings: {task: mine, include: tasks}\n"
    (folder / "mine.yaml").write_text(text)
    grid = ["model=demo", "method=none", "evaluations=mine", f"data.root={tmp_path}"]
    assert "`local: {data_root:" in problem(*grid)
    (folder / "mine.yaml").write_text(text + 'local: {data_root: "{root}"}\n')
    assert load_sweep(None, grid).cells
