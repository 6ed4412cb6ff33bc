"""How a run's driver ended: `<run>/outcome.json`. Needs no torch.

A driver that is killed writes none; the generation of its lease, higher than the record's, says that it was there.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, fields
from typing import Any

from dpo_ray import storage
from dpo_ray.errors import StoppedError
from dpo_ray.redaction import without_secrets

FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a driver ended.

    Attributes:
        outcome: `finished`, `failed` or `stopped`.
        generation: Of the lease that the driver held.
        time: When, in ISO 8601.
        error: Class of the error; empty where there was none.
        message: What it said.
    """

    outcome: str
    generation: int
    time: str
    error: str = ""
    message: str = ""


def write_outcome(run_uri: str, generation: int, error: BaseException | None) -> None:
    """Records how the driver ended.

    Args:
        run_uri: The run's folder.
        generation: Of its lease.
        error: What ended it; None where the run is finished.

    Raises:
        StorageError: It cannot be written.
    """
    kind = FINISHED if error is None else STOPPED if isinstance(error, StoppedError) else FAILED
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    about = ("", "") if error is None else (type(error).__name__, without_secrets(str(error)))
    storage.write_json(_place(run_uri), asdict(Outcome(kind, generation, now, *about)))


def read_outcome(run_uri: str) -> Outcome | None:
    """What the newest driver that came to an end recorded, or None."""
    if not storage.exists(_place(run_uri)):
        return None
    found: dict[str, Any] = storage.read_json(_place(run_uri))
    return Outcome(**{field.name: found[field.name] for field in fields(Outcome) if field.name in found})


def _place(run_uri: str) -> str:
    return storage.join(run_uri, "outcome.json")
