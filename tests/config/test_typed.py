"""Limits stand beside the fields; a wrong value is answered with its dotted path, all wrong values at once."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path

import pytest

from harness.config.typed import Problems, checked_settings, settings_of, typed, types_of
from harness.core import plugins
from harness.core.cell import Calibration, ScaleType, Scheme, WeightScheme, to_json
from harness.core.errors import ConfigError
from harness.core.number_formats import DOUBLE_QUANTIZED, FORMATS, SCALE_TYPES
from harness.core.sweep import Runtime

ROOT = Path(__file__).resolve().parents[2]


def test_every_wrong_field_is_said_with_its_dotted_path() -> None:
    problems = Problems()
    content = {
        "name": "w4",
        "weight": {"bits": "four", "bit": 4, "scale_dtype": "float15", "symmetric": 1},
        "activation": {"bits": 1, "granularity": "tokens"},
        "kv": 4,
        "overrides": [{"weight": {}}],
    }
    assert typed(Scheme, content, "w4.yaml", problems) is None
    found = list(problems.found)
    for said in (
        "w4.yaml: weight.bits: a number is expected, not 'four'",
        'w4.yaml: weight: no field "bit"; did you mean "bits"',
        'w4.yaml: weight: no scale_dtype "float15"; did you mean "float16"',
        "w4.yaml: weight.symmetric: true or false is expected, not 1",
        "w4.yaml: activation.bits: 1 is below 2",
        'w4.yaml: activation: no granularity "tokens"; did you mean "token"',
        "w4.yaml: kv: a mapping is expected, not 4",
        "w4.yaml: overrides[0]: linears is missing",
    ):
        assert sum(each.startswith(said) for each in found) == 1, (said, found)
    assert len(found) == 8


def test_values_keep_the_type_that_keys_hash() -> None:
    problems = Problems()
    scheme = typed(
        Scheme,
        {
            "name": "w4",
            "weight": {"bits": 4.0},
            "overrides": {"linears": "q_proj", "weight": {"bits": 8}},
        },
        "w4.yaml",
        problems,
    )
    assert scheme is not None and not problems.found
    assert scheme == Scheme("w4", WeightScheme(bits=4), overrides=scheme.overrides)
    assert repr(to_json(scheme)["weight"]["bits"]) == "4"
    assert scheme.overrides[0].linears == ("q_proj",) and dict(scheme.overrides[0].weight) == {
        "bits": 8
    }
    assert typed(Calibration, {"name": "a", "source": "b", "samples": True}, "x", problems) is None
    runtime = typed(Runtime, {"runs": "runs", "cluster": {"settings": {"a": 1}}}, "x", Problems())
    assert (
        runtime is not None
        and runtime.runs == Path("runs")
        and runtime.cluster.settings == {"a": 1}
    )


def test_types_of_scales_are_those_of_the_number_formats() -> None:
    fixed = {format_.scale_dtype for format_ in FORMATS.values()} - {None}
    assert set(typing.get_args(ScaleType)) == {*SCALE_TYPES, DOUBLE_QUANTIZED, *fixed}


def test_settings_of_a_plugin_state_their_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mine.py").write_text(
        '''"""Mine."""
class Rounding:
    @dataclass(frozen=True)
    class Settings:
        steps: Annotated[int, Ge(1)] = 3
        rate: float = 1.0
        order: Literal["row", "column"] = "row"
        layers: "tuple[int, ...]" = ()
        other: Unknown = "text"
        limit: float | None = None
'''
    )
    monkeypatch.setenv("HARNESS_PLUGINS", str(tmp_path))
    plugins.find.cache_clear()
    try:
        known, types = settings_of("rounding", "mine"), types_of("rounding", "mine")
    finally:
        monkeypatch.undo()
        plugins.find.cache_clear()
    given = {"steps": 5, "rate": 2, "layers": [1, 2], "limit": 1}
    checked = checked_settings(known, given, "mine.yaml", types)
    assert repr(checked["rate"]) == "2.0" and repr(checked["limit"]) == "1"
    assert checked["layers"] == (1, 2) and checked["order"] == "row"
    wrong = {"steps": 0, "rate": "x", "order": "rows", "layers": ["a"], "other": 1, "stpes": 1}
    with pytest.raises(ConfigError) as caught:
        checked_settings(known, wrong, "mine.yaml", types)
    for said in (
        "mine.yaml: steps: 0 is below 1",
        "mine.yaml: rate: a number is expected, not 'x'",
        'no order "rows"; did you mean "row"',
        "mine.yaml: layers[0]: a whole number is expected, not 'a'",
        "mine.yaml: other: text is expected, not 1",
        'no setting "stpes"; did you mean "steps"',
    ):
        assert said in str(caught.value)


def test_names_are_listed_without_pydantic() -> None:
    code = "import sys, harness.cli.commands; from harness.config.locations import list_names; list_names('methods');"
    code += " sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
