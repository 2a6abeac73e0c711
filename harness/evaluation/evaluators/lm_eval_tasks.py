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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from harness.core.cell import Evaluation, Model, digest
from harness.core.errors import DataError, EvaluationError, HarnessError, unknown_name
from harness.core.events import Progress
from harness.data import hub, model_folders, task_files
from harness.data.task_files import LocalData, TaskFile
from harness.evaluation import prefix_scoring
from harness.evaluation.protocols import Score, Subject, depends_on_company
from harness.evaluation.windows import tokenizer_digest

SCORERS = ("auto", "shared_prefix", "lm_eval")
LIKELIHOOD_TASKS = ("loglikelihood", "multiple_choice")
BOOTSTRAPS = 100  # resamples for standard errors that have no closed form
FEWSHOT_SEED = 1234  # simple_evaluate's default
KEPT = 32  # built tasks that stay in memory for the next cell
Pair = tuple[np.ndarray, np.ndarray]  # tokens of a context and of its continuation, int32


class Evaluator:
    """One task, or one group of tasks, of lm-eval."""

    version = 1
    settings_added_later = ("apply_chat_template",)  # keys leave it out while it is off
    groups_tasks = (
        True  # its `task` may be a group, whose members report metrics under their own names
    )
    compares_items = (
        True  # its items are answers, comparable with those of the full-precision model
    )
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
        reasons: dict[
            str, None
        ] = {}  # ordered and without repeats: the 57 tasks of a group lack one data set
        for task in tasks:
            for reason in _reasons(task, self.settings):
                reasons[reason] = None
        if self.settings.apply_chat_template and not hub.is_hub_id(model.source):
            with contextlib.suppress(
                HarnessError
            ):  # a model that cannot be read is refused under its own name
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
        results = _evaluate(language_model, built.tasks, evaluation.limit)
        yield subject.progress(evaluation, len(built.instances), len(built.instances))
        details = {
            "scorer": scorer,
            "batch_size": language_model.batch_size,
            "context_length": language_model.max_length,
            "truncated_requests": truncated,
            "add_bos_token": self.settings.add_bos_token,
            "apply_chat_template": self.settings.apply_chat_template,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "log_probabilities": "float32",
        }
        if evaluation.limit is not None:
            details["smoke"] = True
        yield _score(self.settings, evaluation, results, built, details)


# --- what can be known before any work -----------------------------------------------------------------------------------------


def _reasons(task: TaskFile, settings: Evaluator.Settings) -> Iterator[str]:
    """Why one task cannot run."""
    kind = task.config.get("output_type", "generate_until")
    if task.config.get("unsafe_code"):
        yield f"{task.name} runs the code that the model writes; it is not run here"
    if task.config.get("doc_to_image") or task.config.get("doc_to_audio"):
        yield f"{task.name} shows images or plays sounds; only text is scored here"
    if "class" in task.config:
        yield f"{task.name} is a Python class, not a YAML file, and its data cannot be checked beforehand"
    fixed = task.config.get("num_fewshot")
    if settings.num_fewshot and fixed == 0:
        yield f"{task.name} fixes num_fewshot at 0 in {task.path.name}, not {settings.num_fewshot}; leave num_fewshot out"
    if kind not in (*LIKELIHOOD_TASKS, "loglikelihood_rolling", "generate_until"):
        yield f"{task.name} has the unknown output_type {kind}"
    local = task_files.local_data(task, settings.data_root)
    if local is None:
        yield from _missing_data(task, settings)
        return
    wanted = [
        str(task.config[key]) for key in ("test_split", "validation_split") if task.config.get(key)
    ]
    if not any(split in local.splits for split in wanted):
        yield f"{task.name}: none of {', '.join(f'{split}.jsonl' for split in wanted)} in {local.folder}"
    shots = settings.num_fewshot if settings.num_fewshot is not None and fixed != 0 else fixed
    if (
        shots
        and _examples_split(task, local) is None
        and not (task.config.get("fewshot_config") or {}).get("samples")
    ):
        examples = str(
            task.config.get("fewshot_split") or task.config.get("training_split") or "train"
        )
        yield (
            f"{task.name}: {shots} worked examples are asked for, but {local.folder} has no {examples}.jsonl, and taking them from "
            "the scored items would show answers; add the file or set num_fewshot=0"
        )


