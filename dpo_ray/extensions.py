"""What users bring: code of their own by import path, as a loss or a format, and the packages of extras."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from typing import TypeVar

from dpo_ray.errors import ConfigError

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


def check_installed(package: str, extra: str, wanted: str) -> None:
    """Refuses an option whose package is not installed.

    Args:
        package: What is imported.
        extra: Of dpo_ray, which brings it.
        wanted: What the configuration asks for.

    Raises:
        ConfigError: It is missing; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{wanted}, but the package {package} is not installed: pip install 'dpo_ray[{extra}]', or leave it out"
        )
