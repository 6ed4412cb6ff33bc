"""Which scores a step is trained with: those of one reference, or of the version of it that the policy has left behind.

A reference that moves has version n after n times `every` steps. What a version scores lies in the run's folder, under
the attempt that made it: weights that another attempt makes of the same steps may differ in their last bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray import storage
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.types import Attempt


def version_store(run_uri: str, version: int, attempt: int) -> ReferenceStore:
    """Scores of one version of a run's moving reference, as an attempt has made it; version 0 is no such."""
    return ReferenceStore(storage.join(run_uri, "reference", f"version-{version:06d}-attempt-{attempt:04d}"))


@dataclass(frozen=True, slots=True)
class References:
    """The reference of each step of an attempt.

    Attributes:
        start: Scores of the reference as it is at the start of training.
        run_uri: The run's folder.
        every: After how many steps it moves; None: never.
        attempt: The attempt.
    """

    start: ReferenceStore
    run_uri: str
    every: int | None
    attempt: Attempt

    def at(self, step: int) -> ReferenceStore:
        """What step `step`, counted from 1, is trained with, and what an evaluation after it compares with."""
        version = (step - 1) // self.every if self.every else 0
        if version == 0:
            return self.start
        assert self.every is not None
        inherited = version == self.attempt.position // self.every
        return version_store(
            self.run_uri, version, self.attempt.reference_attempt if inherited else self.attempt.attempt
        )
