"""Faults that ended no attempt: replicas that were lost, on record for the run's report. Needs no torch."""

from __future__ import annotations

import contextlib
import datetime
import threading
from dataclasses import asdict, dataclass

from dpo_ray import storage
from dpo_ray.errors import StorageError

# Training does not wait for this record.
PATIENCE_S = 5.0
# Replicas of the reference and of the evaluation are looked after in threads of their own.
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Fault:
    """One of them.

    Attributes:
        time: When, in ISO 8601.
        reason: What happened, in a line.
    """

    time: str
    reason: str


def read_faults(run_uri: str) -> list[Fault]:
    """All of a run, oldest first."""
    return [Fault(str(line["time"]), str(line["reason"])) for line in storage.read_json_lines(_uri(run_uri))]


def record_fault(run_uri: str, reason: str) -> None:
    """Adds one; where the storage does not answer it is left out. For the driver that holds the run's lease alone."""
    fault = Fault(datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), reason)
    with _LOCK, contextlib.suppress(StorageError), storage.patience(PATIENCE_S):
        storage.write_json_lines(_uri(run_uri), [asdict(each) for each in [*read_faults(run_uri), fault]])


def _uri(run_uri: str) -> str:
    return storage.join(run_uri, "faults.jsonl")
