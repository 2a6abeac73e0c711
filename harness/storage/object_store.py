"""Files of a store in an object store: s3://, gs://, abfs:// and other protocols of fsspec. The only importer of fsspec.

    runs=s3://bucket/prefix     objects of the same names as the files of a folder would have

Nodes share no disk. Each has a mirror below HARNESS_CACHE: a worker writes a checkpoint there and uploads every file of it as soon
as it is complete, the manifest last, so that another node can continue where this one was lost; a worker that evaluates downloads
a checkpoint and compares it with the SHA-256 of its manifest. The mirror is bounded: the least recently used checkpoints are
deleted first. It may be deleted whenever nothing runs. Credentials come from the provider's own tools, never from a URL.

A lock is a lease (`leases`): two processes may hold one for a moment. Both write the same names, and hashes are checked on
reading, so this can cost work but no result.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.core.errors import StoreError
from harness.core.units import bytes_of
from harness.storage.files import Entry, LocalDisk, StorageBackend
from harness.storage.leases import Leases
from harness.storage.locks import Waiting

CACHE_SHARE = 0.5  # of the disk space that is free or taken by the mirror; see cache_limit
CHUNK_BYTES = 1 << 22
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "abfss": "adlfs",
}


def mirror_of(url: str) -> Path:
    """The folder of this machine that mirrors an object store."""
    cache = Path(os.environ.get("HARNESS_CACHE") or "~/.cache/quantization-harness").expanduser()
    name = re.sub(r"[^A-Za-z0-9]+", "-", url).strip("-")[-40:]
    return cache / "stores" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class ObjectStore:
    """The files of a store at a URL. Raises StoreError where fsspec has no such protocol, or its package is not installed."""

    state_seconds = 5.0
    parallel = 16

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.root = mirror_of(self.url)
        self._disk = LocalDisk()
        self._fs, self._prefix = _connect(self.url)
        self.leases = Leases(self._fs, self._prefix, self.url)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _key(self, path: Path) -> str:
        return (
            self._prefix
            if path == self.root
            else f"{self._prefix}/{path.relative_to(self.root).as_posix()}"
        )

    def _path(self, key: str) -> Path:
        return self.root / str(key).lstrip("/").removeprefix(self._prefix.lstrip("/")).lstrip("/")

    def read(self, path: Path) -> bytes:
        with self._explained("read", path):
            return bytes(self._fs.cat_file(self._key(path)))

    def write(self, path: Path, fill: Callable[[Path], object], durable: bool = True) -> None:
        self.leases.check()
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            fill(aside)
            with self._explained("write", path):
                self._fs.put_file(str(aside), self._key(path))
        except OSError as error:
            raise StoreError(
                f"cannot write {self.where(path)}: {error.strerror or error}"
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def remove(self, path: Path) -> None:
        with self._explained("remove", path):
            keys = list(self._fs.find(self._key(path))) or [self._key(path)]
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(key)
        self._disk.remove(path)

    def exists(self, path: Path) -> bool:
        with self._explained("read", path):
            return bool(self._fs.exists(self._key(path)))

    def names(self, folder: Path) -> list[str]:
        with self._explained("list", folder):
            try:
                listed = self._fs.ls(self._key(folder), detail=False)
            except FileNotFoundError:
                return []
        names = {self._path(key).name for key in listed if self._path(key) != folder}
        return sorted(name for name in names if not name.startswith("."))

    def walk(self, folder: Path) -> Iterator[Entry]:
        with self._explained("list", folder):
            found = self._fs.find(self._key(folder), detail=True)
        for key, about in found.items():
            yield Entry(self._path(key), int(about.get("size") or 0), _modified(about))

    def local(self, path: Path) -> Path:
        with self._explained("read", path):
            if not self._fs.exists(self._key(path)):
                raise FileNotFoundError(str(path))
            self._get(path)
        return path

    def upload(self, path: Path) -> None:
        self.leases.check()
        with self._explained("write", path):
            if path.exists():
                self._fs.put_file(str(path), self._key(path))
            elif self._fs.exists(self._key(path)):
                self._fs.rm_file(self._key(path))

    def free_bytes(self, root: Path) -> int | None:
        return None

    def where(self, path: Path) -> str:
        """A path of the mirror as the URL of its object, for messages."""
        below = path.relative_to(self.root).as_posix()
        return self.url if below == "." else f"{self.url}/{below}"

    def _get(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(self._key(path), str(aside))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, verb: str, path: Path) -> Iterator[None]:
        """Turn errors of a provider's library into StoreError; FileNotFoundError passes."""
        try:
            yield
        except (StoreError, FileNotFoundError):
            raise
        except Exception as error:  # each provider has its own errors
            first = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise StoreError(
                f"cannot {verb} {self.where(path)}: {first}. Check the address, the bucket and the credentials of this machine"
            ) from error

    def prefetched(self, folders: Sequence[Path], paths: Sequence[Path]) -> StorageBackend:
        return _Prefetched(self, folders, paths)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @contextmanager
    def making(self, folder: Path) -> Iterator[None]:
        with self._held(folder):
            self._download(folder)
            yield

    @contextmanager
    def reading(self, folder: Path) -> Iterator[None]:
        with self._held(folder):
            self._download(folder)
            yield

    def _download(self, folder: Path) -> None:
        """Make the mirror's copy of a checkpoint equal to the object store, each file checked by its hash."""
        with self._disk.lock(self.root / ".local" / f"{folder.name}.lock"):
            there = {entry.path: entry.bytes for entry in self.walk(folder)}
            for path in [entry.path for entry in self._disk.walk(folder)]:
                if path not in there:
                    path.unlink(missing_ok=True)
            manifest = _record_of(folder, there)
            same = (
                manifest in there
                and manifest.exists()
                and manifest.read_bytes() == self.read(manifest)
            )
            needed = sum(
                size
                for path, size in there.items()
                if not path.exists() or path.stat().st_size != size
            )
            self._make_room(needed, folder)
            with self._explained("read", folder):
                # Small files, which hold the hashes.
                for path in (p for p in there if p.suffix == ".json"):
                    if not (same and path.exists() and path.stat().st_size == there[path]):
                        self._get(path)
                hashes = _hashes(folder)
                for path in (p for p in there if p.suffix != ".json" or p.name in hashes):
                    known = path.exists() and path.stat().st_size == there[path]
                    if known and (same or _sha256(path) == hashes.get(path.name)):
                        continue
                    self._get(path)
                    if path.name in hashes and _sha256(path) != hashes[path.name]:
                        path.unlink()
                        raise StoreError(
                            f"{self.where(path)}: is damaged (its SHA-256 differs from the manifest); delete "
                            f"{self.where(folder)} and run the sweep again"
                        )

    @contextmanager
    def _held(self, folder: Path) -> Iterator[None]:
        """Mark a folder as in use, so that no process of this machine deletes it to make room, and as just used."""
        mark = self.root / ".local" / f"{folder.name}.held"
        mark.parent.mkdir(parents=True, exist_ok=True)
        with mark.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(mark)
            yield

    def _make_room(self, needed: int, wanted: Path) -> None:
        """Delete checkpoints of this machine that no process holds, least recently used first, until `needed` bytes fit."""
        folders = (
            [path for path in wanted.parent.iterdir() if path.is_dir() and path != wanted]
            if wanted.parent.is_dir()
            else []
        )
        sizes = {path: sum(entry.bytes for entry in self._disk.walk(path)) for path in folders}
        taken, limit = sum(sizes.values()), cache_limit(self.root, sum(sizes.values()))
        for path in sorted(folders, key=self._used):
            if taken + needed <= limit:
                return
            mark = self.root / ".local" / f"{path.name}.held"
            mark.parent.mkdir(parents=True, exist_ok=True)
            with mark.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(path, ignore_errors=True)
                taken -= sizes[path]

    def _used(self, folder: Path) -> float:
        mark = self.root / ".local" / f"{folder.name}.held"
        return mark.stat().st_mtime if mark.exists() else 0.0

    # -- locks ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(
        self, path: Path, timeout: float | None = None, on_wait: Waiting | None = None
    ) -> Iterator[None]:
        name = path.relative_to(self.root).with_suffix("").as_posix()
        with contextlib.ExitStack() as held:
            with self._explained("lock", path):
                held.enter_context(self.leases.lock(name, timeout, on_wait))
            yield


