"""What users bring as code of their own, by import path: a loss, a format."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from typing import TypeVar

_T = TypeVar("_T")


def code_digest(path: str) -> str:
    """SHA-256 of the module that an imported object is in; what that imports is not looked at."""
    return hashlib.sha256(inspect.getsource(importlib.import_module(path.partition(":")[0])).encode()).hexdigest()


def imported(path: str, wanted: type[_T]) -> _T:
    """The object behind `module:name`.

    The module must be importable on every node: it travels with the working directory of a Ray job.

    Args:
        path: `module:name`.
        wanted: What it must be.

    Raises:
        ValueError: It cannot be imported, or is something else.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # Whatever the user's module raises.
        raise ValueError(
            f"{path!r} cannot be imported: {type(error).__name__}: {error}; write module:name, with the module in the "
            "working directory or installed on every node"
        ) from None
    if not isinstance(found, wanted):
        raise ValueError(
            f"{path!r} is of type {type(found).__name__}: it must be a {wanted.__module__}.{wanted.__name__}"
        )
    return found
