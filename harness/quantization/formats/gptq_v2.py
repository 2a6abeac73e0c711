"""GPTQ's layout, version 2: that of `formats/gptq.py`, with zero points stored as they are, so that 0 is allowed.

vLLM, SGLang and GPTQModel tell the versions apart by `checkpoint_format: gptq_v2`; older kernels read every file as version 1.
"""

from __future__ import annotations

from harness.quantization.formats import gptq


class Layout(gptq.Layout):
    """GPTQ, version 2."""

    checkpoint_format = "gptq_v2"
    subtracted = 0