class _Prefetched(ObjectStore):
    """A snapshot of an object store: the files of some folders, listed and read at once and cached by their ETag."""

    def __init__(self, live: ObjectStore, folders: Sequence[Path], paths: Sequence[Path]) -> None:
        self.__dict__.update(copy.copy(live).__dict__)
        self._folders = set(folders)
        with self._explained("list", self.root):
            found: dict[str, Any] = {}
            for place in {folder.parent for folder in folders} if len(folders) > 8 else folders:
                found |= self._fs.find(self._key(place), detail=True)
        self._listed = {self._path(key): about for key, about in found.items()}
        wanted = [
            path
            for path in self._listed
            if path.suffix == ".json" and self._folders & set(path.parents)
        ]
        self._contents: dict[Path, bytes | None] = {}
        asked = []
        for path in wanted:
            cached = self._cached(path)
            if cached is not None and cached.exists():
                self._contents[path] = cached.read_bytes()
            else:
                asked.append(path)
        keys = {self._key(path): path for path in (*asked, *paths)}
        with self._explained("read", self.root):
            read = self._fs.cat(list(keys), on_error="return") if keys else {}
        by_key = {str(key).lstrip("/"): content for key, content in read.items()}
        for key, path in keys.items():
            content = by_key.get(key.lstrip("/"))
            if isinstance(content, bytes):
                self._contents[path] = content
                cached = self._cached(path)
                if cached is not None:
                    with contextlib.suppress(StoreError):
                        fill = functools.partial(Path.write_bytes, data=content)
                        self._disk.write(cached, fill, durable=False)
            elif content is None or isinstance(content, FileNotFoundError):
                self._contents[path] = None

    def _cached(self, path: Path) -> Path | None:
        about = self._listed.get(path, {})
        mark = about.get("ETag") or about.get("etag")
        return (
            None
            if not mark
            else self.root / ".etags" / hashlib.sha256(f"{path} {mark}".encode()).hexdigest()
        )

    def _is_known(self, path: Path) -> bool:
        return bool(self._folders & set(path.parents))

    def read(self, path: Path) -> bytes:
        if path in self._contents or self._is_known(path):
            content = self._contents.get(path)
            if content is not None:
                return content
            if path not in self._listed or path in self._contents:
                raise FileNotFoundError(str(path))
        return super().read(path)

    def exists(self, path: Path) -> bool:
        return path in self._listed if self._is_known(path) else super().exists(path)

    def names(self, folder: Path) -> list[str]:
        if folder not in self._folders and not self._is_known(folder):
            return super().names(folder)
        names = {
            path.relative_to(folder).parts[0] for path in self._listed if folder in path.parents
        }
        return sorted(name for name in names if not name.startswith("."))


