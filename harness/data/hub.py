"""The Hugging Face hub: commits, snapshots, data sets, and the reasons why something is unavailable."""

from __future__ import annotations

import functools
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from harness.core.errors import DataError
from harness.core.text import first_line
from harness.data.digests import cache_folder, write_cache

UNRESOLVED = "unresolved:"  # digest of a hub id whose commit could not be asked for
TRUE = ("1", "true", "yes", "on")  # of a switch in the environment
OFF = "the hub is switched off (HF_HUB_OFFLINE)"
SILENT = "the hub cannot be reached"
NETWORK_WORDS = (OFF, SILENT)
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """True for "owner/name", unless it is a folder of this machine."""
    return HUB_ID.fullmatch(source) is not None and not Path(source).expanduser().exists()


def hub_commit(repository: str, kind: str, revision: str | None = None) -> str | None:
    """The commit that a branch or tag ("main" where None) of a model or data set of the hub stands for; None where it is unknown.

    kind: "model" or "dataset". What a branch stood for when this machine first asked stays: it is kept in commits.json beside the
    digests, so that keys do not change during a sweep when its authors commit. The hub's local cache is read before the network.
    """
    revision = revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    _asked[0] += 1
    name = f"{kind} {repository}@{revision}"
    known = _known_commits().get(name) or _cached_reference(repository, kind, revision)
    if known is None:
        known = _asked_commit(repository, kind, revision)
        if known is not None:
            write_cache(cache_folder() / "commits.json", {**_known_commits(), name: known})
    return known or (_only_snapshot(repository, kind) if revision == "main" else None)


def unresolved_reason(repository: str, kind: str, revision: str | None = None) -> str:
    """Why `hub_commit` returned None."""
    if _is_offline():
        return f"{OFF}, and nothing in its local cache says it"
    return (
        _refusals.get((repository, kind, revision or "main"))
        or _silent.get(_endpoint())
        or "the hub could not be asked"
    )


def asked_commits() -> int:
    """How often this process has looked for the commit of a branch or tag, in caches or on the network."""
    return _asked[0]


_asked = [0]
_refusals: dict[tuple[str, str, str], str] = {}  # what the hub answered in place of a commit
# hubs that did not answer: asked once per process, not once per data set
_silent: dict[str, str] = {}


def _asked_commit(repository: str, kind: str, revision: str) -> str | None:
    if _is_offline() or _endpoint() in _silent:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return (
            HfApi(endpoint=_endpoint())
            .repo_info(repository, repo_type=kind, revision=revision, timeout=5)
            .sha
        )
    except HfHubHTTPError as error:  # absent, gated, or an access token that is not accepted
        status = getattr(error.response, "status_code", None)
        hint = (
            ": misspelt, or gated: accept its licence and set HF_TOKEN"
            if status in (401, 403, 404)
            else ""
        )
        _refusals[repository, kind, revision] = f"the hub answered {status}{hint}"
    except Exception as error:  # httpx's errors, of a hub that cannot be reached
        _silent[_endpoint()] = f"{SILENT}: {first_line(error)}"
    return None


def _cached_reference(repository: str, kind: str, revision: str) -> str | None:
    reference = _hub_cache() / f"{kind}s--{repository.replace('/', '--')}" / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def _only_snapshot(repository: str, kind: str) -> str | None:
    """The one commit of a repository that the hub's cache holds; clients that download by commit leave no reference."""
    commits = {
        path.name
        for path in (_hub_cache() / f"{kind}s--{repository.replace('/', '--')}" / "snapshots").glob(
            "*"
        )
    }
    # `datasets` keeps what it read: <config>/<version>/<commit>
    if kind == "dataset" and not commits:
        commits = {
            path.name for path in (_datasets_cache() / repository.replace("/", "___")).glob("*/*/*")
        }
    found = sorted(commit for commit in commits if COMMIT.fullmatch(commit))
    return found[0] if len(found) == 1 else None


def _known_commits() -> dict[str, str]:
    try:
        known = json.loads((cache_folder() / "commits.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub")


def _datasets_cache() -> Path:
    return Path(os.environ.get("HF_DATASETS_CACHE") or _hub_home() / "datasets")


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE


def caches_stamp() -> list[int]:
    """When the hub's local caches last got or lost a repository; 0 for one that is not there."""
    found = []
    for folder in (_hub_cache(), _datasets_cache()):
        try:
            found.append(folder.stat().st_mtime_ns)
        except OSError:
            found.append(0)
    return found


def needs_network(reason: str) -> bool:
    """Whether a sentence of this module, or one that quotes it, says that only access to the hub is missing."""
    return any(words in reason for words in NETWORK_WORDS)


def missing_data_set(repository: str, revision: str | None) -> str | None:
    """Why a data set of the hub cannot be read here: not in the local cache and the hub not reachable, or its commit is not known.

    None when it can. revision: as `pin` left it.
    """
    prepared = _datasets_cache() / repository.replace("/", "___")
    if (
        not (_hub_cache() / f"datasets--{repository.replace('/', '--')}").is_dir()
        and not prepared.is_dir()
    ):
        if _is_offline() or os.environ.get("HF_DATASETS_OFFLINE", "").lower() in TRUE:
            return f"the data set {repository} is not in the local cache, and {OFF}"
        if not _reachable(_endpoint()):
            return f"the data set {repository} is not in the local cache, and {SILENT}"
    if revision is None or not COMMIT.fullmatch(revision):
        why = unresolved_reason(repository, "dataset", revision)
        return f"the commit of the data set {repository} is not known ({why}), so results would have no identity"
    return None


@functools.cache
def _reachable(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3)
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


def hub_rows(repository: str, config: str | None, split: str, revision: str | None) -> Any:
    """A split of a data set of the hub, as `datasets` returns it. Raises DataError if the hub does not return it."""
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split, revision=revision)
    except Exception as error:
        raise hub_error(f"data set {repository}, config {config}, split {split}", error) from error


def hub_error(what: str, error: Exception) -> DataError:
    """An error of the hub as ours, with a way to continue."""
    return DataError(
        f"{what}: the hub did not give it: {first_line(error)}. Without network set data.root to a folder with its texts and "
        "tasks, or to a bundle of `harness data pull`."
    )
