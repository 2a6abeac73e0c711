"""Schemes by name: what "w4g128a8kv4" and "mxfp4" mean, and the check of a scheme's overrides."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from harness.config.context import Context, Fields, checked, composed, varied
from harness.config.locations import config_files, unknown_config
from harness.config.typed import Problems, set_nested, typed
from harness.core.cell import ActivationScheme, Override, Scheme, WeightScheme
from harness.core.errors import ConfigError
from harness.core.labels import with_settings
from harness.core.number_formats import FORMATS, SHORT_NAMES

# percent pruned, or n kept of every m inputs
SPARSITY = r"(?:s(?:(?P<kept>[1-9]\d*)of(?P<of>[1-9]\d*)|(?P<percent>[1-9]\d?)))?"
SCHEME_NAME = re.compile(
    r"w(?P<weight>[2-8]|16(?=s\d))(?:g(?P<group>[1-9]\d*))?(?P<symmetric>sym|signed)?"
    rf"{SPARSITY}(?:a(?P<activation>[2-8]))?(?:kv(?P<kv>[2-8]))?"
)
FORMAT_NAME = re.compile(
    rf"(?P<format>{'|'.join(sorted({*FORMATS, *SHORT_NAMES}, key=len, reverse=True))})"
    rf"(?:g(?P<group>[1-9]\d*))?{SPARSITY}(?:a(?P<activation>[2-8]))?(?:kv(?P<kv>[2-8]))?"
)
DELTA_NAME = re.compile(r"delta(?P<part>[1-9]\d*)(?:g(?P<group>[1-9]\d*))?")
NAMED_SCHEMES = (
    "w<bits>[g<group>][sym|signed][s<percent>|s<n>of<m>][a<bits>][kv<bits>] (w4g128, w4s2of4), bits 2 to 8, "
    "<format>[g<group>][a<bits>][kv<bits>] (mxfp4, fp8), or delta<part of 16 bits>[g<group>] (delta16)"
)


def scheme_by_name(name: str, where: str) -> dict[str, Any]:
    """The mapping of a scheme whose name states its format, such as "w4g128a8". Raises ConfigError for any other name."""
    if (delta := DELTA_NAME.fullmatch(name)) is not None:
        part, group = int(delta["part"]), int(delta["group"] or 128)
        bits = 16 // part if 16 % part == 0 else 16 / part  # keys hold whole numbers as such
        return {"weight": {"format": "delta", "bits": bits, "group_size": group}}
    match = SCHEME_NAME.fullmatch(name) or FORMAT_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(unknown_config("scheme", name, where) + f" Also {NAMED_SCHEMES}.")
    weight: dict[str, Any]
    if match.re is FORMAT_NAME:
        format_ = SHORT_NAMES.get(match["format"], match["format"])
        fixed = FORMATS[format_]
        group = int(match["group"] or fixed.block or fixed.usual_block)
        weight = {
            "format": format_,
            "bits": fixed.bits,
            "group_size": group,
            "scale_dtype": fixed.scale_dtype or "float32",
        }
    else:
        weight = {
            "bits": int(match["weight"]),
            "group_size": int(match["group"] or -1),
            "symmetric": bool(match["symmetric"]),
            "signed_scales": match["symmetric"] == "signed",
        }
        if match["weight"] == "16":  # not rounded: survivors have the type of dense weights
            weight |= {"format": "dense", "scale_dtype": "float16"}
    if match["percent"]:
        weight["sparsity"] = f"{int(match['percent']) / 100:g}"
    elif match["kept"]:
        weight["sparsity"] = f"{match['kept']}:{match['of']}"
    activation = {"bits": int(match["activation"])} if match["activation"] else None
    kv = {"bits": int(match["kv"])} if match["kv"] else None
    return {"weight": weight, "activation": activation, "kv": kv}


def checked_override(override: Override, scheme: Scheme, where: str) -> Override:
    """An override of a scheme, its fields checked. Raises ConfigError with every problem."""
    problems = Problems()
    typed(WeightScheme, dict(override.weight), f"{where}: overrides: weight", problems)
    typed(ActivationScheme, dict(override.activation), f"{where}: overrides: activation", problems)
    if override.activation and scheme.activation is None:
        problems.add(
            f"{where}: overrides: activation: the scheme rounds no activations, so there is nothing to override"
        )
    if not override.linears:
        problems.add(f"{where}: overrides: linears: at least one name is expected")
    if problems.found:
        raise ConfigError("\n".join(problems.found))
    return override


def read_scheme(context: Context, name: str, fields: Fields) -> Scheme:
    """The scheme of a name (of conf/scheme/ or NAMED_SCHEMES) with edited fields. Raises ConfigError with every problem."""
    if name in config_files("scheme"):
        content, where = composed(context, "scheme", name), str(config_files("scheme")[name])
    else:
        content, where = scheme_by_name(name, context.file.where), f"scheme {name}"
    for key, value, _ in fields:
        set_nested(content, key, value)
    _write_sparsity_as_text(content)
    scheme = checked(Scheme, {"name": name, **content}, where)
    scheme = dataclasses.replace(
        scheme, overrides=tuple(checked_override(o, scheme, where) for o in scheme.overrides)
    )
    named = [dataclasses.replace(scheme.weight, **dict(o.weight)) for o in scheme.overrides]
    wrong = [reason for weight in (scheme.weight, *named) for reason in weight.contradictions()]
    if wrong:
        raise ConfigError("\n".join(f"{where}: weight.{reason}" for reason in dict.fromkeys(wrong)))
    return dataclasses.replace(scheme, name=with_settings(name, varied(fields)))


def _write_sparsity_as_text(content: dict[str, Any]) -> None:
    """`sparsity: 0.5` means "0.5", in place; keys hold the text."""
    overrides = content.get("overrides")
    parts = [content, *(overrides if isinstance(overrides, list) else ())]
    for part in parts:
        weight = part.get("weight") if isinstance(part, dict) else None
        value = weight.get("sparsity") if isinstance(weight, dict) else None
        if isinstance(value, float) and isinstance(weight, dict):
            weight["sparsity"] = f"{value:g}"