def _missing_data(task: TaskFile, settings: Evaluator.Settings) -> Iterator[str]:
    """Why a task without local files has no items."""
    place = (
        "data.root=DIR with DIR/tasks/"
        + task_files.FOLDER_OF_SUBJECTS.get(task.data_set or "", task.name)
        + "/<split>.jsonl"
    )
    if task.data_set is not None:
        missing = hub.missing_data_set(task.data_set, (settings.revisions or {}).get(task.data_set))
        if missing:
            given = (
                f" (data.root={settings.data_root} has no folder for it)"
                if settings.data_root
                else ""
            )
            yield f"{missing}; give {place}{given}"
    elif task.config.get("dataset_path") == "json" and not (
        task.config.get("dataset_kwargs") or {}
    ).get("data_files"):
        yield f"{task.name} has no public data set; give {place}"


def _examples_split(task: TaskFile, local: LocalData) -> str | None:
    """The local split that worked examples come from."""
    for key in ("fewshot_split", "training_split"):
        split = task.config.get(key)
        if split and str(split) in local.splits:
            return str(split)
    return None


def _scorer(settings: Evaluator.Settings, subject: Subject) -> str:
    """Which scorer runs. Raises EvaluationError where shared_prefix is asked for and the model does not allow it."""
    if settings.scorer == "lm_eval":
        return "lm_eval"
    reason = prefix_scoring.unsupported(subject.model)
    if subject.cell.scheme.kv is not None:
        reason = "its keys and values are rounded in groups of neighbouring tokens"
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
    splits: dict[str, str]
    groups: dict[str, list[str]]
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
            self._pairs = {
                key: encode_pairs(language_model, requests)
            }  # one tokenizer: a sweep goes through models one by one
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
    overrides, splits = [], {}
    for file in files:
        local = task_files.local_data(file, settings.data_root)
        changes = (
            _hub_overrides(file, settings.revisions or {})
            if local is None
            else _local_overrides(file, local)
        )
        config = {**file.config, **changes}
        splits[file.name] = str(config.get("test_split") or config.get("validation_split"))
        overrides.append({"task": file.name, **changes})
    folders = sorted({str(file.path.parent) for file in files})
    with _quiet():
        try:
            manager = TaskManager(include_path=folders, include_defaults=False)
            tasks = manager.load([{"group": "harness", "task": overrides}])["tasks"]
            for task in tasks.values():
                _prepare(task, settings.num_fewshot, limit, chat)
        except HarnessError:
            raise
        except Exception as error:  # YAML, templates, data sets and the hub each raise their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise DataError(
                f"lm-eval could not build {settings.task}: {type(error).__name__}: {reason}"
            ) from error
    return Built(dict(tasks), splits, task_files.groups(settings.task, settings.include))


