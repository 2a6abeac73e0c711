"""Benchmarks of EleutherAI's lm-evaluation-harness. The only importer of lm_eval.

A task is what its YAML says (`harness.data.task_files`): stock tasks, our own in `tasks/`, or those of a folder that the evaluation
includes. Its items come from the hub, or from <data_root>/tasks/<task>/<split>.jsonl, which then replaces the data set in memory:
nothing is written, and no split is read that has no file. Scores are lm-eval's own, computed by its `evaluate`; only what answers
the requests is ours (`scoring`), unless `scorer: lm_eval` asks for lm-eval's model.

Where we differ from `simple_evaluate`: log-probabilities are taken in float32 (lm-eval takes them in the dtype of the logits, so
that in bfloat16 many choices tie and the first one wins); standard errors of means have their closed form; a group's score is the
mean over its items, with the mean over its tasks beside it as `<metric>_macro`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from harness.core.cell import Evaluation, Model, digest
from harness.core.errors import DataError, EvaluationError, HarnessError, unknown_name
from harness.core.events import Progress
from harness.core.failures import is_out_of_memory
from harness.core.text import first_line, short_list
from harness.data import hub, json_lines, model_folders, task_files
from harness.data.task_files import LocalData, TaskFile
from harness.evaluation import generation, prefix_scoring, task_checks, task_problems
from harness.evaluation.protocols import Score, Subject, depends_on_company, model_context_length
from harness.evaluation.task_checks import LIKELIHOOD_TASKS
from harness.evaluation.task_problems import UNANSWERED
from harness.evaluation.windows import tokenizer_digest

SCORERS = ("auto", "shared_prefix", "lm_eval")
BOOTSTRAPS = 100  # resamples for standard errors that have no closed form
FEWSHOT_SEED = 1234  # simple_evaluate's default
NUMBER = (int, float, np.number)
KEPT = 32  # built tasks that stay in memory for the next cell
Pair = tuple[np.ndarray, np.ndarray]  # tokens of a context and of its continuation, int32


class Evaluator:
    """One task, or one group of tasks, of lm-eval."""

    version = 1
    without_yaml: ClassVar[dict[str, Any]] = {"lm_eval": ("task", {})}  # lm_eval:copa is that task
    settings_added_later = ("apply_chat_template",)  # keys leave it out while it is off
    # its `task` may be a group, whose members report metrics under their own names
    groups_tasks = True
    # its items are answers, comparable with those of the full-precision model
    compares_items = True
    metrics: ClassVar[dict[str, dict[str, Any]]] = {
        "acc": {"higher_is_better": True, "unit": "share of items"},
        "acc_norm": {"higher_is_better": True, "unit": "share of items"},
        "acc_macro": {"higher_is_better": True, "unit": "mean over tasks"},
        "exact_match": {"higher_is_better": True, "unit": "share of items"},
        "flips": {
            "higher_is_better": False,
            "unit": "share of items with another answer than full precision's",
        },
        "flips_lost": {
            "higher_is_better": False,
            "unit": "share of items right before and wrong now",
        },
        "flips_won": {
            "higher_is_better": None,
            "unit": "share of items wrong before and right now",
        },
        "choice_kl": {"higher_is_better": False, "unit": "nats per item"},
        "perplexity": {"higher_is_better": False, "unit": "per target"},
        "rouge1": {"higher_is_better": True, "unit": "F-measure"},
        "rouge2": {"higher_is_better": True, "unit": "F-measure"},
        "rougeL": {"higher_is_better": True, "unit": "F-measure"},
        "bleu": {"higher_is_better": True, "unit": "0 to 100"},
        "chrf": {"higher_is_better": True, "unit": "0 to 100"},
        "bias_ambiguous": {"higher_is_better": None, "unit": "-1 to 1, ideally 0"},
        "bias_disambiguated": {"higher_is_better": None, "unit": "-1 to 1, ideally 0"},
    }

    @dataclass(frozen=True)
    class Settings:
        """What is asked, and how.

        task           name of a task or group; include: where besides lm-eval it may be defined ("demo", or a folder of YAML files)
        num_fewshot    worked examples before each question; None: as the task's YAML says
        data_root      folder with tasks/<task>/<split>.jsonl in place of the hub; None: the task's own data set
        add_bos_token  begin-of-sequence token before each request; None: as the tokenizer does by itself
        apply_chat_template  put each question, with its worked examples as turns, into the tokenizer's chat template
        revisions      commits of the hub's data sets; a sweep fills in those of conf/data_sets.yaml, or what the branch stands for
        scorer         shared_prefix computes common prefixes once; lm_eval is lm-eval's own model; auto: the former where the
                       model allows it
        """

        task: str = ""
        include: str = ""
        num_fewshot: int | None = None
        data_root: str | None = None
        add_bos_token: bool | None = None
        apply_chat_template: bool = False
        revisions: dict[str, str] | None = None
        scorer: str = "auto"

        def __post_init__(self) -> None:
            if not self.task:
                raise ValueError("task: the name of an lm-eval task is missing")
            if self.scorer not in SCORERS:
                raise ValueError(unknown_name("scorer", self.scorer, SCORERS))
            if self.num_fewshot is not None and self.num_fewshot < 0:
                raise ValueError(f"num_fewshot={self.num_fewshot}: not negative")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, evaluation: Evaluation, model: Model) -> list[str]:
        try:
            tasks = task_files.members(self.settings.task, self.settings.include)
        except HarnessError as error:
            return [str(error)]
        settings, context = self.settings, model_context_length(model)
        # in order, each once: the 57 tasks of a group lack one data set
        reasons: dict[str, None] = {}
        for task in tasks:
            found = task_checks.refusals(
                task, settings.num_fewshot, settings.data_root, settings.revisions or {}, context
            )
            reasons |= dict.fromkeys(found)
        if self.settings.apply_chat_template and not hub.is_hub_id(model.source):
            # a model that cannot be read is refused under its own name
            with contextlib.suppress(HarnessError):
                if model_folders.lacks_chat_template(model_folders.model_folder(model)):
                    reasons[f"{model.name} has no chat template; set apply_chat_template=false"] = (
                        None
                    )
        return list(reasons)

    def score(self, subject: Subject, evaluation: Evaluation) -> Iterator[Progress | Score]:
        scorer = _scorer(self.settings, subject)
        language_model = _language_model(subject, self.settings)
        chat = _chat(self.settings, subject, language_model)
        built = _built(self.settings, evaluation.limit, evaluation.data_digest, chat)
        built.forget_answers()
        yield subject.progress(evaluation, 0, len(built.instances))
        done, truncated = 0, 0
        likelihoods = [
            instance for instance in built.instances if instance.request_type == "loglikelihood"
        ]
        if likelihoods:
            pairs = built.pairs(language_model, subject.model_folder, self.settings.add_bos_token)
            truncated = _check_lengths(likelihoods, pairs, language_model.max_length)
            language_model.encoded = {
                id(instance): pair for instance, pair in zip(likelihoods, pairs, strict=True)
            }
        if likelihoods and scorer == "shared_prefix":
            requests = [
                prefix_scoring.clip(context, continuation, language_model.max_length)
                for context, continuation in pairs
            ]
            tokens = _batch_tokens(subject, requests)
            for answers in prefix_scoring.scores(subject.model, requests, subject.device, tokens):
                language_model.answers |= {
                    id(likelihoods[index]): answer for index, answer in answers.items()
                }
                done += len(answers)
                if done < len(built.instances):
                    yield subject.progress(evaluation, done, len(built.instances))
        results, warnings = _evaluate(language_model, built.tasks, evaluation.limit)
        yield subject.progress(evaluation, len(built.instances), len(built.instances))
        details = {
            "scorer": scorer,
            "batch_size": language_model.batch_size,
            "context_length": language_model.max_length,
            "truncated_requests": truncated,
            "truncated_prompts": language_model.count(language_model.truncated, built.instances),
            "split_texts": language_model.count(language_model.split, built.instances),
            "add_bos_token": self.settings.add_bos_token,
            "apply_chat_template": self.settings.apply_chat_template,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "log_probabilities": "float32",
        }
        if evaluation.limit is not None:
            details["smoke"] = True
        outcome = task_problems.examine(
            built.tasks, results["samples"], language_model.unanswered, [*built.warnings, *warnings]
        )
        yield _score(self.settings, evaluation, results, built, details, outcome)


# --- scorers -----------------------------------------------------------------------------------------------------------------


def _scorer(settings: Evaluator.Settings, subject: Subject) -> str:
    """Which scorer runs. Raises EvaluationError where shared_prefix is asked for and the model does not allow it."""
    if settings.scorer == "lm_eval":
        return "lm_eval"
    reason = prefix_scoring.unsupported(subject.model)
    if subject.cell.scheme.kv is not None:
        reason = "its keys and values are rounded as the cache is read"
    if depends_on_company(subject.cell):
        reason = "its activations are rounded by the range of the whole batch"
    if reason is None:
        return "shared_prefix"
    if settings.scorer == "shared_prefix":
        raise EvaluationError(
            f"{subject.cell.title}: scorer=shared_prefix does not apply: {reason}; set scorer=lm_eval or auto"
        )
    return "lm_eval"


def _batch_tokens(subject: Subject, requests: Sequence[Pair]) -> int:
    """Tokens per forward pass: what batch_size sequences of the longest request hold; 0: the scorer's own default."""
    return subject.batch_size * max(len(inputs) for inputs, _ in requests)


