"""One cell by llm-compressor, from files to files: `python llm_compressor.py MODEL TOKENS OUTPUT METHOD`; prints JSON.

METHOD is gptq or rtn: 4 bits, asymmetric, groups of 128. TOKENS is a safetensors file with `tokens` [windows, length]. Runs in the
environment that `compare.py` makes; this project is not importable there. Imports are not timed.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SCHEME = {
    "cell": {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": 128,
        },
    }
}


def main() -> None:
    folder, tokens, output, method = sys.argv[1:]
    torch.set_num_threads(1)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    processor = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
    cpu, wall = time.process_time(), time.monotonic()
    windows = load_file(tokens)["tokens"]
    modifier = (GPTQModifier if method == "gptq" else QuantizationModifier)(
        config_groups=SCHEME, ignore=["lm_head"]
    )
    more = {}
    if method == "gptq":
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
        more = {
            "dataset": torch.utils.data.DataLoader(rows, batch_size=1),
            "num_calibration_samples": len(rows),
            "max_seq_length": windows.shape[1],
            "processor": processor,
        }
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(folder),
        recipe=modifier,
        output_dir=output,
        save_compressed=True,
        **more,
    )
    print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}))


if __name__ == "__main__":
    main()
