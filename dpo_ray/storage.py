"""Local paths and object storage behind one set of functions: the sole owner of fsspec and s3fs.

Credentials and endpoints come from where the AWS tools take them (environment, shared files, instance roles), so that
none ever stands in a configuration.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from dpo_ray.errors import StorageError

# What a server's refusal means, and what to do about it.
_DENIED = (
    "access denied: this identity may not do that here; grant it s3:GetObject, s3:PutObject, s3:DeleteObject and "
    "s3:ListBucket, or use another (AWS_ACCESS_KEY_ID, AWS_PROFILE)"
)
_FULL = "the storage is full: free space there, or raise its quota"
_FAILED = "the server failed again and again: it is overloaded, starting, or out of space or quota; see its log"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION"
_EXPIRED = "the session token is not valid, or no longer: log in again, or renew AWS_SESSION_TOKEN"
_S3_MEANINGS = {
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "Forbidden": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": "the server does not know this access key: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret does not belong to the access key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "RequestTimeTooSkewed": "this machine's clock and the server's differ: set the clock",
    "NoSuchBucket": "there is no such bucket: create it, or correct the URI or AWS_ENDPOINT_URL",
    "404": "there is no such bucket, or no S3 service: create it, or correct the URI or AWS_ENDPOINT_URL",
    "InvalidBucketName": "this cannot be a bucket's name: correct the URI",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "301": _REGION,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "XMinioAdminBucketQuotaExceeded": _FULL,
    "507": _FULL,
    "InternalError": _FAILED,
    "ServiceUnavailable": _FAILED,
    "SlowDown": _FAILED,
    "500": _FAILED,
    "503": _FAILED,
}
_RIGHTS = "permission denied: give this user the rights (chown, chmod), or choose another place"
_LOCAL_MEANINGS = {
    errno.ENOSPC: "no space left on this machine's disk: free some, or choose another place",
    errno.EDQUOT: "this user's disk quota is used up: free some space, or choose another place",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "the file system is read-only: mount it writable, or choose another place",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or choose another place",
    errno.EEXIST: "a file stands where a folder is needed: move it away, or choose another place",
    errno.EISDIR: "a folder stands where a file is needed: correct the path",
}


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
            f"{_shown(uri)}: {scheme}:// needs a package that is not installed: {error} (on every node)"
        ) from None
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{_shown(uri)}: {error}; write a local path, s3://bucket/prefix, or another scheme that fsspec knows"
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
            if _s3_code(error) is None:
                raise


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
        try:
            _ = os.stat(path) if isinstance(fs, LocalFileSystem) else fs.info(path)
        except FileNotFoundError as error:
            _raise_without_bucket(error)
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
                    code = _s3_code(error)
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
            _raise_without_bucket(error)
            return
        # s3fs does not pass on that a server refused to delete.
        if not isinstance(fs, LocalFileSystem):
            left = [name for name, about in fs.find(path, detail=True).items() if about["type"] == "file"]
            if left:
                raise StorageError(f"{_shown(uri)}: could not be deleted ({left[0]}); grant s3:DeleteObject")


def list_names(uri: str) -> list[str]:
    """Names right below a prefix, sorted; empty when nothing is there."""
    with _explained(uri):
        fs, path = filesystem(uri)
        try:
            entries = fs.ls(path, detail=False)
        except FileNotFoundError as error:
            _raise_without_bucket(error)
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
            if isinstance(fs, LocalFileSystem):
                os.listdir(path)  # What may not be read is not empty.
            # An empty folder, where a server has those, is found as itself.
            files = [name for name, about in fs.find(path, detail=True).items() if about["type"] != "directory"]
            found = [name for name in files if not os.path.basename(name).startswith((".", "_"))]
        else:
            found = [path] if exists(pattern) else []
        if not found:
            exists(pattern)  # Fails where the bucket is missing.
            raise StorageError(f"{pattern}: no such file; give a file, a folder, or a glob such as pairs/*.jsonl.gz")
        return sorted(fs.unstrip_protocol(name) if not isinstance(fs, LocalFileSystem) else name for name in found)


def identity(uri: str) -> str:
    """What changes when an object's content does, without reading it: etag, or size and time of change."""
    with _explained(uri):
        fs, path = filesystem(uri)
        info = fs.info(path)
        mark = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
        return f"{info.get('size')}:{mark}"


