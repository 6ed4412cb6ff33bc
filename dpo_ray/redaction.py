"""What a secret is, and texts without any: for all that is shown, logged or written down."""

from __future__ import annotations

import os
import re

# Variables of the environment that hold one; a shorter value is none, and may be a part of any word.
_NAMES = re.compile(
    r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?|CONNECTION_STRING|"
    r"(API|ACCESS|SECRET|PRIVATE|ACCOUNT|AUTH|SIGNING|ENCRYPTION|SUBSCRIPTION)_?KEY)(_?\d+)?$",
    re.IGNORECASE,
)
SECRET_CHARS = 8
# Others may hold a file's key in a bucket: those that look drawn by chance are taken for secrets.
_PERHAPS, _DRAWN = re.compile(r"(KEY|AUTH)(_?\d+)?$", re.IGNORECASE), re.compile(r"(?=.*\d)(?=.*[A-Za-z])[^/\s]{16,}")
# So long a one is no word of a path that happens to be somebody's password too.
_CERTAIN_CHARS = 16
# The name, and perhaps a password, before a host.
_USER = re.compile(r"://[^/\s?#]*@")
_PASSWORD = re.compile(r"://[^/@\s:]*:([^/\s?#]+)@")
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


def _of_environment(least_chars: int) -> dict[str, str]:
    """Secrets by which variable has them."""
    found = dict[str, str]()
    for name, value in os.environ.items():
        drawn = _PERHAPS.search(name) and _DRAWN.fullmatch(value)
        # A file that has the secret is none.
        if (_NAMES.search(name) or drawn) and not (value.startswith("/") and os.path.exists(value)):
            found[value] = name
        elif "://" in value:
            found |= dict.fromkeys(_PASSWORD.findall(value), name)
    return {secret: name for secret, name in found.items() if len(secret) >= least_chars}
