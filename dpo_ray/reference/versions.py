"""Which scores a step is trained with: those of one reference, or of the version of it that the policy has left behind.

A reference that moves has version n after n times `every` steps. What a version scores lies in the run's folder, under
the attempt that made it: weights that another attempt makes of the same steps may differ in their last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dpo_ray import storage
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.types import Attempt


class Version(NamedTuple):
    """A version of a reference that moves.

    Attributes:
        number: How often it has moved.
        attempt: The attempt of the run that has made it.
    """

    number: int
    attempt: int


def version_after(step: int, attempt: int, every: int) -> Version:
    """The version that there is after `step` steps; `attempt` is the state's `reference_attempt`."""
    return Version(step // every, attempt)


def version_store(run_uri: str, version: Version, attention: str) -> ReferenceStore:
    """Scores of one version of a run's moving reference, by an implementation of attention; version 0 is no such."""
    folder = f"version-{version.number:06d}-attempt-{version.attempt:04d}-{attention}"
    return ReferenceStore(storage.join(run_uri, "reference", folder))


@dataclass(frozen=True, slots=True)
class References:
    """The reference of each step of an attempt.

    Attributes:
        start: Scores of the reference as it is at the start of training.
        run_uri: The run's folder.
        every: After how many steps it moves; None: never.
        attempt: The attempt.
        attention: The implementation that the versions are scored with.
    """

    start: ReferenceStore
    run_uri: str
    every: int | None
    attempt: Attempt
    attention: str

    def at(self, step: int) -> ReferenceStore:
        """What step `step`, counted from 1, is trained with, and what an evaluation after it compares with."""
        if self.every is None or step <= self.every:
            return self.start
        version = version_after(step - 1, self.attempt.attempt, self.every)
        inherited = version_after(self.attempt.position, self.attempt.reference_attempt, self.every)
        version = inherited if inherited.number == version.number else version
        return version_store(self.run_uri, version, self.attention)