def size(uri: str) -> int:
    """Bytes of an object."""
    with _explained(uri):
        fs, path = filesystem(uri)
        return int(fs.size(path))


def sha256_of_file(local_path: str) -> str:
    """SHA-256 of a local file, in hex."""
    with open(local_path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turns what the file systems raise into one message; a missing file stays a FileNotFoundError."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not _lacks_bucket(error):
            raise
        message = f"{_shown(uri)}: {_meaning(uri, error)}"
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            message = message.replace(os.environ.get(name) or "\0", "***")
        raise StorageError(message) from error


def _meaning(uri: str, error: BaseException) -> str:
    """What is wrong, and what to do about it."""
    import botocore.exceptions as boto  # type: ignore[import-untyped]

    code = _s3_code(error)
    if code is not None:
        # The answer to HEAD has no body that could tell a wrong secret from a missing right.
        code = _code_of_listing(uri) or code if code.isdigit() else code
        meaning = _S3_MEANINGS.get(code) or str(error)
        return f"{meaning} ({_endpoint(uri)} answered {code})"
    for each in _chain(error):
        if type(each).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            return (
                f"no credentials ({each}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
                "or give the machine a role"
            )
        if isinstance(each, socket.gaierror):
            return f"cannot connect to {_endpoint(uri)}: its name is not known: correct AWS_ENDPOINT_URL, or see to DNS"
        if isinstance(each, ConnectionRefusedError):
            return f"cannot connect to {_endpoint(uri)}: nothing listens: start the server, or correct AWS_ENDPOINT_URL"
        if isinstance(each, ssl.SSLError):
            return f"no secure connection to {_endpoint(uri)}: {each}; correct AWS_ENDPOINT_URL or AWS_CA_BUNDLE"
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | TimeoutError | ConnectionError):
        reason = str(error) or type(error).__name__
        return f"{_endpoint(uri)} does not answer ({reason}): start it, open the way to it, or correct AWS_ENDPOINT_URL"
    if isinstance(error, OSError) and error.errno in _LOCAL_MEANINGS:
        place = _file_in_the_way(error.filename) or error.filename
        return _LOCAL_MEANINGS[error.errno] + (f" ({place})" if isinstance(place, str) else "")
    return f"storage said: {str(error) or type(error).__name__}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _s3_code(error: BaseException) -> str | None:
    """What an S3 server called its refusal, where there was one."""
    for each in _chain(error):
        if isinstance(response := getattr(each, "response", None), dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def _lacks_bucket(error: BaseException) -> bool:
    """Whether not the object is missing but what it should be in."""
    # Without a bucket's name for it, "not found" means that this is no S3 service, unless one object was asked for.
    operations = {getattr(each, "operation_name", None) for each in _chain(error)}
    return _s3_code(error) == "NoSuchBucket" or (
        _s3_code(error) == "404" and not operations & {"HeadObject", "GetObject", "DeleteObject"}
    )


def _raise_without_bucket(error: FileNotFoundError) -> None:
    if _lacks_bucket(error):
        raise error


def _code_of_listing(uri: str) -> str | None:
    fs, path = filesystem(uri)
    try:
        fs.call_s3("list_objects_v2", Bucket=fs.split_path(path)[0], MaxKeys=1)
    except OSError as error:
        return _s3_code(error)
    return None


def _endpoint(uri: str) -> str:
    try:
        return _shown(filesystem(uri)[0].s3.meta.endpoint_url)
    except Exception:  # Another kind of storage, or what is to be explained is that there is no connection.
        return "the server"


def _shown(uri: str) -> str:
    """A URI without the name and password that some schemes allow in it."""
    return re.sub(r"://[^/@]*@", "://", uri)


def _file_in_the_way(path: Any) -> str | None:
    while isinstance(path, str) and path not in ("", "/"):
        if os.path.isfile(path):
            return path
        path = os.path.dirname(path)
    return None


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
