"""The supervisor: one attempt after another until the run is done, whatever fails meanwhile.

It decides what Ray Train leaves open: how many workers there is room for, which failures are survived and how often,
and when a group shall make way for a larger one or leave a node that goes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from dpo_ray.config import Config, RecoveryConfig
from dpo_ray.errors import RecoveryError
from dpo_ray.lease import RunLease
from dpo_ray.orchestration.autoscaler import Wish
from dpo_ray.orchestration.evaluator import Evaluator
from dpo_ray.orchestration.group import End, WorkerGroup
from dpo_ray.orchestration.monitor import Place
from dpo_ray.orchestration.nodes import draining_nodes
from dpo_ray.orchestration.reference_filler import Filled
from dpo_ray.orchestration.resources import demands, needs, needs_of_worker, room
from dpo_ray.orchestration.stop import Stop
from dpo_ray.orchestration.stream import Places
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.training import attempts, manifest
from dpo_ray.types import Attempt

log = logging.getLogger(__name__)

POLL_S = 0.5
# What a group that ended held is free within seconds; until then less room is not believed.
SETTLE_S = 5.0
TELL_S = 10.0
DRAIN_LOOK_S = 1.0
GROW_LOOK_S = 5.0

# Each time microbatches get smaller; after so many they are a twentieth of what they were.
MAX_MEMORY_FAILURES = 8
_LIMITS = {
    "worker": "max_worker_failures",
    "node": "max_node_failures",
    "hang": "max_hangs",
    "storage": "max_storage_failures",
    "ray": "max_ray_failures",
}


class References(Protocol):
    """What a supervisor knows of those who score beside training."""

    @property
    def filled(self) -> Filled:
        """What they have done so far."""

    def begins(self, attempt: Attempt) -> None:
        """A worker group will be started."""

    def check(self) -> None:
        """Raises when no more scores will come."""

    def working(self) -> bool:
        """Whether replicas have, or need, room."""

    def trained(self, line: dict[str, Any]) -> None:
        """A line of metrics arrived."""

    def workers_wait(self, short: bool | None) -> None:
        """Workers wait for room, of which there is too little or not; None: no more."""


def supervise(
    config: Config,
    places: Places,
    lease: RunLease,
    watcher: Watcher,
    references: References | None,
    evaluator: Evaluator | None,
    finished: Callable[[], bool],
    stop: Stop,
) -> None:
    """Trains until the run is finished.

    Args:
        config: The run.
        places: Its stores.
        lease: What makes this the run's only driver.
        watcher: Told what happens.
        references: Who scores beside training; None where nobody does.
        evaluator: Who evaluates beside training; None where nobody does.
        finished: Whether the run has nothing left to train or to export.
        stop: Who may ask it to stop.

    Raises:
        RecoveryError: More failures in a row than `recovery` allows.
        FinalError: What failed would fail again.
        LeaseLostError: Another driver has taken the run over.
        StoppedError: It was asked to stop; workers that were training have written a checkpoint.
    """
    # An autoscaler adds what somebody asks for; a group that waits for room has not asked Ray yet.
    scaling = config.scaling
    wish = Wish(config.run_uri, needs_of_worker(config), scaling.min_workers, scaling.max_workers)
    failures = Failures(config.recovery)
    reason = "start" if manifest.newest(config.run_uri) is None else "continue"
    try:
        with stop:
            while not _finished(config, evaluator, lease, watcher, stop, finished):
                num_workers, node_ids = _wait_for_room(config, references, lease, watcher, stop, wish)
                attempt = attempts.begin(config.run_uri, lease.generation, num_workers, reason)
                # What was recorded after an outage may be late.
                lease.confirm()
                manifest.collect_orphans(config.run_uri, attempt.attempt)
                if references is not None:
                    references.begins(attempt)
                watcher.began(attempt)
                whose = {"dpo_run": config.name, "dpo_attempt": attempt.attempt}
                log.info("begins after step %d with %d workers: %s", attempt.position, num_workers, reason, extra=whose)
                group = WorkerGroup(config, places, attempt, node_ids, watcher, _tell(references, evaluator, stop))
                end = group.run(_Look(config, attempt, lease, references, evaluator, watcher, stop, wish))
                watcher.ended(end.kind)
                log.info("ended (%s): %s", end.kind, end.reason, extra=whose)
                reason = end.reason
                if end.kind == "done":
                    continue
                _check(stop, config)
                failures.count(end, attempt)
                watcher.warning(f"{end.reason}; starting again from the newest checkpoint")
    finally:
        wish.withdraw()


def _finished(
    config: Config,
    evaluator: Evaluator | None,
    lease: RunLease,
    watcher: Watcher,
    stop: Stop,
    finished: Callable[[], bool],
) -> bool:
    """Whether there is nothing left to do; waits for evaluations, for which no worker is needed."""
    if not finished():
        _check(stop, config)
        return False
    if evaluator is None or evaluator.done():
        return True
    watcher.phase("waiting for the last evaluations")
    while not evaluator.done():
        lease.check()
        _check(stop, config, trained=True)
        evaluator.check()
        time.sleep(POLL_S)
    # A checkpoint that turned out to be damaged while it was evaluated is none any more.
    return finished()


def _check(stop: Stop, config: Config, trained: bool = False) -> None:
    newest = manifest.newest(config.run_uri) if stop.asked else None
    stop.check(config.run_uri, newest[1].state.step if newest else 0, trained)


def _tell(references: References | None, evaluator: Evaluator | None, stop: Stop) -> Callable[[dict[str, Any]], None]:
    def tell(line: dict[str, Any]) -> None:
        stop.hear(line)
        if references is not None:
            references.trained(line)
        if evaluator is not None:
            evaluator.trained(line)

    return tell


def _hear(references: References, watcher: Watcher) -> None:
    """Hands on what those who score have done; raises when no more scores will come."""
    watcher.scored(asdict(references.filled))
    references.check()


class Failures:
    """Failures since the last new checkpoint, by kind."""

    def __init__(self, limits: RecoveryConfig) -> None:
        """Counts from 0.

        Args:
            limits: How many of each kind are survived.
        """
        self._limits, self._position = limits, -1
        self._counts: Counter[str] = Counter()

    def count(self, end: End, attempt: Attempt) -> None:
        """Counts the end of an attempt.

        Raises:
            RecoveryError: It is one too many.
        """
        if attempt.position > self._position:
            self._position = attempt.position
            self._counts.clear()
        self._counts[end.kind] += 1
        if end.kind == "memory":
            if self._counts[end.kind] > MAX_MEMORY_FAILURES:
                raise RecoveryError(
                    f"{end.reason}, {self._counts[end.kind]} times since step {attempt.position}: it is not the size "
                    "of the microbatches; set model.gradient_checkpointing: true, or raise scaling.workers"
                )
            return
        key = _LIMITS[end.kind]
        limit = getattr(self._limits, key)
        if -1 < limit < self._counts[end.kind]:
            raise RecoveryError(
                f"{end.reason}: failure {self._counts[end.kind]} of this kind since step {attempt.position}, "
                f"recovery.{key} is {limit}; see to the cause and give the same command again: it goes on from there"
                + (f"\n{end.detail}" if end.detail else "")
            )


def _wait_for_room(
    config: Config, references: References | None, lease: RunLease, watcher: Watcher, stop: Stop, wish: Wish
) -> tuple[int, list[str]]:
    """How many workers to start, and on which nodes; waits while there are too few."""
    scaling = config.scaling
    began = asked = time.monotonic()
    told = ""
    while True:
        lease.check()
        _check(stop, config)
        wish.tell()
        num_workers, node_ids = room(config, references is not None and references.working())
        waited_s = time.monotonic() - began
        if references is not None:
            _hear(references, watcher)
            references.workers_wait(num_workers < scaling.min_workers and waited_s > SETTLE_S)
        if num_workers >= scaling.max_workers or num_workers >= scaling.min_workers and waited_s > SETTLE_S:
            return num_workers, node_ids
        if time.monotonic() - asked > TELL_S:
            asked = time.monotonic()
            need, *_ = needs(demands(config, references=False))
            if str(need) != told:
                told = str(need)
                watcher.warning(f"waiting for room for workers: {told}{f': {need.remedy}' if need.impossible else ''}")
        time.sleep(POLL_S)


class _Look:
    """What the driver looks for while a group trains."""

    def __init__(
        self,
        config: Config,
        attempt: Attempt,
        lease: RunLease,
        references: References | None,
        evaluator: Evaluator | None,
        watcher: Watcher,
        stop: Stop,
        wish: Wish,
    ) -> None:
        self._config, self._attempt, self._lease, self._references = config, attempt, lease, references
        self._evaluator = evaluator
        self._watcher, self._stop, self._wish = watcher, stop, wish
        self._drain_looked = self._grow_looked = time.monotonic()
        self._roomy_since: float | None = None

    def __call__(self, places: dict[int, Place]) -> str | None:
        """Why the group shall leave, or None."""
        self._lease.check()
        if self._references is not None:
            _hear(self._references, self._watcher)
            if len(places) == self._attempt.world_size:
                self._references.workers_wait(None)
        if self._evaluator is not None:
            self._evaluator.check()
        if self._stop.asked is not None:
            return f"asked to stop ({self._stop.asked})"
        now = time.monotonic()
        own = [place.node_id for place in places.values()]
        if now - self._drain_looked > DRAIN_LOOK_S:
            self._drain_looked = now
            going = draining_nodes()
            if leaving := set(own) & set(going):
                return f"{len(leaving)} node{'s' * (len(leaving) > 1)} of this run will be drained"
        self._wish.tell()
        size, most = self._attempt.world_size, self._config.scaling.max_workers
        if size < most and len(own) == size and now - self._grow_looked > GROW_LOOK_S:
            self._grow_looked = now
            fits, _ = room(self._config, self._references is not None and self._references.working(), own)
            if fits <= size:
                self._roomy_since = None
            elif self._roomy_since is None:
                self._roomy_since = now
            if self._roomy_since is not None and now - self._roomy_since >= self._config.scaling.grow_after_s:
                return f"there is room for {fits} workers instead of {size}"
        return None
