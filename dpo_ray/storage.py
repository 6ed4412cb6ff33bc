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
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from dpo_ray.errors import StorageError
from dpo_ray.storage_errors import explained, raise_without_bucket, s3_code, shown


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI, and the path within it.

    Raises:
        StorageError: No file system is known for the URI's scheme.
    """
    try:
        # A cached listing would hide what another process has just written.
        options = {} if "://" not in uri or uri.startswith("file://") else {"use_listings_cache": False}
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        scheme = uri.partition("://")[0]
        raise StorageError(
            f"{shown(uri)}: {scheme}:// needs a package that is not installed: {error} (on every node)"
        ) from None
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{shown(uri)}: {error}; write a local path, s3://bucket/prefix, or another scheme that fsspec knows"
        ) from None
    return fs, path


def check_reachable(uri: str) -> None:
    """Fails within seconds when the server of a URI cannot be reached; all else is left to what comes next.

    A server that goes away later is waited for much longer: it was there, and will come back.

    Raises:
        StorageError: Nothing answers.
    """
    if not uri.startswith("s3://"):
        return
    with _explained(uri):
        fs = fsspec.filesystem(
            "s3",
            config_kwargs={"connect_timeout": 5, "read_timeout": 5, "retries": {"total_max_attempts": 2}},
            skip_instance_cache=True,
        )
        fs.retries = 1
        try:
            fs.call_s3("head_bucket", Bucket=fs.split_path(uri)[0])
        except OSError as error:
            if s3_code(error) is None:
                raise


def is_local(uri: str) -> bool:
    """Whether a URI names a path of this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def name_of(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def as_storage_error(uri: str, error: Exception) -> Exception:
    """What a file system raised while a stream was read, as one message; an error with a message of its own stays."""
    try:
        with _explained(uri):
            raise error
    except Exception as explained_error:
        return explained_error


def is_damage(error: Exception) -> bool:
    """Whether an error says that a file's content is broken, not that the storage failed."""
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile | pa.ArrowException):
        return True
    # Arrow's own decompressors and readers raise bare OSErrors.
    return type(error) is OSError and error.errno is None and s3_code(error) is None


def join(uri: str, *parts: str) -> str:
    """Joins path parts to a URI."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    """Whether an object is there."""
    with _explained(uri):
        fs, path = filesystem(uri)
        try:
            _ = os.stat(path) if isinstance(fs, LocalFileSystem) else fs.info(path)
        except FileNotFoundError as error:
            raise_without_bucket(error)
            return False
        return True


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """A whole object, or its bytes from `start` up to `stop`.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It cannot be read.
    """
    with _explained(uri):
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path, start=start, end=stop))


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
        with _written_beside(path, data) as written:
            os.replace(written, path)


def create(uri: str, data: bytes) -> bool:
    """Writes a whole object where there is none: of many that try at the same time, one succeeds.

    Args:
        uri: Where.
        data: The content. No two callers may write the same: when an answer is lost and the request repeated, ours is
            told from another's by its content.

    Returns:
        Whether the object is ours. Servers without conditional writes let everyone succeed: `doctor` says which.

    Raises:
        StorageError: It cannot be written.
    """
    with _explained(uri):
        fs, path = filesystem(uri)
        if isinstance(fs, LocalFileSystem):
            with _written_beside(path, data) as written, contextlib.suppress(FileExistsError):
                os.link(written, path)
                return True
        else:
            for _ in range(10):
                try:
                    fs.pipe_file(path, data, mode="create")
                    return True
                except OSError as error:
                    code = s3_code(error)
                    # A conflict with a write in progress, which may yet fail.
                    if code in ("409", "ConditionalRequestConflict", "OperationAborted"):
                        continue
                    if code not in ("412", "PreconditionFailed") and not isinstance(error, FileExistsError):
                        raise
                    break
        with contextlib.suppress(FileNotFoundError):
            return read_bytes(uri) == data
        return False


@contextlib.contextmanager
def _written_beside(path: str, data: bytes) -> Iterator[str]:
    """A durable file with this content in the folder of `path`, which goes at the end where it was not renamed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".writing-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            yield file.name
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)


