"""What a secret is, and texts without any: for all that is shown, logged or written down."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from types import TracebackType

# Variables of the environment that hold one; a shorter value is none, and may be a part of any word.
_NAMES = re.compile(r"(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?|CONNECTION_STRING)$", re.IGNORECASE)
SECRET_CHARS = 8
# So long a one is no word of a path that happens to be somebody's password too.
_CERTAIN_CHARS = 16
# The name, and perhaps a password, before a host.
_USER = re.compile(r"://[^/@\s]*@")
_PASSWORD = re.compile(r"://[^/@\s:]*:([^/@\s]+)@")
# What signs or opens a request, in its URL or in the path of it that libraries show.
_QUERY = re.compile(
    r"([?&](?:sig|key|[^=&?\s]*(?:signature|token|secret|password|credential|(?:access|api|account|subscription)[-_]?"
    r"key)[^=&?\s]*)=)[^&\s\"'<>)]+",
    re.IGNORECASE,
)


def shown(uri: str) -> str:
    """A URI without the name and password that some schemes allow in it, and without what signs a request."""
    return _QUERY.sub(r"\1***", _USER.sub("://", uri))


def without_secrets(text: str) -> str:
    """A text without the keys, tokens and passwords of this process's environment, and without those in URIs."""
    # The longest first: one may be a part of another.
    for secret in sorted(_of_environment(SECRET_CHARS), key=len, reverse=True):
        text = text.replace(secret, "***")
    return shown(text)


def secret_in(text: str) -> str | None:
    """What kind of secret a text has in it, for the person who wrote it there; None where it has none."""
    if _PASSWORD.search(text) or "://" in text and _QUERY.search(text.partition("://")[2]):
        return "a URI has a password, a token or a signature in it"
    for secret, name in _of_environment(_CERTAIN_CHARS).items():
        if secret in text:
            return f"it has the environment's {name} in it"
    return None


class ErrorsWithoutSecrets(contextlib.ContextDecorator):
    """What an error raised in a `with` block, or a function, says holds no secret, nor what led to it.

    Ray writes all of it down.
    """

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises the error, or one like it, without what led to it where that has a secret."""
        if not isinstance(error, Exception):
            return
        text = "".join(traceback.format_exception(error))
        if without_secrets(text) == text:
            return
        said = str(error)
        if without_secrets(said) == said:
            raise error from None
        raise RuntimeError(without_secrets(text)) from None


def _of_environment(least_chars: int) -> dict[str, str]:
    """Secrets by which variable has them."""
    found = dict[str, str]()
    for name, value in os.environ.items():
        # A file that has the secret is none.
        if _NAMES.search(name) and not value.startswith("/"):
            found[value] = name
        elif "://" in value:
            found |= dict.fromkeys(_PASSWORD.findall(value), name)
    return {secret: name for secret, name in found.items() if len(secret) >= least_chars}
