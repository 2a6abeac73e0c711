"""What a model costs to run: bytes as stored and as loaded, peak memory, time to the first token, decoding speed.

Prompts of `prompt_tokens` random tokens, then exactly `new_tokens` greedy ones with a key-value cache, `batch` sequences at once.
One warm-up, then `repeats` measured runs with the device synchronised around each part; the median is the value, the whole range
is in the details. The prompt (prefill) and the tokens after it (decode) are timed apart.

With the setting `kernel` the model is loaded a second time with the kernels of `inference.kernels` ("any": the first that holds
each matrix exactly; a name: that one), and the two models run in turn: the values are those of the kernels,
`details["ratio_to_dense"]` is their decoding speed over that of dequantized matrices in the same process. A ratio below 1 stands
there too. A cell that no kernel holds exactly fails with each kernel's reasons.

`details["execution"]` is "real" for a full-precision model, "real:int4pack" where every quantized matrix is multiplied by that
kernel, and "simulated" wherever quantized weights are computed with in their floating-point form, or activations or the cache are
rounded and then multiplied as floats: such a speed is at best that of 16 bits and says nothing of a kernel for the format. The
stored size does not depend on that. On a CPU the peak memory is that of the process since it began.

The scheduler gives the device to this evaluation alone, and that is checked: another process on a card fails it, before or after
the runs. Of a processor the share that others had stands in `details["others"]`, and `details["alone"]` is false above a tenth.
Energy is there where the device reports it (`meters`): on a processor that of the whole package.
"""

from __future__ import annotations

import collections
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.core.cell import Cell, Evaluation, Model
from harness.core.errors import EvaluationError, unknown_name
from harness.core.events import Progress
from harness.evaluation import meters
from harness.evaluation.protocols import Score, Subject, model_context_length
from harness.quantization.inference import kernels
from harness.quantization.inference.linear import QuantizedLinear

ANY_KERNEL = "any"
MOST_OTHERS = 0.1  # of a processor's time that other processes may have had


@dataclass(frozen=True)
class Timing:
    """Seconds of one run. prefill: until the first token is known; decode: the new_tokens - 1 tokens after it."""

    prefill: float
    decode: float


