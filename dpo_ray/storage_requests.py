"""A request to a storage: its file system, how long it may take, and how often it is made again.

Credentials and endpoints come from where the AWS tools take them (environment, shared files, instance roles), so that
none ever stands in a configuration.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from dpo_ray.errors import StorageError
from dpo_ray.redaction import shown
from dpo_ray.storage_errors import explained, forget, is_passing, s3_code, said

# For how long what fails is tried again; the environment's DPO_RAY_STORAGE_PATIENCE_S, in seconds, goes before it.
PATIENCE_S = 1800.0
# The same for the first write after `check_reachable`: a server that is full, too, says only that it failed.
FIRST_WRITE_PATIENCE_S = 5.0
# A server that accepts connections but does not answer is noticed after these.
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 25.0
# Of single requests, below: a listing or an upload of a thousand of them would else fail for one in a thousand.
ATTEMPTS_PER_REQUEST = 2
# A request that takes longer than this and its bytes at the lowest speed is given up, as is one whose body a server
# does not take. Asked again, its bytes get twice the time, for a line may be slow: at most eight times.
REQUEST_S, LOWEST_BYTES_PER_S, MOST_DOUBLINGS = 60.0, 1 << 20, 3
# Who waits is told after the first, and then whenever the second has passed.
TELL_AFTER_S, TELL_EVERY_S = 10.0, 30.0
LONGEST_PAUSE_S = 10.0

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_patience_here: ContextVar[float | None] = ContextVar("_patience_here", default=None)
_stretch: ContextVar[float] = ContextVar("_stretch", default=1.0)
# Not the generator that training seeds and saves.
_jitter = random.Random()


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Another patience for what this thread does in a `with` block, such as little where an answer is not needed."""
    token = _patience_here.set(seconds)
    try:
        yield
    finally:
        _patience_here.reset(token)


def full_patience_s() -> float:
    """How long storage that fails is waited for.

    Raises:
        StorageError: What the environment says is no number.
    """
    here = _patience_here.get()
    if here is not None:
        return here
    given = os.environ.get("DPO_RAY_STORAGE_PATIENCE_S")
    try:
        return PATIENCE_S if not given else float(given)
    except ValueError:
        raise StorageError(f"DPO_RAY_STORAGE_PATIENCE_S={given}: give a number of seconds, such as 1800") from None


@dataclass(slots=True)
class _Outage:
    """What this process knows of a place that fails: since when, and when that was last told, or None."""

    since: float
    told: float | None = None


_lock = threading.Lock()
_outages: dict[str, _Outage] = {}
# Places that the process has looked for, and not yet written to.
_on_trial: set[str] = set()


def failing() -> bool:
    """Whether this process waits for a storage that fails."""
    return bool(_outages)


def _place(uri: str) -> str:
    scheme, marked, rest = shown(uri).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if marked else uri