# --- built tasks, shared by the cells of a process -----------------------------------------------------------------------------


@dataclass
class Built:
    """Tasks with their requests built, and the tokens of those requests by tokenizer."""

    tasks: dict[str, Any]
    splits: dict[str, str | None]
    groups: dict[str, list[str]]
    warnings: list[str] = field(default_factory=list)  # of lm-eval, while it built them
    _pairs: dict[str, list[Pair]] = field(default_factory=dict)

    @property
    def instances(self) -> list[Any]:
        return [instance for task in self.tasks.values() for instance in task.instances]

    def forget_answers(self) -> None:
        """lm-eval appends a model's answers to its requests: the next model starts from none."""
        for instance in self.instances:
            instance.resps = []
            instance.filtered_resps = {}

    def pairs(
        self, language_model: Any, model_folder: Path, add_bos_token: bool | None
    ) -> list[Pair]:
        """Tokens of every log-likelihood request; models with one tokenizer share them."""
        key = digest([tokenizer_digest(model_folder), add_bos_token])
        if key not in self._pairs:
            requests = [
                instance.args
                for instance in self.instances
                if instance.request_type == "loglikelihood"
            ]
            # one tokenizer: a sweep goes through models one by one
            self._pairs = {key: encode_pairs(language_model, requests)}
        return self._pairs[key]