def read_json(uri: str) -> Any:
    """An object that holds JSON."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Writes JSON with sorted keys, so that equal values are equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A stream of an object's bytes, decompressed where the name ends in .gz or .zst, and how far it is read.

    The second value gives the bytes of the object, as it is stored, that have been read so far.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It cannot be opened.
    """
    with _explained(uri):
        fs, path = filesystem(uri)
        raw = fs.open(path, "rb")
    with raw:
        if uri.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield cast(BinaryIO, io.BufferedReader(unzipped)), raw.tell
        elif uri.endswith(".zst"):
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as unzipped:
                yield cast(BinaryIO, io.BufferedReader(unzipped)), raw.tell
        else:
            yield raw, raw.tell


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
        try:
            fs.rm(path, recursive=True)
        except FileNotFoundError as error:
            raise_without_bucket(error)
            return
        # s3fs does not pass on that a server refused to delete.
        if not isinstance(fs, LocalFileSystem):
            left = [name for name, about in fs.find(path, detail=True).items() if about["type"] == "file"]
            if left:
                raise StorageError(f"{shown(uri)}: could not be deleted ({left[0]}); grant s3:DeleteObject")


def list_names(uri: str) -> list[str]:
    """Names right below a prefix, sorted; empty when nothing is there."""
    with _explained(uri):
        fs, path = filesystem(uri)
        try:
            entries = fs.ls(path, detail=False)
        except FileNotFoundError as error:
            raise_without_bucket(error)
            return []
        return sorted(os.path.basename(str(entry).rstrip("/")) for entry in entries)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file as a listing has it.

    Attributes:
        uri: The file.
        num_bytes: Its size.
        identity: What changes when its content does: etag, or size and time of change.
    """

    uri: str
    num_bytes: int
    identity: str


def expand(pattern: str) -> list[FileInfo]:
    """Files that a path, a folder or a glob stands for, sorted; listed, not asked for one by one.

    Raises:
        StorageError: There is none, or the place cannot be read.
    """
    with _explained(pattern):
        fs, path = filesystem(pattern)
        if any(mark in path for mark in "*?["):
            found = fs.glob(path, detail=True)
        elif fs.isdir(path):
            if isinstance(fs, LocalFileSystem):
                os.listdir(path)  # What may not be read is not empty.
            # An empty folder, where a server has those, is found as itself.
            files = {name: about for name, about in fs.find(path, detail=True).items() if about["type"] != "directory"}
            found = {name: about for name, about in files.items() if not os.path.basename(name).startswith((".", "_"))}
        else:
            found = {path: fs.info(path)} if exists(pattern) else {}
        if not found:
            exists(pattern)  # Fails where the bucket is missing.
            raise StorageError(f"{pattern}: no such file; give a file, a folder, or a glob such as pairs/*.jsonl.gz")
        local = isinstance(fs, LocalFileSystem)
        infos = [
            FileInfo(name if local else fs.unstrip_protocol(name), int(about["size"] or 0), _identity(about))
            for name, about in found.items()
        ]
        return sorted(infos, key=lambda info: info.uri)


def identity(uri: str) -> str:
    """What changes when an object's content does, without reading it: etag, or size and time of change."""
    with _explained(uri):
        fs, path = filesystem(uri)
        return _identity(fs.info(path))


def _identity(about: dict[str, Any]) -> str:
    mark = about.get("ETag") or about.get("etag") or about.get("mtime") or about.get("LastModified")
    return f"{about.get('size')}:{mark}"


def size(uri: str) -> int:
    """Bytes of an object."""
    with _explained(uri):
        fs, path = filesystem(uri)
        return int(fs.size(path))


def sha256_of_file(local_path: str) -> str:
    """SHA-256 of a local file, in hex."""
    with open(local_path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _explained(uri: str) -> contextlib.AbstractContextManager[None]:
    return explained(uri, filesystem)


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
