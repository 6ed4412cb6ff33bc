"""Local paths and object storage behind one set of functions: the sole owner of fsspec and s3fs.

Credentials and endpoints come from where the AWS tools take them (environment, shared files, instance roles), so that
none ever stands in a configuration.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dpo_ray.errors import StorageError

_PROBLEMS = (OSError, ValueError, ImportError)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI, and the path within it.

    Raises:
        StorageError: No file system is known for the URI's scheme.
    """
    try:
        # A cached listing would hide what another process has just written.
        options = {} if "://" not in uri or uri.startswith("file://") else {"use_listings_cache": False}
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except _PROBLEMS as error:
        raise StorageError(f"{uri}: {error}") from None
    return fs, path


def is_local(uri: str) -> bool:
    """Whether a URI names a path of this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """Joins path parts to a URI."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    """Whether an object is there."""
    with _explained(uri):
        fs, path = filesystem(uri)
        return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """A whole object.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It cannot be read.
    """
    with _explained(uri):
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a whole object atomically: a reader sees the old one or the new one, never a part.

    Raises:
        StorageError: It cannot be written.
    """
    with _explained(uri):
        fs, path = filesystem(uri)
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".writing-", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def read_json(uri: str) -> Any:
    """An object that holds JSON."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Writes JSON with sorted keys, so that equal values are equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[BinaryIO]:
    """A stream of an object's bytes, decompressed where the name ends in .gz.

    Raises:
        StorageError: It cannot be opened.
    """
    with _explained(uri):
        fs, path = filesystem(uri)
        raw = fs.open(path, "rb")
    with raw:
        if uri.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield io.BufferedReader(unzipped)
        else:
            yield raw


def upload(local_path: str, uri: str) -> None:
    """Copies a local file to an object."""
    with _explained(uri):
        fs, path = filesystem(uri)
        if isinstance(fs, LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        fs.put_file(local_path, path)


def download(uri: str, local_path: str) -> None:
    """Copies an object to a local file, which appears only when it is whole."""
    with _explained(uri):
        fs, path = filesystem(uri)
        os.makedirs(os.path.dirname(local_path), exist_ok=True)
        partial = f"{local_path}.{os.getpid()}.partial"
        fs.get_file(path, partial)
        os.replace(partial, local_path)


def remove(uri: str) -> None:
    """Removes an object or everything below a prefix; nothing happens when it is not there."""
    with _explained(uri):
        fs, path = filesystem(uri)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def list_names(uri: str) -> list[str]:
    """Names right below a prefix, sorted; empty when nothing is there."""
    with _explained(uri):
        fs, path = filesystem(uri)
        try:
            entries = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(os.path.basename(str(entry).rstrip("/")) for entry in entries)


def expand(pattern: str) -> list[str]:
    """Files that a path, a folder or a glob stands for, sorted.

    Raises:
        StorageError: There is none, or the place cannot be read.
    """
    with _explained(pattern):
        fs, path = filesystem(pattern)
        if any(mark in path for mark in "*?["):
            found = fs.glob(path)
        elif fs.isdir(path):
            found = [name for name in fs.find(path) if not os.path.basename(name).startswith((".", "_"))]
        else:
            found = [path] if fs.exists(path) else []
        if not found:
            raise StorageError(f"{pattern}: no such file; give a file, a folder, or a glob such as pairs/*.jsonl.gz")
        return sorted(fs.unstrip_protocol(name) if not isinstance(fs, LocalFileSystem) else name for name in found)


def identity(uri: str) -> str:
    """What changes when an object's content does, without reading it: etag, or size and time of change."""
    with _explained(uri):
        fs, path = filesystem(uri)
        info = fs.info(path)
        mark = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
        return f"{info.get('size')}:{mark}"


def sha256_of_file(local_path: str) -> str:
    """SHA-256 of a local file, in hex."""
    with open(local_path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turns what the file systems raise into one message; a missing file stays a FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise StorageError(f"{uri}: storage said: {reason}") from error


class JsonLines:
    """A growing file of JSON lines. Object storage cannot append, so `flush` puts all lines as a whole."""

    def __init__(self, uri: str, keep_until_step: int) -> None:
        """Opens the file and drops the lines of steps after `keep_until_step`: they will be done again."""
        self.uri = uri
        self._lines = [line for line in read_json_lines(uri) if line["step"] <= keep_until_step]
        self._dirty = True
        self.flush()

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line; it is durable after the next `flush`."""
        self._lines.append(value)
        self._dirty = True

    def flush(self) -> None:
        """Makes all lines durable."""
        if self._dirty:
            write_json_lines(self.uri, self._lines)
            self._dirty = False


def read_json_lines(uri: str) -> list[dict[str, Any]]:
    """All lines of a JSON Lines object; empty when it is not there."""
    if not exists(uri):
        return []
    return [json.loads(line) for line in read_bytes(uri).decode().splitlines() if line]


def write_json_lines(uri: str, lines: list[dict[str, Any]]) -> None:
    """Writes a JSON Lines object as a whole."""
    write_bytes(uri, "".join(json.dumps(line) + "\n" for line in lines).encode())


def fingerprint(value: Any) -> str:
    """A digest of anything JSON can hold: 24 hex digits of SHA-256 over its canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]
