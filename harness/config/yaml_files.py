"""Reading YAML files, alone or composed by Hydra; errors name file and line. The importer of Hydra and OmegaConf."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config.locations import config_files, config_roots, unknown_config
from harness.core.errors import ConfigError


def compose(group: str, name: str, where: str = "") -> dict[str, Any]:
    """One YAML of conf/, its `defaults` composed by Hydra, interpolations resolved. Raises ConfigError naming file and line.

    where: the file or command that requested it, for the error message.
    """
    path = config_files(group).get(name)
    if path is None:
        raise ConfigError(unknown_config(group, name, where))
    if re.search(r"^(defaults:|# @package)", read_text(path), re.MULTILINE):
        return _mapping(
            compose_with_hydra(path.parent.parent, f"{group}/{name}", ()).get(group), path
        )
    return read_yaml(path, group)


def compose_with_hydra(root: Path, config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A config composed by Hydra, interpolations resolved. Raises ConfigError naming the file."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    others = ",".join(f"'file://{other}'" for other in config_roots() if other != root)
    where = root / f"{config_name}.yaml"
    try:
        with initialize_config_dir(str(root), job_name="harness", version_base="1.3"):
            composed = hydra_compose(
                config_name, overrides=[f"hydra.searchpath=[{others}]", *overrides]
            )
            resolved = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error
    except YAMLError as error:
        raise ConfigError(_yaml_problem(where, error)) from error
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from error
    return typing.cast(dict[str, Any], resolved)


def read_yaml(path: Path, package: str | None = None) -> dict[str, Any]:
    """A YAML file without composition, interpolations resolved; tags and repeated keys are errors.

    Raises ConfigError naming file and line.

    package: the group under which Hydra would place it, so that ${model.source} in a file of model/ means the same.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.create(read_text(path))
        if package is None:
            content = OmegaConf.to_container(config, resolve=True)
        else:
            content = OmegaConf.to_container(
                OmegaConf.create({package: config}).get(package), resolve=True
            )
    except YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    return _mapping(content, path)


def _mapping(content: Any, path: Path) -> dict[str, Any]:
    """The mapping that a file holds; an empty file holds an empty one."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping is expected")
    return {str(key): value for key, value in content.items()}


def read_text(path: Path) -> str:
    """The text of a file. Raises ConfigError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _yaml_problem(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    return f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or one_line(error)}"


def one_line(error: Exception) -> str:
    """The message of an error on one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
