"""Attempts: every start of a worker group is on record, and only the newest may write. Needs no torch.

The driver that holds the run's lease records an attempt before it starts the group. What an older one, cut off from
the rest and still running, wants to write is refused by its `Fence`.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, fields
from typing import Any

from dpo_ray import storage
from dpo_ray.errors import FencedError, FinalError
from dpo_ray.training import manifest
from dpo_ray.types import Attempt


def attempts_uri(run_uri: str) -> str:
    """Where the starts of worker groups are recorded."""
    return storage.join(run_uri, "attempts.jsonl")


def read_attempts(run_uri: str) -> list[Attempt]:
    """All attempts of a run, oldest first."""
    names = {field.name for field in fields(Attempt)}
    lines: list[dict[str, Any]] = storage.read_json_lines(attempts_uri(run_uri))
    return [Attempt(**{name: value for name, value in line.items() if name in names}) for line in lines]


def begin(run_uri: str, generation: int, world_size: int, reason: str) -> Attempt:
    """Fixes, in one record, where a new worker group starts: all ranks and the stream use exactly this.

    Args:
        run_uri: The run's folder.
        generation: Of the lease that the caller holds.
        world_size: Policy workers.
        reason: Why the group is started.

    Raises:
        FinalError: Of a run that had checkpoints none is left: it does not begin anew by itself.
    """
    past = read_attempts(run_uri)
    while found := manifest.newest(run_uri):
        name, about = found
        overtaken = [each for each in past if each.attempt > about.attempt and each.position < about.state.step]
        if not overtaken:
            break
        # Its fence let it pass just before the next attempt began: the ledger is that one's.
        late = f"attempt {about.attempt} committed it after attempt {overtaken[0].attempt} had begun before it"
        manifest.set_aside(run_uri, name, late)
    reached = max((each.position for each in past), default=0)
    if found is None and reached:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in manifest.set_aside_records(run_uri))
        raise FinalError(
            f"{run_uri}: an attempt went on from step {reached}, and no checkpoint is left to go on from:{reasons}\n"
            "Look at the storage, and at memory and disks of the hosts that read it. What was set aside is still "
            "there; to train from the first step again, choose another name, or remove this folder"
        )
    attempt = Attempt(
        attempt=past[-1].attempt + 1 if past else 0,
        generation=generation,
        position=found[1].state.step if found else 0,
        checkpoint=found[0] if found else None,
        world_size=world_size,
        reason=reason,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        reference_attempt=found[1].state.reference_attempt if found else 0,
    )
    storage.write_json_lines(attempts_uri(run_uri), [asdict(each) for each in [*past, attempt]])
    return attempt


@dataclass(frozen=True, slots=True)
class Fence:
    """Refuses the writes of an attempt that is not the newest any more.

    Attributes:
        run_uri: The run's folder.
        attempt: The one that asks.
    """

    run_uri: str
    attempt: Attempt

    def check(self) -> None:
        """Passes for the newest attempt.

        Raises:
            FencedError: Another has begun.
        """
        newest = max(read_attempts(self.run_uri), key=lambda each: (each.generation, each.attempt))
        if (newest.generation, newest.attempt) != (self.attempt.generation, self.attempt.attempt):
            raise FencedError(
                f"attempt {self.attempt.attempt} of {self.run_uri} writes no more: attempt {newest.attempt} has begun"
            )
