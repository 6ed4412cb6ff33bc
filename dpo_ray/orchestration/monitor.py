"""What the workers of an attempt and the driver tell each other while training runs: signs of life and orders.

Every worker has a thread that reports once a second what its rank is doing; the answer carries the driver's orders.
A worker that has lost its driver ends itself: nobody would take note of what it does.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from dpo_ray import storage
from dpo_ray.errors import FinalError
from dpo_ray.lease import process_start
from dpo_ray.types import WAITING

log = logging.getLogger(__name__)

BEAT_S = 1.0
# What Ray and Python's imports may take to bring up a process, beyond `recovery.hang_timeout_s`.
START_S = 120.0
# An unreachable driver may be a network that heals; a dead one is known at once.
LOST_S = 120.0
FailureKind = Literal["worker", "storage", "memory"]
STARTING = "starting"
ENDED = "ended"
STORAGE = "waiting for the storage"
# A rank that computes so much longer than the median of the ranks, for so many steps running, is told of.
SLOW_SPREAD, SLOW_STEPS = 1.25, 50


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs.

    Attributes:
        node_id: Ray's node.
        pid: Its process.
        started: As `lease.process_start` gives it: a number of a process may go to another.
    """

    node_id: str
    pid: int
    started: str | None

    @classmethod
    def here(cls) -> Place:
        """Of the process that asks."""
        pid = os.getpid()
        return cls(ray.get_runtime_context().get_node_id(), pid, process_start(pid))


@dataclass(frozen=True, slots=True)
class Failure:
    """How a worker ended.

    Attributes:
        final: The error that would come again, or None.
        kind: What failed.
        text: The error, with its traceback.
    """

    final: FinalError | None
    kind: FailureKind
    text: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's sign of life.

    Attributes:
        rank: Who.
        place: Where.
        doing: What the rank is doing.
        since_s: For how long.
        lines: Lines of metrics since the last beat.
        stacks: What every thread is doing, when the driver asked.
        failure: How the rank ended, if with an error.
    """

    rank: int
    place: Place
    doing: str
    since_s: float
    lines: list[dict[str, Any]]
    stacks: str | None = None
    failure: Failure | None = None


@dataclass(slots=True)
class Orders:
    """What the driver wants of the workers.

    Attributes:
        leave: Why the group shall write a checkpoint after its next step and end; None: go on.
        dump: Whether to report the stacks of all threads.
    """

    leave: str | None = None
    dump: bool = False


@dataclass(slots=True)
class Report:
    """What the driver sees.

    Attributes:
        beats: The last beat of each rank.
        silent_s: Seconds since it came.
        lines: Lines of metrics since the last look.
        controller: Where Ray Train's controller runs, once it has said so.
    """

    beats: dict[int, Beat] = field(default_factory=dict)
    silent_s: dict[int, float] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    controller: Place | None = None


def has_excuse(report: Report) -> bool:
    """Whether a rank has a reason to take its time, for which the others then wait too: its storage fails, its pairs
    may still have to be scored, or it is being started."""
    running = [beat for beat in report.beats.values() if beat.doing != ENDED]
    return any(
        beat.doing in (WAITING, STORAGE) or (beat.doing == STARTING and beat.since_s <= START_S) for beat in running
    )


def stalled(report: Report, hang_timeout_s: float, no_excuse_s: float) -> str | None:
    """What stands still, or None.

    Args:
        report: What the ranks said last.
        hang_timeout_s: `recovery.hang_timeout_s`.
        no_excuse_s: For how long no rank has had an excuse.
    """
    running = {rank: beat for rank, beat in report.beats.items() if beat.doing != ENDED}
    limits_s = {rank: hang_timeout_s + START_S * (beat.doing == STARTING) for rank, beat in running.items()}
    silent = [rank for rank in running if report.silent_s[rank] > limits_s[rank]]
    if silent:
        return f"{_ranks(silent)} gave no sign of life for {limits_s[silent[0]]:g} s"
    stuck = [rank for rank, beat in running.items() if beat.since_s > limits_s[rank]]
    if stuck and no_excuse_s > hang_timeout_s:
        return f"{_ranks(stuck)} stood still for {limits_s[stuck[0]]:g} s ({running[stuck[0]].doing})"
    return None


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}{' ...' * (len(ranks) > 8)}"


class Slow:
    """Looks for a rank that all others wait for, by the lines of metrics."""

    def __init__(self) -> None:
        self._rank, self._spreads = -1, list[float]()
        self._told = set[int]()

    def line(self, line: Mapping[str, Any]) -> tuple[int, float] | None:
        """Takes a line.

        Returns:
            The rank that has been the slowest by far for many steps, and its time by the median's; each rank once.
        """
        if "perf/rank_spread" not in line:
            return None
        rank, spread = int(line["perf/slowest_rank"]), float(line["perf/rank_spread"])
        if rank != self._rank:
            self._rank, self._spreads = rank, []
        self._spreads = [*self._spreads, spread] if spread >= SLOW_SPREAD else []
        if len(self._spreads) < SLOW_STEPS or rank in self._told:
            return None
        self._told.add(rank)
        return rank, sum(self._spreads) / len(self._spreads)


class Monitor:
    """The actor between workers and driver; it lives as long as an attempt."""

    def __init__(self, about: str) -> None:
        """Has heard nothing yet.

        Args:
            about: The run and the attempt, for Ray's dashboard.
        """
        self._about = about
        self._beats: dict[int, Beat] = {}
        self._came: dict[int, float] = {}
        self._lines = list[dict[str, Any]]()
        self._orders = Orders()
        self._controller: Place | None = None

    def __repr__(self) -> str:
        return f"{self._about}, monitor"

    def controller(self, place: Place) -> None:
        """Takes note of where Ray Train's controller runs."""
        self._controller = place

    def beat(self, beat: Beat) -> Orders:
        """Takes a sign of life; answers with the orders."""
        self._beats[beat.rank], self._came[beat.rank] = beat, time.monotonic()
        self._lines += beat.lines
        return self._orders

    def look(self, orders: Orders) -> Report:
        """Gives the driver what came, and takes its orders."""
        self._orders = orders
        lines, self._lines = self._lines, []
        now = time.monotonic()
        silent_s = {rank: now - came for rank, came in self._came.items()}
        return Report(dict(self._beats), silent_s, lines, self._controller)


