"""Where the installed package lies; its data files are found from here, wherever the module that asks lies."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