@dataclass(frozen=True)
class Chat:
    """A chat template. render: turns -> text; digest: of the tokenizer that it belongs to."""

    render: Callable[..., str]
    digest: str


def _chat(settings: Evaluator.Settings, subject: Subject, language_model: Any) -> Chat | None:
    """The template that the settings ask for. Raises EvaluationError where the tokenizer has none."""
    if not settings.apply_chat_template:
        return None
    if not getattr(subject.tokenizer, "chat_template", None):
        raise EvaluationError(
            f"{subject.cell.title}: the tokenizer has no chat template; set apply_chat_template=false"
        )
    return Chat(language_model.apply_chat_template, tokenizer_digest(subject.model_folder))


_kept: OrderedDict[str, Built] = OrderedDict()


def _built(
    settings: Evaluator.Settings, limit: int | None, data: str = "", chat: Chat | None = None
) -> Built:
    """The tasks of an evaluation, built once per process and state of their files (data: its digest)."""
    asked = asdict(settings)
    for unread in ("scorer", "add_bos_token"):
        del asked[unread]
    key = digest([asked, limit, data, chat.digest if chat else None])
    if key not in _kept:
        _kept[key] = _build(settings, limit, chat)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def _build(settings: Evaluator.Settings, limit: int | None, chat: Chat | None) -> Built:
    from lm_eval.tasks import TaskManager

    files = task_files.members(settings.task, settings.include)
    overrides: list[dict[str, Any]] = []
    splits: dict[str, str | None] = {}
    for file in files:
        local = task_files.local_data(file, settings.data_root)
        changes = (
            _hub_overrides(file, settings.revisions or {})
            if local is None
            else _local_overrides(file, local)
        )
        config = {**file.config, **changes}
        splits[file.name] = task_files.scored_split(config)
        own = file.config.get("num_fewshot")
        if settings.num_fewshot if settings.num_fewshot is not None and own != 0 else own:
            changes |= task_files.scored_as_test(config)
        overrides.append({"task": file.name, **changes})
    folders = sorted({str(file.path.parent) for file in files})
    with _quiet() as warnings:
        try:
            manager = TaskManager(include_path=folders, include_defaults=False)
            tasks = manager.load([{"group": "harness", "task": overrides}])["tasks"]
            for task in tasks.values():
                _prepare(task, settings.num_fewshot, limit, chat)
        except HarnessError:
            raise
        except Exception as error:  # YAML, templates, data sets and the hub each raise their own
            raise _not_built(settings, files, error) from error
    for task in tasks.values():
        task_problems.guard(task)
    groups = task_files.groups(settings.task, settings.include)
    return Built(dict(tasks), splits, groups, list(warnings))


