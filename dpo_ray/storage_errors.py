"""What storage says when it fails, in words for the person who must mend it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

from dpo_ray.errors import DpoRayError, ErrorsWithoutSecrets, StorageError
from dpo_ray.redaction import shown, without_secrets

FileSystemOf = Callable[[str], tuple[Any, str]]

# What a server's refusal means, and what to do about it.
_DENIED = (
    "access denied: this identity may not do that here; grant it s3:GetObject, s3:PutObject, s3:DeleteObject and "
    "s3:ListBucket, or use another (AWS_ACCESS_KEY_ID, AWS_PROFILE)"
)
_FULL = "the storage is full: free space there, or raise its quota"
_FAILED = "the server failed again and again: it is overloaded, starting, or out of space or quota; see its log"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION"
_CHANGED = "the object was changed while it was read: leave it as it is until this run has read it"
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
    "412": _CHANGED,
    "PreconditionFailed": _CHANGED,
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
# What the next request may find mended, besides whatever the server marks as its own failure (5xx).
_PASSING_CODES = {
    "408",
    "409",
    "429",
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "NoSuchUpload",  # The answer that completed an upload was lost, or the server has cleaned up: it begins anew.
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "TooManyRequests",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
# Not implemented, version not supported, insufficient storage.
_LASTING_5XX = (501, 505, 507)
# Of file systems that machines share; a local disk has others, or is broken.
_PASSING_ERRNOS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)
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


@contextlib.contextmanager
def explained(uri: str, filesystem: FileSystemOf, tried_s: float = 0.0) -> Iterator[None]:
    """Turns what the file systems raise into one message; a missing file stays a FileNotFoundError.

    Args:
        uri: What is read or written.
        filesystem: Gives the file system of a URI, to ask it more.
        tried_s: For how long it was tried.
    """
    try:
        yield
    except DpoRayError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not lacks_bucket(error) and not is_passing(error, local=False):
            raise
        tried = f"; tried for {tried_s:.0f} s" if tried_s else ""
        with ErrorsWithoutSecrets():
            raise StorageError(said(uri, error, filesystem) + tried) from error


def said(uri: str, error: BaseException, filesystem: FileSystemOf) -> str:
    """What is wrong with what, and what to do about it; without secrets."""
    return without_secrets(f"{shown(uri)}: {_meaning(uri, error, filesystem)}")


def is_passing(error: BaseException, local: bool) -> bool:
    """Whether what failed may succeed when it is tried again: the server or the way to it failed, not the request.

    Args:
        error: What the file system raised.
        local: Whether it is one of this machine's, or mounted there.
    """
    if isinstance(error, DpoRayError):
        return False
    if local:
        return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS
    if (code := s3_code(error)) is not None:
        status = _s3_status(error)
        failed = status >= 500 and status not in _LASTING_5XX and _S3_MEANINGS.get(code) != _FULL
        return code in _PASSING_CODES or failed or status in (408, 429)
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    chain = list(_chain(error))
    return not any(isinstance(each, ssl.SSLCertVerificationError) for each in chain) and any(
        isinstance(each, _way_failures()) for each in chain
    )


@functools.cache
def _way_failures() -> tuple[type[BaseException], ...]:
    """What is raised when the way to a server fails, or what comes over it is not whole."""
    import aiohttp
    import botocore.exceptions as boto  # type: ignore[import-untyped]
    import botocore.parsers  # type: ignore[import-untyped]

    return (
        TimeoutError,
        ConnectionError,
        socket.gaierror,
        ssl.SSLError,
        aiohttp.ClientError,
        boto.ConnectionError,
        boto.HTTPClientError,
        boto.CredentialRetrievalError,
        boto.FlexibleChecksumError,
        boto.IncompleteReadError,
        botocore.parsers.ResponseParserError,
    )


def _meaning(uri: str, error: BaseException, filesystem: FileSystemOf) -> str:
    """What is wrong, and what to do about it."""
    import botocore.exceptions as boto

    code, server = s3_code(error), _endpoint(uri, filesystem)
    if code is not None:
        # The answer to HEAD has no body that could tell a wrong secret from a missing right.
        if code.isdigit() and not is_passing(error, local=False):
            code = _code_of_listing(uri, filesystem) or code
        meaning = _S3_MEANINGS.get(code) or str(error)
        return f"{meaning} ({server} answered {code})"
    for each in _chain(error):
        if type(each).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            return (
                f"no credentials ({each}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
                "or give the machine a role"
            )
        if isinstance(each, socket.gaierror):
            return f"cannot connect to {server}: its name is not known: correct AWS_ENDPOINT_URL, or see to DNS"
        if isinstance(each, ConnectionRefusedError):
            return f"cannot connect to {server}: nothing listens: start the server, or correct AWS_ENDPOINT_URL"
        if isinstance(each, ssl.SSLError):
            return f"no secure connection to {server}: {each}; correct AWS_ENDPOINT_URL or AWS_CA_BUNDLE"
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | TimeoutError | ConnectionError):
        reason = str(error) or type(error).__name__
        return f"{server} does not answer ({reason}): start it, open the way to it, or correct AWS_ENDPOINT_URL"
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


def s3_code(error: BaseException) -> str | None:
    """What an S3 server called its refusal, where there was one."""
    for each in _chain(error):
        if isinstance(response := getattr(each, "response", None), dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def _s3_status(error: BaseException) -> int:
    for each in _chain(error):
        if isinstance(response := getattr(each, "response", None), dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def forget(error: BaseException, handled: BaseException | None) -> None:
    """Cuts off what was being handled when an error was raised: it led to the request, not to its failure."""
    for each in _chain(error):
        if handled is not None and each.__context__ is handled:
            each.__context__ = None


def lacks_bucket(error: BaseException) -> bool:
    """Whether not the object is missing but what it should be in."""
    # Without a bucket's name for it, "not found" means that this is no S3 service, unless one object was asked for.
    operations = {getattr(each, "operation_name", None) for each in _chain(error)}
    return s3_code(error) == "NoSuchBucket" or (
        s3_code(error) == "404" and not operations & {"HeadObject", "GetObject", "DeleteObject"}
    )


def raise_without_bucket(error: FileNotFoundError) -> None:
    """Raises the error where it is the bucket that is missing."""
    if lacks_bucket(error):
        raise error


def _code_of_listing(uri: str, filesystem: FileSystemOf) -> str | None:
    fs, path = filesystem(uri)
    try:
        fs.call_s3("list_objects_v2", Bucket=fs.split_path(path)[0], MaxKeys=1)
    except Exception as error:  # Also the way to it may fail now.
        return s3_code(error)
    return None


def _endpoint(uri: str, filesystem: FileSystemOf) -> str:
    try:
        return shown(filesystem(uri)[0].s3.meta.endpoint_url)
    except Exception:  # Another kind of storage, or what is to be explained is that there is no connection.
        return "the server"


def _file_in_the_way(path: Any) -> str | None:
    while isinstance(path, str) and path not in ("", "/"):
        if os.path.isfile(path):
            return path
        path = os.path.dirname(path)
    return None