def cache_limit(root: Path, taken: int) -> int:
    """Bytes that a mirror may take on this machine; HARNESS_CACHE_LIMIT, in bytes or as 200GB, overrides it."""
    stated = os.environ.get("HARNESS_CACHE_LIMIT", "")
    if stated:
        return bytes_of(stated, "HARNESS_CACHE_LIMIT")
    place = root
    while not place.exists():
        place = place.parent
    return int((shutil.disk_usage(place).free + taken) * CACHE_SHARE)


def _connect(url: str) -> tuple[Any, str]:
    if re.match(r"[^/]+//[^/]*@", url):
        shown = re.sub(r"//[^/]*@", "//…@", url)
        raise StoreError(
            f"{shown}: keys and passwords do not belong in a URL, which is recorded; use the variables or files of the provider "
            "(AWS_ACCESS_KEY_ID, ~/.aws/credentials, …)"
        )
    import fsspec.core

    protocol = url.partition("://")[0]
    try:
        fs, prefix = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES.get(protocol, "")
        way_out = (
            f"pip install {package}" if package else "install the package that the message names"
        )
        extra = " (or quantization-harness[s3])" if package == "s3fs" else ""
        raise StoreError(f"{url}: {error}; {way_out}{extra}") from error
    except ValueError as error:
        raise StoreError(f"{url}: {error}") from error
    return fs, str(prefix).rstrip("/")


def _modified(about: dict[str, Any]) -> float:
    """Seconds since the epoch; now where the file system does not say, so that no file counts as old by mistake."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = about.get(name)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.datetime.fromisoformat(value).timestamp()
    return time.time()


def _record_of(folder: Path, there: Iterable[Path] = ()) -> Path:
    """The file that was written last and holds the hashes of the others: of a reduced model reduction.json."""
    reduced = folder / "reduction.json"
    return reduced if reduced in there or reduced.exists() else folder / "manifest.json"


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, from the manifest, or where there is none yet from the descriptions of the finished blocks."""
    manifest = _record_of(folder)
    if manifest.exists():
        files = json.loads(manifest.read_bytes()).get("files", {})
        return {name: str(entry["sha256"]) for name, entry in files.items()}
    found = {}
    for path in folder.glob("*.json"):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and isinstance(content.get("file"), dict):
            found[f"{path.stem}.safetensors"] = str(content["file"]["sha256"])
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
