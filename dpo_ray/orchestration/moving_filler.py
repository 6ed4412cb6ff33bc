"""Scores of a reference that moves: a filler for each version of it, as training comes to need it.

A version is in the checkpoints from the step that made it on. Its replicas read it there, each its own part.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from dpo_ray.config import Config
from dpo_ray.errors import ReferenceFillError, StorageError
from dpo_ray.orchestration.reference_filler import LOOK_S, STOP_S, Filled, ReferenceFiller, chunks_in_order_of_need
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.store import PairStore
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.versions import Version, version_after, version_store
from dpo_ray.training import manifest
from dpo_ray.types import Attempt

log = logging.getLogger(__name__)

QUIET_LOOK_S = 5.0


class MovingFiller:
    """Fills the stores of one version after the other, in a thread of the driver."""

    def __init__(
        self, config: Config, pairs: PairStore, plan: Plan, start: ReferenceStore, family: str, generation: int
    ) -> None:
        """Does nothing before an attempt begins.

        Args:
            config: The run.
            pairs: The pair store.
            plan: The order of training.
            start: Where the scores of the reference go as it is at the start.
            family: See `Claims`.
            generation: Of the run's lease.
        """
        assert config.reference.sync_steps is not None
        self._config, self._pairs, self._plan, self._start = config, pairs, plan, start
        self._name, self._every = (family, generation), config.reference.sync_steps
        self._filler: ReferenceFiller | None = None
        self._version: Version | None = None
        self._attempt: Attempt | None = None
        self._trained, self._looked = 0, 0.0
        self._wait: bool | None = False
        self._error: BaseException | None = None
        self._serving, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="moving-reference", daemon=True)
        self._thread.start()

    @property
    def filled(self) -> Filled:
        """What the fillers of all versions so far have done."""
        return self._filler.filled if self._filler is not None else Filled()

    def begins(self, attempt: Attempt) -> None:
        """Has scored what the attempt begins with; replicas that score it already go on."""
        with self._serving:
            self._attempt, self._trained = attempt, attempt.position
            self._serve(version_after(attempt.position, attempt.reference_attempt, self._every), attempt.position)

    def trained(self, line: dict[str, Any]) -> None:
        """Takes note of a training step, by its line of metrics."""
        if "perf/step_s" in line:
            self._trained = int(line["step"])
        if self._filler is not None:
            self._filler.trained(line)

    def working(self) -> bool:
        """Whether replicas have, or will need, room: until the last version's work is done."""
        last = (self._plan.total_steps - 1) // self._every
        if self._filler is None or self._version is None or self._version.number < last:
            return True
        return self._filler.working()

    def workers_wait(self, short: bool | None) -> None:
        """Policy workers wait for room (see `ReferenceFiller`)."""
        self._wait = short
        if self._filler is not None:
            self._filler.workers_wait(short)

    def check(self) -> None:
        """Raises when no more scores will come.

        Raises:
            ReferenceFillError: They will not.
        """
        if self._error is not None:
            raise ReferenceFillError(f"the reference stopped: {self._error}") from self._error
        if self._filler is not None:
            self._filler.check()

    def stop(self) -> None:
        """Ends, whatever is still to be scored."""
        self._stopped.set()
        self._thread.join(timeout=STOP_S)
        if self._filler is not None:
            self._filler.stop()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            try:
                self._look()
            except StorageError as error:
                log.warning("the reference waits for the storage: %s", error)
            except BaseException as error:
                self._error = error
                return

    def _look(self) -> None:
        """Goes on to the next version, when training has made it."""
        attempt, now = self._attempt, time.monotonic()
        if attempt is None or self._version is None:
            return
        # A line of metrics says when to look; it may have been lost.
        if self._trained // self._every <= self._version.number and now - self._looked < QUIET_LOOK_S:
            return
        self._looked = now
        found = manifest.newest(self._config.run_uri)
        if found is None:
            return
        state = found[1].state
        version = version_after(state.step, state.reference_attempt, self._every)
        # What an older attempt commits late is not this one's, and is set aside when the next one begins.
        if version.attempt != attempt.attempt or version.number <= self._version.number:
            return
        with self._serving:
            if self._attempt is attempt and version.number * self._every < self._plan.total_steps:
                self._serve(version, state.step)

    def _serve(self, version: Version, position: int) -> None:
        """Has scored what is needed from a position on, until the reference moves again.

        When it raises nothing has changed but that nobody scores for the version before: it can be called again.
        """
        if version == self._version:
            return
        done = None
        if self._filler is not None:
            self._filler.stop()
            done = self._filler.filled
        about = self._config.run_uri, version, self._config.model.attention
        store = version_store(*about) if version.number else self._start
        stop = (version.number + 1) * self._every
        order = chunks_in_order_of_need(self._config, self._plan, self._pairs, position, stop)
        moved = version if version.number else None
        filler = ReferenceFiller(self._config, self._pairs, order, store, *self._name, position, moved, done)
        if self._stopped.is_set():
            return
        filler.workers_wait(self._wait)
        self._filler, self._version = filler, version
        filler.start()
