"""Names of schemes that prune, and the same fields in YAML and overrides."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config.grid import load_sweep
from harness.core.cell import WeightScheme, quantize_key, weight_identity
from harness.core.errors import ConfigError

QUIET = ("model=demo", "method=magnitude", "evaluations=[]", "tracking=none")

NAMES: dict[str, dict[str, Any]] = {
    "w4s50": {"bits": 4, "sparsity": "0.5"},
    "w4g128s5": {"bits": 4, "group_size": 128, "sparsity": "0.05"},
    "w3g16syms4of8": {"bits": 3, "group_size": 16, "symmetric": True, "sparsity": "4:8"},
    "w16s2of4": {"format": "dense", "bits": 16, "scale_dtype": "float16", "sparsity": "2:4"},
    "w16s67a8kv4": {"format": "dense", "bits": 16, "scale_dtype": "float16", "sparsity": "0.67"},
    "mxfp4s50": {
        "format": "mxfp4",
        "bits": 4,
        "group_size": 32,
        "scale_dtype": "e8m0",
        "sparsity": "0.5",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_states_the_sparsity(name: str) -> None:
    (cell,) = load_sweep(None, [*QUIET, f"scheme={name}", "baseline=false"]).cells
    assert cell.scheme.weight == WeightScheme(**NAMES[name])
    assert (cell.scheme.activation is not None) == ("a8" in name)


@pytest.mark.parametrize("name", ["w16", "w4s0", "w4s100", "w4s", "w16g32", "w4s2of"])
def test_other_names_are_no_sparsity(name: str) -> None:
    if name == "w16":  # a file of conf/scheme
        (cell,) = load_sweep(None, [*QUIET, "scheme=w16", "baseline=false"]).cells
        assert cell.scheme.weight.sparsity == ""
        return
    with pytest.raises(ConfigError, match="scheme"):
        load_sweep(None, [*QUIET, f"scheme={name}"])


def test_a_number_and_a_text_are_one_sparsity() -> None:
    keys = set()
    for value in ("0.5", "'0.5'"):
        override = f"scheme.weight.sparsity={value}"
        (cell,) = load_sweep(None, [*QUIET, "scheme=w4", override, "baseline=false"]).cells
        keys.add(quantize_key(cell))
    named = load_sweep(None, [*QUIET, "scheme=w4s50", "baseline=false"]).cells
    assert keys == {quantize_key(named[0])}


@pytest.mark.parametrize("value", ["1.5", "'4:4'", "half"])
def test_a_sparsity_that_is_none_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"weight\.sparsity"):
        load_sweep(None, [*QUIET, "scheme=w4", f"scheme.weight.sparsity={value}"])


def test_dense_schemes_have_the_identity_that_they_had() -> None:
    assert "sparsity" not in weight_identity(WeightScheme())
    assert weight_identity(WeightScheme(sparsity="2:4"))["sparsity"] == "2:4"
