"""Local paths and object storage behind one set of functions.

Outages are waited out by each of them, so that nobody else need think of them: see `storage_requests`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
from fsspec.asyn import sync
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from dpo_ray.errors import DataError, StorageError
from dpo_ray.redaction import shown
from dpo_ray.storage_errors import explained, raise_without_bucket, s3_code
from dpo_ray.storage_requests import asked_again, call, time_limit_s
from dpo_ray.storage_requests import check_reachable as check_reachable
from dpo_ray.storage_requests import failing as failing
from dpo_ray.storage_requests import filesystem as filesystem
from dpo_ray.storage_requests import is_local as is_local
from dpo_ray.storage_requests import patience as patience

# A listing or a deletion is as many requests as there are thousands of objects.
MANY_REQUESTS_S = 1800.0
STREAM_BLOCK_BYTES = 8 << 20
_PIECE_BYTES = 8 << 20
# A transfer whose last part came or went this long ago stands still.
TRANSFER_PAUSE_S = 30.0
_part_went_at = -math.inf
# Folders of this name, not locked, and as old as this, are nobody's any more.
_SCRATCH, SCRATCH_S = "dpo_ray-scratch-", 60.0
# What a local file is called until it is whole; on an object store it is not there before.
_UNFINISHED = ".writing-"


def name_of(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def as_storage_error(uri: str, error: Exception) -> Exception:
    """What a file system raised while a stream was read, as one message; an error with a message of its own stays."""
    try:
        with explained(uri, filesystem):
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


@asked_again()
def exists(uri: str) -> bool:
    """Whether an object is there."""
    fs, path = filesystem(uri)
    try:
        _ = os.stat(path) if isinstance(fs, LocalFileSystem) else call(fs, "info", path)
    except FileNotFoundError as error:
        raise_without_bucket(error)
        return False
    return True


@asked_again()
def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """A whole object, or its bytes from `start` up to `stop`.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It cannot be read.
    """
    fs, path = filesystem(uri)
    return _read(fs, path, start, stop)


def _read(fs: Any, path: str, start: int | None, stop: int | None, etag: str | None = None) -> bytes:
    if start is not None and start == stop:
        return b""
    if "s3" not in fs.protocol:
        return bytes(
            call(fs, "cat_file", path, start=start, end=stop, within_s=time_limit_s((stop or 0) - (start or 0)))
        )
    # Not by s3fs, which asks for the size of an object first, and does not know how long its body may take.
    bucket, key, _ = fs.split_path(path)
    wanted = {"Bucket": bucket, "Key": key}
    if start is not None or stop is not None:
        wanted["Range"] = f"bytes={start or 0}-{'' if stop is None else stop - 1}"
    if etag:
        wanted["IfMatch"] = etag
    return cast(bytes, sync(fs.loop, _get_object, fs, wanted))


async def _get_object(fs: Any, wanted: dict[str, str]) -> bytes:
    async with asyncio.timeout(time_limit_s()):
        answer = await fs._call_s3("get_object", **wanted)
    num_bytes = answer["ContentLength"]
    try:
        async with asyncio.timeout(time_limit_s(num_bytes)):
            data: bytes = await answer["Body"].read()
    finally:
        answer["Body"].close()
    if len(data) != num_bytes:
        raise ConnectionError(f"{len(data)} bytes came of {num_bytes}")
    return data


@asked_again(writes=True)
def write_bytes(uri: str, data: bytes) -> None:
    """Writes a whole object atomically: a reader sees the old one or the new one, never a part.

    Raises:
        StorageError: It cannot be written.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        call(fs, "pipe_file", path, data, within_s=time_limit_s(len(data)))
        return
    _write_local(path, [data])


@asked_again(writes=True)
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
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with _written_beside(path, [data]) as written, contextlib.suppress(FileExistsError):
            os.link(written, path)
            return True
    else:
        try:
            call(fs, "pipe_file", path, data, mode="create", within_s=time_limit_s(len(data)))
            return True
        except OSError as error:
            # A conflict with a write in progress, which may yet fail, is asked again.
            if s3_code(error) not in ("412", "PreconditionFailed") and not isinstance(error, FileExistsError):
                raise
    with contextlib.suppress(FileNotFoundError):
        return read_bytes(uri) == data
    return False


def sync_folder(path: str) -> None:
    """Makes it durable that a local file is in its folder: a power cut may otherwise take the name."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_local(path: str, pieces: Iterable[bytes]) -> None:
    with _written_beside(path, pieces) as written:
        os.replace(written, path)
        sync_folder(path)


@contextlib.contextmanager
def _written_beside(path: str, pieces: Iterable[bytes]) -> Iterator[str]:
    """A durable file with this content in the folder of `path`, which goes at the end where it was not renamed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=_UNFINISHED, delete=False) as file:
        try:
            for piece in pieces:
                file.write(piece)
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
    raw = _opened(uri)
    with raw:
        if uri.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield cast(BinaryIO, io.BufferedReader(unzipped)), raw.tell
        elif uri.endswith(".zst"):
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as unzipped:
                yield cast(BinaryIO, io.BufferedReader(unzipped)), raw.tell
        else:
            yield raw, raw.tell