def _local_overrides(file: TaskFile, local: LocalData) -> dict[str, Any]:
    """What to change in a task's config so that it reads local files: its data set, and no split that has no file."""
    changes: dict[str, Any] = {
        key: None for key in task_files.SPLITS if str(file.config.get(key)) not in local.splits
    }

    def read_local(**metadata: Any) -> Any:
        import datasets

        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(local.rows(split)) for split in local.splits}
        )

    return {
        **changes,
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
        raise EvaluationError(f"continuations without a token: {_some(empty)}")
    long = {
        f"{i.task_name} item {i.doc_id} ({len(after)} tokens)"
        for i, (_, after) in zip(instances, pairs, strict=True)
        if len(after) > context_length
    }
    if long:
        raise EvaluationError(
            f"continuations longer than the model's context of {context_length} tokens: {_some(long)}; "
            "leave the task out for this model, or set a limit that ends before these items"
        )
    return sum(len(before) + len(after) > context_length + 1 for before, after in pairs)


def _some(names: set[str], most: int = 8) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (
        f" and {len(listed) - most} more" if len(listed) > most else ""
    )


# --- lm-eval's side ------------------------------------------------------------------------------------------------------------


@functools.cache
def _language_model_class() -> type[Any]:
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        """lm-eval's model over a loaded one; the tokens of its requests are given, and their answers where they are known."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.encoded: dict[int, Pair] = {}
            self.answers: dict[int, prefix_scoring.Answer] = {}

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
        and "channel" in (kv.key_axis, kv.value_axis)
        and task_files.generates(settings.task, settings.include)
    ):
        batch_size = (
            1  # shorter prompts are padded on the left, which would shift the groups of tokens
        )
    with _quiet():
        return _language_model_class()(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            backend="causal",
            softmax_dtype="float32",
            batch_size=batch_size,
            add_bos_token=settings.add_bos_token,
        )


def _evaluate(language_model: Any, tasks: dict[str, Any], limit: int | None) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate

    with _quiet():
        try:
            results = evaluate(
                lm=language_model,
                task_dict={"tasks": tasks},
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
            )
        except HarnessError:
            raise
        except (
            AssertionError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            ZeroDivisionError,
        ) as error:
            raise EvaluationError(
                f"lm-eval could not score {', '.join(sorted(tasks))}: {type(error).__name__}: {error}"
            ) from error
    assert results is not None
    return results


_quiet_lock = threading.RLock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, prints or process pools of lm-eval's own; its errors are raised, its warnings are in the details."""
    logger = logging.getLogger("lm_eval")
    with (
        _quiet_lock,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        level, pools = logger.level, os.environ.get("DISABLE_MULTIPROC")
        logger.setLevel(logging.ERROR)
        os.environ["DISABLE_MULTIPROC"] = (
            "1"  # its bootstrap would start a process per core of the machine
        )
        try:
            yield
        finally:
            logger.setLevel(level)
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
) -> Score:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for task in built.tasks:
        prefix = evaluation.name if task == settings.task else task
        values, errors = task_metrics(results["results"][task])
        metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
        stderr |= {f"{prefix}/{name}": value for name, value in errors.items()}
    for group, tasks in built.groups.items():
        prefix = evaluation.name if group == settings.task else group
        values, errors = group_metrics([results["results"][task] for task in tasks])
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
    return Score(metrics, stderr, _items(results["samples"], built.tasks), details)


def task_metrics(result: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors by name: "acc,none" becomes "acc", "exact_match,strict-match" "exact_match/strict-match"."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in result.items():
        if "," not in key or isinstance(value, bool) or not isinstance(value, int | float):
            continue  # names, counts, "N/A"
        metric, filter_name = key.split(",", 1)
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
    samples: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Columns with one row per item: identity, answers, and every metric that is one number per item."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for task in tasks:
        for sample in samples[task]:
            row = rows.setdefault(
                (task, sample["doc_id"]),
                {
                    "id": f"{task}/{sample['doc_id']}",
                    "task": task,
                    "doc_id": sample["doc_id"],
                    "doc_hash": sample["doc_hash"],
                    "prompt_hash": sample["prompt_hash"],
                    **_answers(tasks[task], sample),
                },
            )
            suffix = "" if sample["filter"] == "none" else f"/{sample['filter']}"
            for name in sample["metrics"]:
                value = sample[name]
                if isinstance(value, bool | int | float | np.number):
                    row[name + suffix] = float(value)
            correct = next(
                (row[name + suffix] for name in ("acc", "exact_match") if name + suffix in row),
                None,
            )
            if correct is not None:
                row["correct"] = max(
                    correct, row.get("correct", 0.0)
                )  # by any of the task's filters
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    items = {name: [row.get(name) for row in rows.values()] for name in columns}
    correct_column = items.pop("correct", [None])
    if all(
        value in (0.0, 1.0) for value in correct_column
    ):  # not a probability, as truthfulqa_mc2 has
        items["correct"] = [value == 1.0 for value in correct_column]
    return items


def _answers(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What the model said: log-likelihoods per choice and the chosen one, or its text."""
    if task.OUTPUT_TYPE in LIKELIHOOD_TASKS:
        answers = [response[0] for response in sample["resps"]]
        found: dict[str, Any] = {
            "log_likelihoods": [float(answer[0]) for answer in answers],
            "greedy": [bool(answer[1]) for answer in answers],
        }
        if task.OUTPUT_TYPE == "multiple_choice":
            found["chosen"] = int(np.argmax(found["log_likelihoods"]))
        return found
    return {"response": str(sample["resps"][0][0])}