def _not_built(
    settings: Evaluator.Settings, files: Sequence[TaskFile], error: Exception
) -> DataError:
    """Why lm-eval could not make the tasks, with the files to look at and what to do."""
    what, reason = (
        f"lm-eval could not build {settings.task}",
        f"{type(error).__name__}: {first_line(error)}",
    )
    if "out of bounds for size 0" in str(error):
        reason = "no items are left once the task's process_docs has chosen among them"
    elif "larger than population" in str(error) or "exceeds the" in str(error):
        reason = "fewer worked examples are left than are asked for; lower num_fewshot, or add rows"
    elif isinstance(error, KeyError):
        reason = f"the data have no field or split {error}, which the task file names"
    names = {str(file.path) for file in files}
    read = [task_files.local_data(file, settings.data_root) for file in files]
    names |= {str(local.folder) for local in read if local is not None}
    return DataError(f"{what}: {reason}; see {short_list(sorted(names), 8)}")


def _local_overrides(file: TaskFile, local: LocalData) -> dict[str, Any]:
    """What to change in a task's config so that it reads local files: its data set, and no split that has no file."""

    def read_local(**metadata: Any) -> Any:
        import datasets

        # As the official loader does: a field that some rows lack is None there, one of mixed types stays as it is.
        read = functools.partial(datasets.Dataset.from_list, on_mixed_types="use_json")
        return datasets.DatasetDict(
            {split: read(json_lines.filled(local.rows(split))) for split in local.splits}
        )

    return {
        **task_files.without_absent_splits(file.config, local),
        "custom_dataset": read_local,
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": None,
    }


def _hub_overrides(file: TaskFile, revisions: Mapping[str, str]) -> dict[str, Any]:
    """What to change in a task's config so that it reads its data set at a commit."""
    if file.data_set is None or file.data_set not in revisions:
        return {}
    return {
        "dataset_kwargs": {
            **(file.config.get("dataset_kwargs") or {}),
            "revision": revisions[file.data_set],
        }
    }


def _prepare(task: Any, num_fewshot: int | None, limit: int | None, chat: Chat | None) -> None:
    """Number and seed of worked examples as in simple_evaluate; requests built once and kept."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    turns = (
        {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": chat.render}
        if chat
        else {}
    )
    task.build_all_requests(limit=limit, rank=0, world_size=1, **turns)
    # `evaluate` builds the requests of every task it is given; these exist, with the same limit.
    task.build_all_requests = lambda **arguments: None


def encode_pairs(language_model: Any, requests: Sequence[tuple[str, str]]) -> list[Pair]:
    """Tokens of (context, continuation) requests by lm-eval's rule, each distinct string tokenized once and all in one batch.

    The rule: blanks at the end of a context belong to the continuation; the tokens of both together, less those of the context
    alone, are the continuation's; an empty context is the begin-of-sequence token.
    """
    moved = [
        (context.rstrip(), context[len(context.rstrip()) :] + continuation)
        for context, continuation in requests
    ]
    whole = {context + continuation for context, continuation in moved if context}
    bare = {
        continuation
        for (given, _), (context, continuation) in zip(requests, moved, strict=True)
        if not given
    }
    tokens = _encode(
        language_model, sorted(whole | {context for context, _ in moved if context}), None
    )
    tokens_bare = _encode(language_model, sorted(bare), False)
    prefix = np.array([language_model.prefix_token_id], dtype=np.int32)
    pairs: list[Pair] = []
    for (given, _), (context, continuation) in zip(requests, moved, strict=True):
        if given == "":
            own = tokens_bare[continuation]
            pairs.append((own[:1], own[1:]) if len(own) and own[0] == prefix[0] else (prefix, own))
        elif context == "":  # blanks alone: lm-eval tokenizes the empty context as it stands
            before, both = (
                np.array(language_model.tok_encode(text), dtype=np.int32)
                for text in ("", continuation)
            )
            pairs.append((before, both[len(before) :]))
        else:
            before, both = tokens[context], tokens[context + continuation]
            pairs.append((before, both[len(before) :]))
    return pairs


def _encode(
    language_model: Any, texts: list[str], special_tokens: bool | None
) -> dict[str, np.ndarray]:
    """Tokens by text; special_tokens None: as the model's setting says, but never a second BOS before one in the text."""
    if not texts:
        return {}
    setting = language_model.add_bos_token if special_tokens is None else special_tokens
    options = {} if setting is None else {"add_special_tokens": setting}
    begin = language_model.tokenizer.decode(language_model.prefix_token_id)
    own = {text for text in texts if special_tokens is None and begin and text.startswith(begin)}
    found: dict[str, np.ndarray] = {}
    for group, arguments in ((own, {"add_special_tokens": False}), (set(texts) - own, options)):
        listed = sorted(group)
        if listed:
            ids = language_model.tokenizer(listed, verbose=False, **arguments)["input_ids"]
            found |= {
                text: np.array(row, dtype=np.int32) for text, row in zip(listed, ids, strict=True)
            }
    return found


