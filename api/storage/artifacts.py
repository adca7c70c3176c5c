"""Finished outputs where every machine finds them: published at an fsspec URL, fetched into the data directory.

What lives here: the store behind BITRANK_STORE, for workers that share a database but no disk. The data directory stays
the only place where anything is computed; the store holds what is finished. Which output is published when is for
`tasks.py` and `profiles.py`.

    <store>/<name>/…      the files of one output
    <store>/<name>.json   their digests, written last: without it the output is not there
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol
from uuid import uuid4

from api.settings import Settings, SettingsError


class Store(Protocol):
    """Outputs by name. Names are content addresses, so an output that is made twice is the same twice."""

    def has(self, name: str) -> bool: ...

    def publish(self, name: str, folder: Path, files: Iterable[Path]) -> None:
        """Copy files of `folder` out as one output, in this order, unless the store has it."""

    def fetch(self, name: str, folder: Path) -> bool:
        """Make an output's files in `folder` those published; false where there is no such output."""

    def restore(self, name: str, folder: Path) -> bool:
        """`folder` as it was published, whole or not at all; false where there is no such output."""

    def remove(self, name: str) -> None:
        """Drop an output that nobody needs any more, if it is there."""


def open_store(settings: Settings) -> Store:
    """The store at BITRANK_STORE. Raises `SettingsError` for a URL of a kind that cannot be reached."""
    return RemoteStore(settings.store) if settings.store else SharedDisk()


class SharedDisk:
    """No store: every machine sees the same data directory, where every output is already."""

    def has(self, name: str) -> bool:
        return False

    def publish(self, name: str, folder: Path, files: Iterable[Path]) -> None:
        return None

    def fetch(self, name: str, folder: Path) -> bool:
        return False

    def restore(self, name: str, folder: Path) -> bool:
        return False

    def remove(self, name: str) -> None:
        return None


class RemoteStore:
    """A store at an fsspec URL. Raises `OSError` while it is away, which a job waits out."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.dirfs import DirFileSystem

        try:
            files, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            kind = url.partition("://")[0][:16]
            raise SettingsError(
                f"BITRANK_STORE with {kind}:// cannot be used ({error}); install the package or give another URL"
            ) from error
        self._files: Any = DirFileSystem(root, files)

    def has(self, name: str) -> bool:
        return self._manifest(name) is not None

    def publish(self, name: str, folder: Path, files: Iterable[Path]) -> None:
        if self.has(name):
            return
        digests = {}
        for file in files:
            inside = file.relative_to(folder).as_posix()
            digests[inside] = _sha256(file)
            self._files.makedirs(f"{name}/{inside}".rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(file), f"{name}/{inside}")
        self._files.pipe_file(f"{name}.json", json.dumps(digests, indent=1).encode())

    def fetch(self, name: str, folder: Path) -> bool:
        manifest = self._manifest(name)
        if manifest is None:
            return False
        for inside, digest in manifest.items():
            target = folder / inside
            if not (target.is_file() and _sha256(target) == digest):
                self._fetch_file(f"{name}/{inside}", target, digest)
        return True

    def restore(self, name: str, folder: Path) -> bool:
        if not self.has(name):
            return False
        with whole(folder) as temporary:
            return self.fetch(name, temporary)

    def remove(self, name: str) -> None:
        if self.has(name):
            self._files.rm_file(f"{name}.json")
            self._files.rm(name, recursive=True)

    def _manifest(self, name: str) -> dict[str, str] | None:
        """Digests by path; None where there is none, or one that is being written."""
        try:
            found: dict[str, str] = json.loads(self._files.cat_file(f"{name}.json"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    def _fetch_file(self, path: str, target: Path, digest: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
        try:
            self._files.get_file(path, str(temporary))
            if _sha256(temporary) != digest:
                raise OSError(f"{path} in the store is not what was published; remove it and its .json there")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, unless another process made that meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        rmtree(temporary, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()