def asked_again(writes: bool = False) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Makes a function repeat itself while the storage fails, until the patience ends, and explain what it raises.

    Args:
        writes: Whether the function writes at its URI.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        signature = inspect.signature(function)
        name = "uri" if "uri" in signature.parameters else next(iter(signature.parameters))

        @functools.wraps(function)
        def patient(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            uri = signature.bind(*args, **kwargs).arguments[name]
            return _ask_until_answered(uri, functools.partial(function, *args, **kwargs), writes)

        return patient

    return decorate


def _ask_until_answered(uri: str, ask: Callable[[], _T], writes: bool) -> _T:
    handled = sys.exc_info()[1]
    place, since, failures, too_slow = _place(uri), 0.0, 0, 0
    try:
        while True:
            # Asked again outside of `except`, or each error would drag along the one before it.
            error, result = _attempt(ask, 2.0 ** min(too_slow, MOST_DOUBLINGS))
            if error is None:
                if writes:
                    _on_trial.discard(place)
                if failures:
                    _tell_answer(place)
                return cast(_T, result)
            forget(error, handled)
            now = time.monotonic()
            since = since if failures else now
            failures += 1
            # What is silent altogether raises a timeout of another type.
            too_slow += type(error) is FSTimeoutError and type(error.__cause__) is TimeoutError
            passing = is_passing(error, local=isinstance(filesystem(uri)[0], LocalFileSystem))
            patience_s = full_patience_s() if passing else 0.0
            if writes and place in _on_trial and s3_code(error) is not None:
                patience_s = min(patience_s, FIRST_WRITE_PATIENCE_S)
            pause_s = _jitter.uniform(0, min(LONGEST_PAUSE_S, 0.25 * 2.0 ** min(failures, 10)))
            # A process that ends does not wait for its threads' storage.
            ending = not threading.main_thread().is_alive()
            if not passing or ending or now + pause_s - since > patience_s:
                with explained(uri, filesystem, tried_s=now - since):
                    raise error
            _tell_failure(place, since, functools.partial(_waiting_message, uri, error, now - since, patience_s))
            time.sleep(pause_s)
    finally:
        if failures:
            with _lock:
                _outages.pop(place, None)


def _attempt(ask: Callable[[], _T], stretch: float) -> tuple[Exception | None, _T | None]:
    token = _stretch.set(stretch)
    try:
        return None, ask()
    except Exception as error:
        return error, None
    finally:
        _stretch.reset(token)


def _waiting_message(uri: str, error: Exception, tried_s: float, patience_s: float) -> str:
    what = " ".join(said(uri, error, filesystem).split())
    return f"{what}; tried for {tried_s:.0f} s, and again until {patience_s:.0f} s have passed"


def _tell_failure(place: str, since: float, message: Callable[[], str]) -> None:
    """Once for all threads that wait for the same place."""
    now = time.monotonic()
    with _lock:
        outage = _outages.setdefault(place, _Outage(since))
        due = now - outage.since >= TELL_AFTER_S if outage.told is None else now - outage.told >= TELL_EVERY_S
        if due:
            outage.told = now
    if due:
        log.warning(message())


def _tell_answer(place: str) -> None:
    with _lock:
        outage = _outages.pop(place, None)
    if outage is not None and outage.told is not None:
        log.warning("%s answers again after %.0f s", place, time.monotonic() - outage.since)


def time_limit_s(num_bytes: int = 0, base_s: float | None = None) -> float:
    """How long a request may take."""
    return (base_s or REQUEST_S) + num_bytes / LOWEST_BYTES_PER_S * _stretch.get()


def call(fs: Any, method: str, *args: Any, within_s: float | None = None, **kwargs: Any) -> Any:
    """Calls a method of a file system, and gives up when it takes too long, where that can be done."""
    if isinstance(fs, AsyncFileSystem):
        kwargs["timeout"] = within_s or time_limit_s()
    return getattr(fs, method)(*args, **kwargs)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI, and the path within it.

    Raises:
        StorageError: No file system is known for the URI's scheme.
    """
    try:
        # A cached listing would hide what another process has just written.
        options: dict[str, Any] = {}
        if "://" in uri and not uri.startswith("file://"):
            options["use_listings_cache"] = False
        if uri.startswith(("s3://", "s3a://")):
            timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
            options["config_kwargs"] = {**timeouts, "retries": {"total_max_attempts": ATTEMPTS_PER_REQUEST}}
        fs, path = fsspec.core.url_to_fs(uri, **options)
        if "config_kwargs" in options:
            fs.retries = 1  # Not once more by s3fs.
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

    A server that goes away later is waited for much longer: it was there, and will come back. What it answers to the
    first write is not: it may be full.

    Raises:
        StorageError: Nothing answers.
    """
    if not uri.startswith("s3://"):
        return
    _on_trial.add(_place(uri))
    with explained(uri, filesystem):
        fs = fsspec.filesystem(
            "s3",
            config_kwargs={"connect_timeout": 5, "read_timeout": 5, "retries": {"total_max_attempts": 2}},
            skip_instance_cache=True,
        )
        fs.retries = 1
        try:
            fs.call_s3("head_bucket", Bucket=fs.split_path(uri)[0], timeout=15)
        except OSError as error:
            if s3_code(error) is None:
                raise


def is_local(uri: str) -> bool:
    """Whether a URI names a path of this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)