def _check_lengths(instances: Sequence[Any], pairs: Sequence[Pair], context_length: int) -> int:
    """How many requests lose the beginning of their context. Raises EvaluationError where a continuation alone does not fit."""
    empty = {
        f"{i.task_name} item {i.doc_id}"
        for i, (before, after) in zip(instances, pairs, strict=True)
        if not len(after)
    }
    if empty:
        raise EvaluationError(f"continuations without a token: {short_list(sorted(empty), 8)}")
    long = {
        f"{i.task_name} item {i.doc_id} ({len(after)} tokens)"
        for i, (_, after) in zip(instances, pairs, strict=True)
        if len(after) > context_length
    }
    if long:
        raise EvaluationError(
            f"continuations longer than the model's context of {context_length} tokens: {short_list(sorted(long), 8)}; "
            "leave the task out for this model, or set a limit that ends before these items"
        )
    return sum(len(before) + len(after) > context_length + 1 for before, after in pairs)


# --- lm-eval's side ------------------------------------------------------------------------------------------------------------


@functools.cache
def _language_model_class() -> type[Any]:
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        """lm-eval's model over a loaded one; the tokens of its requests are given, and their answers where they are known.

        It remembers what lm-eval does not count: prompts whose beginning was cut off, texts that were split into windows, and
        prompts after which the model's logits were no numbers, so that it wrote nothing.
        """

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.encoded: dict[int, Pair] = {}
            self.answers: dict[int, prefix_scoring.Answer] = {}
            self.truncated: set[str] = set()
            self.split: set[str] = set()
            self.unanswered: set[str] = set()
            self._batch: list[str] = []

        @staticmethod
        def count(texts: set[str], instances: Sequence[Any]) -> int:
            """How many requests have one of these texts."""
            return sum(instance.args[0] in texts for instance in instances) if texts else 0

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            texts = {request.args[0] for request in requests}
            self.split |= {text for text in texts if len(self.tok_encode(text)) > self.max_length}
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

        def tok_batch_encode(
            self, strings: list[str], *arguments: Any, left_truncate_len: int = 0, **options: Any
        ) -> Any:
            self._batch = list(strings)
            ids, mask = super().tok_batch_encode(strings, *arguments, **options)
            if left_truncate_len:
                lengths = mask.sum(1).tolist()
                self.truncated |= {
                    text for text, n in zip(strings, lengths, strict=True) if n > left_truncate_len
                }
                ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
            return ids, mask

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            watch = generation.NumberWatch()
            written = super()._model_generate(
                context, *arguments, logits_processor=[watch], **options
            )
            lost = watch.lost(len(self._batch))
            self.unanswered |= {text for text, no in zip(self._batch, lost, strict=True) if no}
            return written

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[prefix_scoring.Answer]:
            if self.answers:
                return [self.answers[id(request)] for request in requests]
            pairs = [(request.args, *self.encoded[id(request)]) for request in requests]
            tokens = [
                (strings, before.tolist(), after.tolist()) for strings, before, after in pairs
            ]
            return self._loglikelihood_tokens(tokens, disable_tqdm=True)

    return LanguageModel


