"""What the processes of a run log: one line per event, which says whose it is, and holds no secret."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from dpo_ray.redaction import without_secrets

FORMAT = "%(asctime)s %(levelname)s {whose} %(name)s: %(message)s"


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\\n")


def log_as(**whose: object) -> None:
    """Has all that this process logs from now on say whose it is; for processes that are a run's own.

    Each of `whose`, with "dpo_" before it, is an attribute of every record, and so a key of Ray's JSON logs: those that
    Ray Train keeps of each worker, and all of a job that was started with RAY_LOGGING_CONFIG_ENCODING=JSON. On the
    console it stands in front.

    Args:
        whose: The run, and where it applies attempt and rank.
    """
    make = logging.getLogRecordFactory()
    # An attribute that a record has already nobody may log as his own, and some name theirs `rank`.
    own = {f"dpo_{key}": value for key, value in whose.items()}

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.__dict__.update(own)
        with contextlib.suppress(Exception):  # A message that does not fit is for the handlers to report.
            made.msg, made.args = without_secrets(made.getMessage()), None
        if made.exc_info and made.exc_info[0] is not None:
            # Formatters take this in place of making it.
            made.exc_text = without_secrets(logging.Formatter().formatException(made.exc_info))
        return made

    logging.setLogRecordFactory(record)
    root = logging.getLogger()
    consoles = [handler for handler in root.handlers if isinstance(handler, logging.StreamHandler)]
    # One with a formatter is what the job asked Ray for; Ray Train's own has none, and shows messages alone.
    if all(handler.formatter is None for handler in consoles):
        for handler in consoles:
            root.removeHandler(handler)
        console = logging.StreamHandler()
        console.setFormatter(_OneLine(FORMAT.format(whose=" ".join(f"{key}=%(dpo_{key})s" for key in whose))))
        root.addHandler(console)
    logging.getLogger("dpo_ray").setLevel(logging.INFO)