class Reporter:
    """A worker's end: what the train loop says of its progress, and hears of the driver's orders."""

    def __init__(self, monitor: Any, rank: int) -> None:
        """Begins to report.

        Args:
            monitor: Handle of the `Monitor`.
            rank: This worker's.
        """
        self._monitor, self._rank = monitor, rank
        self._place = Place.here()
        self._doing, self._since = STARTING, time.monotonic()
        self._lines: deque[dict[str, Any]] = deque()
        self._failure: Failure | None = None
        self._orders = Orders()
        self._done = threading.Event()
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._report, name="reporter", daemon=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """Something begins; what came before it has ended."""
        self._doing, self._since = what, time.monotonic()

    def leaving(self) -> bool:
        """Whether the driver wants a checkpoint and the end, as far as this rank has heard."""
        return self._orders.leave is not None

    def publish(self, line: dict[str, Any]) -> None:
        """Sends a line of metrics with the next beat."""
        self._lines.append(line)

    def warn(self, text: str) -> None:
        """Sends a warning with the next beat."""
        self.publish({"warning": f"rank {self._rank}: {text}"})

    def close(self, failure: Failure | None = None) -> None:
        """Ends the reports with a last one."""
        self._failure = failure
        self.doing(ENDED)
        self._done.set()
        self._thread.join(timeout=10)

    def _report(self) -> None:
        last = False
        while not last:
            last = self._done.wait(BEAT_S)
            taken = [self._lines.popleft() for _ in range(len(self._lines))]
            stacks = _stacks() if self._orders.dump else None
            doing = STORAGE if (storage.failing() or storage.transferring()) and not last else self._doing
            since_s = time.monotonic() - self._since
            beat = Beat(self._rank, self._place, doing, since_s, taken, stacks, self._failure)
            try:
                orders = ray.get(self._monitor.beat.remote(beat), timeout=10)
                if orders.leave is not None and self._orders.leave is None:
                    log.info("asked to write a checkpoint and end: %s", orders.leave)
                self._orders = orders
                self._heard = time.monotonic()
            except (RayError, GetTimeoutError) as error:
                self._lines.extendleft(reversed(taken))
                lost = isinstance(error, ActorDiedError) or time.monotonic() - self._heard > LOST_S
                if lost and not self._done.is_set():
                    log.error("the driver is gone: ending")
                    os._exit(1)


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)