@asked_again()
def open_ranges(uri: str) -> BinaryIO:
    """An object, of which only those bytes are fetched that are read: nothing ahead, where its file system allows.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It cannot be opened.
    """
    fs, path = filesystem(uri)
    about = {} if isinstance(fs, LocalFileSystem) else call(fs, "info", path)
    if about.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
    if about.get("size") is None:
        return cast(BinaryIO, fs.open(path, "rb"))
    return cast(BinaryIO, _ObjectStream(uri, about["size"], about.get("ETag")))


def _opened(uri: str) -> BinaryIO:
    """An object from beginning to end, fetched in blocks."""
    raw = open_ranges(uri)
    return io.BufferedReader(raw, STREAM_BLOCK_BYTES) if isinstance(raw, _ObjectStream) else raw


class _ObjectStream(io.RawIOBase):
    """A remote object, read by ranges: one that fails is asked for again, and the stream goes on where it stood."""

    def __init__(self, uri: str, num_bytes: int, etag: str | None) -> None:
        self._uri, self._num_bytes, self._etag = uri, num_bytes, etag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(
            0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._num_bytes)
        if stop <= self._position:
            return 0
        data = _read_range(self._uri, self._position, stop, self._etag)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@asked_again()
def _read_range(uri: str, start: int, stop: int, etag: str | None) -> bytes:
    fs, path = filesystem(uri)
    data = _read(fs, path, start, stop, etag)
    if len(data) != stop - start:
        raise ConnectionError(f"{len(data)} bytes came of {stop - start}")
    return data


@asked_again(writes=True)
def upload(local_path: str, uri: str) -> None:
    """Copies a local file to an object, which appears only when it is whole."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        _write_local(path, _pieces(local_path))
        return
    limit_s = time_limit_s(os.path.getsize(local_path))
    call(fs, "put_file", local_path, path, callback=Callback(hooks={"part": part_went}), within_s=limit_s)


def _pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
            part_went()


@asked_again()
def download(uri: str, local_path: str) -> None:
    """Copies an object to a local file, which appears only when it is whole."""
    fs, path = filesystem(uri)
    num_bytes = call(fs, "size", path)
    os.makedirs(os.path.dirname(local_path), exist_ok=True)
    partial = f"{local_path}.{os.getpid()}-{threading.get_ident()}.partial"
    try:
        call(
            fs,
            "get_file",
            path,
            partial,
            callback=Callback(hooks={"part": part_went}),
            within_s=time_limit_s(num_bytes or 0),
        )
        if num_bytes is not None and os.path.getsize(partial) != num_bytes:
            raise ConnectionError(f"{os.path.getsize(partial)} bytes came of {num_bytes}")
        os.replace(partial, local_path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def part_went(*_: Any, **__: Any) -> None:
    """Takes note that a large transfer goes on."""
    global _part_went_at
    _part_went_at = time.monotonic()


def transferring() -> bool:
    """Whether a large transfer of this process goes on, however long it takes."""
    return time.monotonic() - _part_went_at < TRANSFER_PAUSE_S


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[str]:
    """A local folder for large files, which goes at the end; those that killed processes have left go before.

    Args:
        purpose: Part of its name.
    """
    _remove_left_scratch()
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{purpose}-") as folder:
        # The system gives the lock back when the process dies, and shows it to other containers too.
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(held)


def _remove_left_scratch() -> None:
    for entry in os.scandir(tempfile.gettempdir()):
        # Of one that was made just now the lock may still be to come; another user's cannot be opened.
        with contextlib.suppress(OSError):
            if entry.name.startswith(_SCRATCH) and time.time() - entry.stat().st_mtime > SCRATCH_S:
                held = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(held)


@contextlib.contextmanager
def while_it_grows(folder: str, look_s: float = 5.0) -> Iterator[None]:
    """Takes what a library writes into a local folder, as long as the folder grows, for a transfer that goes on."""
    done = threading.Event()

    def look() -> None:
        known = 0
        while not done.wait(look_s):
            with contextlib.suppress(FileNotFoundError):
                if (size := sum(each.stat().st_size for each in os.scandir(folder))) > known:
                    known = size
                    part_went()

    thread = threading.Thread(target=look, name="growth", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@asked_again()
def remove(uri: str) -> None:
    """Removes an object or everything below a prefix; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    try:
        call(fs, "rm", path, recursive=True, within_s=time_limit_s(base_s=MANY_REQUESTS_S))
    except FileNotFoundError as error:
        raise_without_bucket(error)
        return
    # s3fs does not pass on what a server has not deleted, nor why.
    if not isinstance(fs, LocalFileSystem):
        found = call(fs, "find", path, detail=True, within_s=time_limit_s(base_s=MANY_REQUESTS_S))
        for name in [name for name, about in found.items() if about["type"] == "file"][:1]:
            try:
                call(fs, "rm_file", name)
            except PermissionError:
                raise StorageError(f"{shown(uri)}: could not be deleted ({name}); grant s3:DeleteObject") from None
            raise ConnectionError(f"{name} was not deleted with the others")


