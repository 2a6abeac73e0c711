"""Random generators seeded by cell, block and linear."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, block: int, name: str) -> torch.Generator:
    """The randomness of one cell, block and linear: the same in any order of execution, on any device (it lives on the CPU)."""
    value = hashlib.sha256(f"{seed}/{block}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8], "little") & (2**63 - 1))
