"""Where the installed package and its data files lie, whichever module asks."""

from __future__ import annotations

from pathlib import Path

from harness.core.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def project_folder() -> Path:
    """The folder with the project's conf/ and sweeps/: the package of an installation, or the checkout around it."""
    for folder in (PACKAGE, PACKAGE.parent):
        if (folder / "conf" / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"the harness's conf/ is neither beside nor inside {PACKAGE}: the installation is incomplete"
    )


def published_folders(sweep_file: Path | None = None) -> list[Path]:
    """Folders of published tables by precedence: beside the sweep's file, below the working directory, the project's."""
    own = [] if sweep_file is None else [sweep_file.parent]
    return [place / "published" for place in (*own, Path("sweeps"), project_folder() / "sweeps")]