@asked_again()
def remove_file(uri: str) -> None:
    """Removes one object, by one request; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        call(fs, "rm_file", path)


@asked_again()
def list_names(uri: str) -> list[str]:
    """Names right below a prefix, sorted; empty when nothing is there. What is still being written is not."""
    fs, path = filesystem(uri)
    try:
        entries = call(fs, "ls", path, detail=False, within_s=time_limit_s(base_s=MANY_REQUESTS_S))
    except FileNotFoundError as error:
        raise_without_bucket(error)
        return []
    names = sorted(os.path.basename(str(entry).rstrip("/")) for entry in entries)
    return [name for name in names if not name.startswith(_UNFINISHED)]


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


@asked_again()
def expand(pattern: str, or_none: bool = False) -> list[FileInfo]:
    """Files that a path, a folder or a glob stands for, sorted; listed, not asked for one by one.

    Args:
        pattern: The path, folder or glob.
        or_none: Whether there may be none.

    Raises:
        StorageError: There is none, or the place cannot be read.
    """
    fs, path = filesystem(pattern)
    local, listing_s = isinstance(fs, LocalFileSystem), time_limit_s(base_s=MANY_REQUESTS_S)
    if any(mark in path for mark in "*?["):
        found = fs.glob(path, detail=True) if local else _globbed(fs, path)
    elif call(fs, "isdir", path, within_s=listing_s):
        if local:
            os.listdir(path)  # What may not be read is not empty.
        # An empty folder, where a server has those, is found as itself.
        files = call(fs, "find", path, detail=True, within_s=listing_s)
        files = {name: about for name, about in files.items() if about["type"] != "directory"}
        found = {name: about for name, about in files.items() if not os.path.basename(name).startswith((".", "_"))}
    else:
        found = {path: call(fs, "info", path)} if exists(pattern) else {}
    if not found and not or_none:
        exists(pattern)  # Fails where the bucket is missing.
        raise StorageError(f"{pattern}: no such file; give a file, a folder, or a glob such as pairs/*.jsonl.gz")
    infos = [
        FileInfo(name if local else fs.unstrip_protocol(name), int(about["size"] or 0), _identity(about))
        for name, about in found.items()
    ]
    return sorted(infos, key=lambda info: info.uri)


def _globbed(fs: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """What fits a pattern. The file systems' own glob leaves out what it fails to list, as if it were not there."""
    within_s = time_limit_s(base_s=MANY_REQUESTS_S)
    parts = pattern.split("/")
    depth = next(depth for depth, part in enumerate(parts) if re.search(r"[*?[]", part))
    root = "/".join(parts[:depth])
    if "**" in pattern:
        found = call(fs, "find", root, detail=True, withdirs=True, within_s=within_s)
        return {name: about for name, about in found.items() if re.match(glob_translate(pattern), name)}
    found, folders = {}, [root]
    for upto in range(depth + 1, len(parts) + 1):
        fits = re.compile(glob_translate("/".join(parts[:upto])))
        found = {}
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                for about in call(fs, "ls", folder, detail=True, within_s=within_s):
                    if fits.match(about["name"].rstrip("/")):
                        found[about["name"].rstrip("/")] = about
        folders = [name for name, about in found.items() if about["type"] == "directory"]
    return found


@asked_again()
def identity(uri: str) -> str:
    """What changes when an object's content does, without reading it: etag, or size and time of change."""
    fs, path = filesystem(uri)
    return _identity(call(fs, "info", path))


def _identity(about: dict[str, Any]) -> str:
    mark = about.get("ETag") or about.get("etag") or about.get("mtime") or about.get("LastModified")
    return f"{about.get('size')}:{mark}"


@asked_again()
def size(uri: str) -> int:
    """Bytes of an object."""
    fs, path = filesystem(uri)
    return int(call(fs, "size", path))


def sha256_of_file(local_path: str) -> str:
    """SHA-256 of a local file, in hex."""
    with open(local_path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_lines(uri: str) -> list[dict[str, Any]]:
    """All lines of a JSON Lines object; empty when it is not there.

    Raises:
        DataError: One is no JSON.
    """
    if not exists(uri):
        return []
    found = []
    for number, line in enumerate(read_bytes(uri).split(b"\n"), 1):
        try:
            found += [json.loads(line)] if line else []
        except ValueError as error:
            raise DataError(f"{shown(uri)}: damaged: line {number} is no JSON ({error}); put a copy back") from None
    return found


def write_json_lines(uri: str, lines: list[dict[str, Any]]) -> None:
    """Writes a JSON Lines object as a whole."""
    write_bytes(uri, b"".join(map(json_line, lines)))


def json_line(value: Any) -> bytes:
    """A line of a JSON Lines object."""
    return json.dumps(value).encode() + b"\n"


def fingerprint(value: Any) -> str:
    """A digest of anything JSON can hold: 24 hex digits of SHA-256 over its canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]
