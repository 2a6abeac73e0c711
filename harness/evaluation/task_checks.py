"""What a plan can know of a benchmark: can its task be scored at all, and are its items and its worked examples there?

Worked examples follow lm-eval's rule: `fewshot_config.split`, else `fewshot_split`, else the training split, else the validation
split, else the test split. Where that is the split that is scored, each item's prompt must leave the item itself out; lm-eval does
so for a test split that is named as such, `scored_as_test` names every other one so too. No evaluator by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import HarnessError
from harness.data import hub, json_lines, task_files
from harness.data.task_files import LocalData, TaskFile

LIKELIHOOD_TASKS = ("loglikelihood", "multiple_choice")
OUTPUT_TYPES = (*LIKELIHOOD_TASKS, "loglikelihood_rolling", "generate_until")
NEW_TOKENS = 256  # lm-eval's default where a task's generation_kwargs name none


def refusals(
    task: TaskFile,
    num_fewshot: int | None,
    data_root: str | None,
    revisions: Mapping[str, str],
    context_length: int | None,
) -> Iterator[str]:
    """Why one task cannot run on a model of that context, one sentence for each reason."""
    kind = task.config.get("output_type", "generate_until")
    if task.config.get("unsafe_code"):
        yield f"{task.name} runs the code that the model writes; it is not run here"
    if task.config.get("doc_to_image") or task.config.get("doc_to_audio"):
        yield f"{task.name} shows images or plays sounds; only text is scored here"
    if "class" in task.config:
        yield f"{task.name} is a Python class, not a YAML file, and its data cannot be checked beforehand"
    fixed = task.config.get("num_fewshot")
    if num_fewshot and fixed == 0:
        yield f"{task.name} fixes num_fewshot at 0 in {task.path.name}, not {num_fewshot}; leave num_fewshot out"
    if kind not in OUTPUT_TYPES:
        yield f"{task.name} has the unknown output_type {kind}; it is one of {', '.join(OUTPUT_TYPES)}"
    if kind == "generate_until" and context_length is not None:
        yield from _new_token_reasons(task, context_length)
    local = task_files.local_data(task, data_root)
    if local is None:
        yield from _missing_data(task, data_root, revisions)
        return
    shots = num_fewshot if num_fewshot is not None and fixed != 0 else fixed
    yield from _local_reasons(task, local, shots or 0)


def _new_token_reasons(task: TaskFile, context_length: int) -> Iterator[str]:
    arguments = task.config.get("generation_kwargs") or {}
    tokens = next(
        (arguments[n] for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if n in arguments),
        NEW_TOKENS,
    )
    if isinstance(tokens, int) and tokens >= context_length:
        yield (
            f"{task.name}: {tokens} new tokens leave no room for a prompt in a context of {context_length}; "
            f"set generation_kwargs.max_gen_toks below that in a task file of your own"
        )


def _local_reasons(task: TaskFile, local: LocalData, shots: int) -> Iterator[str]:
    """Why the local files of a task do not do: no scored split, rows that cannot be read, too few worked examples."""
    wanted = [
        str(task.config[key]) for key in ("test_split", "validation_split") if task.config.get(key)
    ]
    here = {**task.config, **task_files.without_absent_splits(task.config, local)}
    scored = task_files.scored_split(here)
    if scored is None:
        yield f"{task.name}: none of {', '.join(f'{split}.jsonl' for split in wanted)} in {local.folder}"
    examples = task_files.examples_split({**here, "validation_split": None, "test_split": None})
    listed = (task.config.get("fewshot_config") or {}).get("samples")
    if shots and listed and examples is None:
        if isinstance(listed, list) and len(listed) < shots:
            yield (
                f"{task.name}: {shots} worked examples are asked for, and {task.path} lists {len(listed)}; "
                f"set num_fewshot={len(listed)} or less"
            )
    elif shots and examples is None:
        names = (task.config.get("fewshot_config") or {}).get("split")
        names = names or task.config.get("fewshot_split") or task.config.get("training_split")
        yield (
            f"{task.name}: {shots} worked examples are asked for, but {local.folder} has no {names or 'train'}.jsonl, and taking "
            "them from the scored items would show answers; add the file or set num_fewshot=0"
        )
    for split in dict.fromkeys(each for each in (scored, examples if shots else None) if each):
        try:
            rows, equal = local.summary(split)
        except HarnessError as error:
            yield f"{task.name}: {error}"
            continue
        if not rows:
            yield f'{task.name}: {local.splits[split]} has no items of the subject "{local.subject}"'
            continue
        left = rows - equal if split == scored else rows  # an item is never its own example
        if split == examples and left < shots:
            others = ", without the item that is asked" if split == scored else ""
            yield (
                f"{task.name}: {shots} worked examples are asked for, and {local.splits[split]} has {left}{others}; "
                f"add rows or set num_fewshot={left}"
            )


def _missing_data(
    task: TaskFile, data_root: str | None, revisions: Mapping[str, str]
) -> Iterator[str]:
    """Why a task without local files has no items."""
    place = (
        "data.root=DIR with DIR/tasks/"
        + task_files.FOLDER_OF_SUBJECTS.get(task.data_set or "", task.name)
        + "/<split>.jsonl"
    )
    files = (task.config.get("dataset_kwargs") or {}).get("data_files")
    if task.data_set is not None:
        missing = hub.missing_data_set(task.data_set, revisions.get(task.data_set))
        if missing:
            given = f" (data.root={data_root} has no folder for it)" if data_root else ""
            yield f"{missing}; give {place}{given}"
    elif task.config.get("dataset_path") == "json" and not files:
        yield f"{task.name} has no public data set; give {place}"
    elif files:
        yield from _data_file_reasons(task, files)


def _data_file_reasons(task: TaskFile, files: Any) -> Iterator[str]:
    """Why the files that a task's YAML names itself cannot be read. Patterns and addresses are left to the loader."""
    folder = Path(str((task.config.get("dataset_kwargs") or {}).get("data_dir") or ""))
    groups = files.values() if isinstance(files, Mapping) else [files]
    for name in (
        each for group in groups for each in ([group] if isinstance(group, str) else group)
    ):
        if "://" in str(name) or any(sign in str(name) for sign in "*?["):
            continue
        path = folder / str(name)
        if not path.is_file():
            yield f"{task.name}: {task.path} names the data file {path}, which does not exist; paths are relative to {Path.cwd()}"
        elif task.config.get("dataset_path") == "json":
            try:
                json_lines.summary(path, kind=task_files.KIND)
            except HarnessError as error:
                yield f"{task.name}: {error}"