def _language_model(subject: Subject, settings: Evaluator.Settings) -> Any:
    kv, batch_size = (
        subject.cell.scheme.kv,
        subject.batch_for(min(subject.context_length() or 2048, 512)),
    )
    if (
        kv is not None
        and kv.format == "int"
        and "channel" in (kv.key_axis, kv.value_axis)
        and task_files.generates(settings.task, settings.include)
    ):
        # shorter prompts are padded on the left, which would shift the groups of tokens
        batch_size = 1
    with _quiet():
        return _language_model_class()(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            backend="causal",
            softmax_dtype="float32",
            batch_size=batch_size,
            add_bos_token=settings.add_bos_token,
        )


def _evaluate(
    language_model: Any, tasks: dict[str, Any], limit: int | None
) -> tuple[Mapping[str, Any], list[str]]:
    """lm-eval's results with their standard errors, and the warnings that it gave."""
    from lm_eval.evaluator import evaluate

    with _quiet() as warnings:
        try:
            results = evaluate(
                lm=language_model,
                task_dict={"tasks": tasks},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
            assert results is not None
            for name, task in tasks.items():
                results["results"][name] |= _standard_errors(task, results["samples"][name])
        except HarnessError:
            raise
        except Exception as error:  # of lm-eval, of the task's functions and templates
            if isinstance(error, RuntimeError) or is_out_of_memory(error):
                raise
            raise EvaluationError(
                f"lm-eval could not score {', '.join(sorted(tasks))}: {type(error).__name__}: {first_line(error)}; "
                "run with HARNESS_DEBUG=1, or see `harness show`, for the place in the task's functions"
            ) from error
    return results, list(warnings)


def _standard_errors(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Standard errors by lm-eval's own functions, "<metric>_stderr,<filter>"; none where a value is too large to be squared."""
    from lm_eval.api.metrics import mean, stderr_for_metric

    columns: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            columns.setdefault((metric, sample["filter"]), []).append(sample[metric])
    found = {}
    for (metric, filter_name), values in columns.items():
        function = stderr_for_metric(
            task_problems.unguarded(task.aggregation().get(metric, mean)), BOOTSTRAPS
        )
        if function is None or len(values) < 2 or any(value is UNANSWERED for value in values):
            continue
        with contextlib.suppress(OverflowError):
            found[f"{metric}_stderr,{filter_name}"] = function(values)
    return found


_quiet_lock = threading.RLock()


class _Warnings(logging.Handler):
    """Keeps each warning of lm-eval once, its first line."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        if lines:
            self.found[lines[0]] = None


@contextlib.contextmanager
def _quiet() -> Iterator[Iterable[str]]:
    """No progress bars, prints or process pools of lm-eval's own; its errors are raised, its warnings are what is yielded."""
    logger, handler = logging.getLogger("lm_eval"), _Warnings()
    with (
        _quiet_lock,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        level, passes_on = logger.level, logger.propagate
        pools = os.environ.get("DISABLE_MULTIPROC")
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(handler)
        # its bootstrap would start a process per core of the machine
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            yield handler.found
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = passes_on
            if pools is None:
                os.environ.pop("DISABLE_MULTIPROC", None)
            else:
                os.environ["DISABLE_MULTIPROC"] = pools


# --- results -------------------------------------------------------------------------------------------------------------------


def _score(
    settings: Evaluator.Settings,
    evaluation: Evaluation,
    results: Mapping[str, Any],
    built: Built,
    details: dict[str, Any],
    outcome: task_problems.Outcome,
) -> Score:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    scored = {task: outcome.settled(task, results["results"][task]) for task in built.tasks}
    for task in built.tasks:
        prefix = evaluation.name if task == settings.task else task
        values, errors = task_metrics(scored[task])
        metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
        stderr |= {f"{prefix}/{name}": value for name, value in errors.items()}
    for group, tasks in built.groups.items():
        prefix = evaluation.name if group == settings.task else group
        values, errors = group_metrics([scored[task] for task in tasks])
        metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
        stderr |= {f"{prefix}/{name}": value for name, value in errors.items()}
    details["tasks"] = {
        task: {
            "version": results["versions"].get(task),
            "num_fewshot": results["n-shot"].get(task),
            "split": built.splits.get(task),
            "items": results["n-samples"][task]["effective"],
            "of": results["n-samples"][task]["original"],
            "higher_is_better": results["higher_is_better"].get(task, {}),
        }
        for task in built.tasks
    }
    if not metrics:
        raise EvaluationError(
            f"{settings.task}: lm-eval gave no metric for any item; see process_results and metric_list of its task file"
        )
    items = _items(results["samples"], built.tasks, outcome)
    return Score(metrics, stderr, items, details, outcome.problems)


def task_metrics(result: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors by name: "acc,none" becomes "acc", "exact_match,strict-match" "exact_match/strict-match"."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in result.items():
        if "," not in key or isinstance(value, bool) or not isinstance(value, NUMBER):
            continue  # names, counts, "N/A"
        metric, filter_name = key.split(",", 1)
        if metric == "bypass":
            continue  # lm-eval's placeholder, always 999
        suffix = "" if filter_name == "none" else f"/{filter_name}"
        if metric.endswith("_stderr"):
            if math.isfinite(value):
                errors[metric.removesuffix("_stderr") + suffix] = float(value)
        else:
            values[metric + suffix] = float(value)
    return values, errors


def group_metrics(
    results: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, float]]:
    """A group's metrics that all its tasks have: the mean over items, and over tasks as `<metric>_macro`.

    The standard error treats tasks as strata: the square root of sum (n_i / n)² stderr_i².
    """
    sizes = [result["sample_len"] for result in results]
    total = sum(sizes)
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    tasks = [task_metrics(result) for result in results]
    for name in tasks[0][0]:
        if not all(name in own for own, _ in tasks):
            continue
        values[name] = (
            sum(own[name] * size for (own, _), size in zip(tasks, sizes, strict=True)) / total
        )
        values[f"{name}_macro"] = sum(own[name] for own, _ in tasks) / len(tasks)
        if all(name in own for _, own in tasks):
            errors[name] = math.sqrt(
                sum(
                    (own[name] * size / total) ** 2
                    for (_, own), size in zip(tasks, sizes, strict=True)
                )
            )
    return values, errors


def _items(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    tasks: Mapping[str, Any],
    outcome: task_problems.Outcome,
) -> dict[str, list[Any]]:
    """Columns with one row per item: identity, answers, and every metric that is one number per item.

    An item without an answer has no choice and no mark (None), and NaN in every metric.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for task in tasks:
        for sample in samples[task]:
            answered = (task, sample["doc_id"]) not in outcome.unanswered
            row = rows.setdefault(
                (task, sample["doc_id"]),
                {
                    "id": f"{task}/{sample['doc_id']}",
                    "task": task,
                    "doc_id": sample["doc_id"],
                    "doc_hash": sample["doc_hash"],
                    "prompt_hash": sample["prompt_hash"],
                    **_answers(tasks[task], sample, answered),
                },
            )
            suffix = "" if sample["filter"] == "none" else f"/{sample['filter']}"
            for name in sample["metrics"]:
                value = sample[name]
                if isinstance(value, NUMBER):
                    row[name + suffix] = float(value) if answered else math.nan
            correct = next(
                (row[name + suffix] for name in ("acc", "exact_match") if name + suffix in row),
                None,
            )
            if correct is not None:  # by any of the task's filters
                row["correct"] = max(correct, row.get("correct", 0.0)) if answered else math.nan
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    items = {name: [row.get(name) for row in rows.values()] for name in columns}
    marks = [math.inf if mark is None else mark for mark in items.pop("correct", [None])]
    # Not where an item has no mark, nor where marks are probabilities, as those of truthfulqa_mc2.
    if all(math.isnan(mark) or mark in (0.0, 1.0) for mark in marks):
        items["correct"] = [None if math.isnan(mark) else mark == 1.0 for mark in marks]
    return items


def _answers(task: Any, sample: Mapping[str, Any], answered: bool) -> dict[str, Any]:
    """What the model said: log-likelihoods per choice and the chosen one, or its text. None where there is no answer."""
    if task.OUTPUT_TYPE in LIKELIHOOD_TASKS:
        answers = [response[0] for response in sample["resps"]]
        found: dict[str, Any] = {
            "log_likelihoods": [float(answer[0]) for answer in answers],
            "greedy": [bool(answer[1]) for answer in answers],
        }
        if task.OUTPUT_TYPE == "multiple_choice":
            found["chosen"] = int(np.argmax(found["log_likelihoods"])) if answered else None
        return found
    return {"response": str(sample["resps"][0][0]) if answered else None}