class Evaluator:
    """Size and speed of one model."""

    version = 1
    settings_added_later = ("kernel",)  # keys leave it out while it is off
    exclusive = True  # of its device: nothing else may run there meanwhile
    metrics: ClassVar[dict[str, dict[str, Any]]] = {
        "prefill_seconds": {"higher_is_better": False, "unit": "seconds to the first token"},
        "decode_tokens_per_second": {
            "higher_is_better": True,
            "unit": "tokens per second, all sequences",
        },
        "tokens_per_second": {
            "higher_is_better": True,
            "unit": "new tokens per second, prefill included",
        },
        "peak_memory_bytes": {"higher_is_better": False, "unit": "bytes"},
        "loaded_bytes": {"higher_is_better": False, "unit": "bytes"},
        "stored_bytes": {"higher_is_better": False, "unit": "bytes"},
        "joules_per_token": {
            "higher_is_better": False,
            "unit": "joules per new token, prefill included",
        },
    }

    @dataclass(frozen=True)
    class Settings:
        """Lengths in tokens; batch: sequences at once; repeats: measured runs after `warmup` others.

        kernel: "" (dequantized matrices), "any", or the name of a kernel of `inference.kernels`.
        """

        prompt_tokens: int = 256
        new_tokens: int = 512
        batch: int = 1
        repeats: int = 3
        warmup: int = 1
        kernel: str = ""

        def __post_init__(self) -> None:
            least = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "repeats": 3, "warmup": 1}
            problems = [
                f"{name}={getattr(self, name)}: at least {low}"
                for name, low in least.items()
                if getattr(self, name) < low
            ]
            if self.kernel not in ("", ANY_KERNEL, *kernels.ORDER):
                problems.append(unknown_name("kernel", self.kernel, (ANY_KERNEL, *kernels.ORDER)))
            if problems:
                raise ValueError("; ".join(problems))

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, evaluation: Evaluation, model: Model) -> list[str]:
        context = model_context_length(model)
        length = self.settings.prompt_tokens + self.settings.new_tokens
        if context is None or length <= context:
            return []
        return [
            f"{self.settings.prompt_tokens} + {self.settings.new_tokens} tokens, but {model.name} was made for "
            f"{context}; lower prompt_tokens or new_tokens"
        ]

    def score(self, subject: Subject, evaluation: Evaluation) -> Iterator[Progress | Score]:
        settings = self.settings
        runs = settings.warmup + settings.repeats
        generator = torch.Generator().manual_seed(0)
        model: Any = subject.model
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        prompts = torch.randint(
            0, vocabulary, (settings.batch, settings.prompt_tokens), generator=generator
        ).to(subject.device)
        if torch.device(subject.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(subject.device)
        timings, joules = [], []
        dense: list[Timing] = []
        if settings.kernel:
            assert subject.load_as is not None, (
                "an evaluation of kernels needs the cell's checkpoint"
            )
            asked = "" if settings.kernel == ANY_KERNEL else f":{settings.kernel}"
            model = subject.load_as(f"native{asked}")
        check_alone(subject.device)
        began = meters.ProcessorTime.now()
        yield subject.progress(evaluation, 0, runs)
        for run in range(runs):
            before = meters.energy_joules(subject.device)
            timing = generate(model, prompts, settings.new_tokens)
            after = meters.energy_joules(subject.device)
            other = (
                generate(subject.model, prompts, settings.new_tokens) if settings.kernel else None
            )
            if run >= settings.warmup:
                timings.append(timing)
                dense += [other] if other is not None else []
                joules.append(
                    after - before
                    if before is not None and after is not None and after > before
                    else None
                )
            yield subject.progress(evaluation, run + 1, runs)
        check_alone(subject.device)
        on_processor = torch.device(subject.device).type == "cpu"
        others = (
            meters.ProcessorTime.now().others_share(began)
            if on_processor
            else meters.other_processes(subject.device)
        )
        yield self._score(subject, evaluation, model, timings, dense, joules, others)

    def _score(
        self,
        subject: Subject,
        evaluation: Evaluation,
        model: nn.Module,
        timings: list[Timing],
        dense: list[Timing],
        joules: list[float | None],
        others: float | None,
    ) -> Score:
        settings = self.settings
        runs = {
            "prefill_seconds": [timing.prefill for timing in timings],
            "decode_tokens_per_second": [
                settings.batch * (settings.new_tokens - 1) / timing.decode for timing in timings
            ],
            "tokens_per_second": [
                settings.batch * settings.new_tokens / (timing.prefill + timing.decode)
                for timing in timings
            ],
        }
        used = [energy for energy in joules if energy is not None]
        if len(used) == len(timings):  # a counter that began anew meanwhile says nothing
            runs["joules_per_token"] = [
                energy / (settings.batch * settings.new_tokens) for energy in used
            ]
        values = {name: statistics.median(measured) for name, measured in runs.items()}
        values["peak_memory_bytes"] = float(meters.peak_memory_bytes(subject.device))
        values["loaded_bytes"] = float(loaded_bytes(model))
        if "stored_bytes" in subject.manifest:
            values["stored_bytes"] = float(subject.manifest["stored_bytes"])
        details = {
            **execution(subject.cell, model),
            "device": device_name(subject.device),
            "prompt_tokens": settings.prompt_tokens,
            "new_tokens": settings.new_tokens,
            "batch": settings.batch,
            "repeats": settings.repeats,
            "range": {name: [min(measured), max(measured)] for name, measured in runs.items()},
            "alone": None if others is None else others <= MOST_OTHERS,
            "others": others,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }
        if dense:
            decode = statistics.median(timing.decode for timing in timings)
            details["ratio_to_dense"] = statistics.median(t.decode for t in dense) / decode
        return Score(
            {f"{evaluation.name}/{name}": value for name, value in values.items()},
            {},
            None,
            details,
        )


def check_alone(device: str) -> None:
    """Raises EvaluationError where another process computes on the card."""
    others = meters.other_processes(device)
    if others:
        count = f"{others} other process{'es' if others > 1 else ''}"
        raise EvaluationError(
            f"{count} on {device_name(device)} ({device}): speed and memory are measured alone on a device; "
            "end them, or leave the evaluation out"
        )


@torch.inference_mode()
def generate(model: Any, prompts: Tensor, new_tokens: int) -> Timing:
    """Greedy decoding of exactly `new_tokens` tokens after prompts [batch, length], timed."""
    start = _now(prompts)
    output = model(input_ids=prompts, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    first = _now(prompts)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return Timing(first - start, _now(prompts) - first)


def is_full_precision(cell: Cell) -> bool:
    """True where nothing is quantized, so that a measured speed is the model's own."""
    return cell.method.is_baseline and cell.scheme.activation is None and cell.scheme.kv is None


def execution(cell: Cell, model: nn.Module) -> dict[str, Any]:
    """How a model's products are computed: execution, and where kernels run, kernels (name -> matrices, "dense" the others)."""
    if is_full_precision(cell):
        return {"execution": "real"}
    found = collections.Counter(
        module.kernel.name if module.kernel is not None else "dense"
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    )
    names = sorted(name for name in found if name != "dense")
    if not names or cell.scheme.kv is not None:
        return {"execution": "simulated"}
    kind = "partly" if found["dense"] else "real"
    return {"execution": f"{kind}:{'+'.join(names)}", "kernels": dict(sorted(found.items()))}


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers in memory, each storage counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def device_name(device: str) -> str:
    """The card's name, or "cpu" with the machine's architecture."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
