"""Replicas: actors that do one piece of work after the other, come and go, and may die at any time.

A replica is one actor, or several that hold one sharded model together. It knows nothing of training: one of the
reference is given a chunk, and a file of scores appears in the store.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import CheckpointError, ErrorsWithoutSecrets, FinalError, StorageError
from dpo_ray.orchestration.logs import log_as
from dpo_ray.orchestration.monitor import START_S, Place
from dpo_ray.orchestration.nodes import kill, lead_gloo, on_nodes
from dpo_ray.orchestration.resources import resources_per_device
from dpo_ray.orchestration.worker import final_error
from dpo_ray.pairs.store import Chunk, brought_scores, read_chunk
from dpo_ray.redaction import without_secrets
from dpo_ray.reference.brought import check_brought
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.versions import Version, version_after
from dpo_ray.training.faults import record_fault

log = logging.getLogger(__name__)

# How often a replica that computes is asked whether it moves.
ASK_S = 5.0
# A replica that is lost at once, again and again, shall not use up the limit within a second.
LOST_PAUSE_S = 2.0

Stage = Literal["waiting for room", "loading", "idle", "scoring"]


class Work(Protocol):
    """What a replica is given."""

    @property
    def name(self) -> str:
        """For people to read, and different for each."""


W = TypeVar("W", bound=Work)


class Replica:
    """One device of a replica; those that do something also have `load(rendezvous)` and `score(work)`."""

    role = "replica"

    def __init__(self, config: Config, rank: int) -> None:
        """Loads nothing yet: of an actor that fails at its start Ray says more than what went wrong."""
        self._config, self._rank = config, rank
        self._moved_at = time.monotonic()
        log_as(run=config.name, role=self.role, rank=rank)

    def __repr__(self) -> str:
        return f"{self._config.name}, {self.role}, device {self._rank}"

    def here(self) -> tuple[Place, str]:
        """Where this process runs, and an address on which others can meet it."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return Place.here(), f"tcp://{ray.util.get_node_ip_address()}:{port}"

    def _join(self, rendezvous: str, alone: bool) -> Any:
        """Settles where this process computes, and joins those of the other devices.

        Args:
            rendezvous: Where they meet.
            alone: Whether one device is to be a process group too.

        Returns:
            The device.
        """
        import torch  # Only the actor needs the model's libraries.
        import torch.distributed as dist

        options, devices = self._config.reference, self._config.reference.devices_per_replica
        device = torch.device("cuda" if options.gpus_per_replica else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(options.cpus_per_replica / devices)))
        if devices > 1 or alone:
            lead_gloo()
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=rendezvous, rank=self._rank, world_size=devices)
        return device

    @ray.method(concurrency_group="asked")
    def still_s(self) -> float:
        """For how long the model has not moved, though the storage answers and nothing comes from it."""
        if storage.failing() or storage.transferring():
            self._moved()
        return time.monotonic() - self._moved_at

    def _moved(self) -> None:
        self._moved_at = time.monotonic()


class ReferenceReplica(Replica):
    """One of the reference."""

    role = "reference"

    def __init__(
        self, config: Config, pairs_uri: str, reference: ReferenceStore, version: Version | None, rank: int
    ) -> None:
        """Loads nothing yet."""
        Replica.__init__(self, config, rank)
        self._pairs_uri, self._reference, self._version = pairs_uri, reference, version
        self._scorer: Any = None

    @ErrorsWithoutSecrets()
    def load(self, rendezvous: str) -> None:
        """Loads the model, or this device's part of it."""
        from dpo_ray.reference.scorer import Scorer

        device, options = self._join(rendezvous, alone=False), self._config.reference
        self._scorer = Scorer(
            self._config.reference_path,
            self._config.reference_dtype,
            self._config.model.attention,
            options.tokens_per_microbatch,
            device,
            sharded=options.devices_per_replica > 1,
            per_token=self._config.needs_token_scores,
            weights=self._read_version if self._version else None,
        )
        log.info("has loaded %s", self._config.reference_path)

    def _read_version(self, model: Any) -> None:
        """Gives a model the weights of the version: they are in every checkpoint until the next."""
        from dpo_ray.training import manifest
        from dpo_ray.training.checkpoint import read_reference

        run_uri, every = self._config.run_uri, self._config.reference.sync_steps
        assert every is not None
        assert self._version is not None
        failed = ""
        for name in reversed(manifest.committed(run_uri)):
            try:
                state = manifest.read_manifest(run_uri, name).state
                if self._version == version_after(state.step, state.reference_attempt, every):
                    read_reference(run_uri, name, model)
                    return
            except FileNotFoundError:
                continue  # Removed, or set aside, just now.
            except CheckpointError as error:
                failed = f": {error}"
        raise CheckpointError(f"{run_uri}: no checkpoint has version {self._version.number} of the reference{failed}")

    @ErrorsWithoutSecrets()
    def score(self, chunk: Chunk) -> int:
        """Scores a chunk and commits it; the first device of a replica writes.

        Returns:
            Pairs scored.
        """
        self._moved()
        pairs = read_chunk(self._pairs_uri, chunk)
        if self._config.reference.columns:
            scores = brought_scores(self._pairs_uri, chunk, [pair.pair_id for pair in pairs])
            check_brought(self._pairs_uri, chunk, pairs, scores, self._scorer.score)
        else:
            scores = self._scorer.score(pairs, self._moved)
        if self._rank == 0:
            self._reference.put(chunk, [pair.pair_id for pair in pairs], scores)
            log.info("has scored %s, %d pairs", chunk.name, len(pairs))
        return len(pairs)


@dataclass(frozen=True, slots=True)
class Scored(Generic[W]):
    """A replica has committed what came of a piece of work.

    Attributes:
        work: Which.
        seconds: How long it took.
    """

    work: W
    seconds: float


@dataclass(frozen=True, slots=True)
class Lost(Generic[W]):
    """A replica is gone.

    Attributes:
        work: What it was doing, if anything.
        reason: In a line.
        final: The error that would come again, or None.
        raised: Whether its own code raised, as it may at the next replica too.
    """

    work: W | None
    reason: str
    final: FinalError | None = None
    raised: bool = False


def until_stopped(go_on: Callable[[], None], stopped: threading.Event, what: str) -> None:
    """Calls again and again what hands work to replicas, until it is stopped.

    Args:
        go_on: A round.
        stopped: When it is set, no other follows.
        what: Who waits, for people.
    """
    while not stopped.is_set():
        try:
            go_on()
        except StorageError as error:
            # An outage that outlasts all patience: what is done is kept, and the rest can wait.
            log.warning("the %s waits for the storage: %s", what, error)
            stopped.wait(LOST_PAUSE_S)


class ReplicaFailures:
    """Replicas lost since the last piece of work that was done, and over the same one."""

    def __init__(self, limit: int, error: type[FinalError], what: str, run_uri: str | None = None) -> None:
        """Begins to count.

        Args:
            limit: How many are survived; -1: any number.
            error: Raised for one more.
            what: The replica's kind, for people.
            run_uri: The run that they are on record for; None: for none.
        """
        self._limit, self._error, self._what, self._run_uri = limit, error, what, run_uri
        self._tries: Counter[str] = Counter()
        self._failures, self._raised, self._lost_at = 0, "", -LOST_PAUSE_S

    def pausing(self) -> bool:
        """Whether one has just been lost."""
        return time.monotonic() - self._lost_at <= LOST_PAUSE_S

    def done(self) -> None:
        """Work was done."""
        self._failures, self._raised = 0, ""

    def count(self, event: Lost[W]) -> None:
        """Counts a loss.

        Raises:
            FinalError: It is one too many, or would come again.
        """
        if event.final is not None:
            raise event.final
        if event.raised and event.reason == self._raised:
            advice = "; lower reference.tokens_per_microbatch" if "out of memory" in event.reason else ""
            raise self._error(f"two replicas one after the other raised: {event.reason}{advice}")
        self._raised = event.reason if event.raised else ""
        # With a node, all that were on it are lost.
        if not self.pausing():
            self._failures, self._lost_at = self._failures + 1, time.monotonic()
        what, times = "", self._failures
        if event.work is not None:
            self._tries[event.work.name] += 1
            what, times = f" over {event.work.name}", max(times, self._tries[event.work.name])
        if -1 < self._limit < times:
            raise self._error(
                f"a replica was lost{what}: {event.reason}; {times} times now, recovery.max_reference_failures is "
                f"{self._limit}; see to the cause and give the same command again: what is scored is kept"
            )
        lost = f"a replica of the {self._what} was lost{what}: {event.reason}"
        log.warning("%s; another takes its place", lost)
        if self._run_uri is not None:
            record_fault(self._run_uri, without_secrets(lost))


@dataclass(slots=True, eq=False)
class _Replica(Generic[W]):
    actors: list[Any]
    group: PlacementGroup | None
    pending: list[Any]
    answers: dict[Any, Any] = field(default_factory=dict)
    stage: Stage = "waiting for room"
    places: dict[int, Place] = field(default_factory=dict)
    work: W | None = None
    since: float = field(default_factory=time.monotonic)
    asked: dict[Any, float] = field(default_factory=dict)
    asked_at: float = 0.0


def reference_replicas(
    config: Config, pairs_uri: str, reference: ReferenceStore, version: Version | None
) -> Replicas[Chunk]:
    """Those that score chunks.

    Args:
        config: The run.
        pairs_uri: The pair store.
        reference: Where scores go.
        version: Of a reference that has moved.
    """
    return Replicas(config, ReferenceReplica, pairs_uri, reference, version)


class Replicas(Generic[W]):
    """The pool; used from one thread.

    Attributes:
        started: How many replicas were started so far.
    """

    def __init__(self, config: Config, kind: type[Replica], *arguments: Any) -> None:
        """Starts nothing yet.

        Args:
            config: The run.
            kind: The actors' class.
            arguments: What it is made with, between the configuration and the rank.
        """
        self._config, self._kind, self._arguments = config, kind, arguments
        self._replicas: list[_Replica[W]] = []
        self.started = 0

    def __len__(self) -> int:
        return len(self._replicas)

    def waiting_s(self) -> float:
        """For how long the replica that waits longest has waited for room."""
        waiting = [replica.since for replica in self._replicas if replica.stage == "waiting for room"]
        return time.monotonic() - min(waiting) if waiting else 0.0

    def at_work(self) -> int:
        """Replicas that have room."""
        return sum(replica.stage != "waiting for room" for replica in self._replicas)

    def resize(self, wanted: int) -> None:
        """Starts replicas, or lets some go: those without room first, then idle ones; none that scores."""
        for _ in range(wanted - len(self._replicas)):
            self._replicas.append(self._start())
            self.started += 1
        spare = [each for stage in ("waiting for room", "idle") for each in self._replicas if each.stage == stage]
        self._end(spare[: max(0, len(self._replicas) - wanted)])

    def idle(self) -> int:
        """Replicas that have nothing to do."""
        return sum(replica.stage == "idle" for replica in self._replicas)

    def score(self, work: W) -> None:
        """Gives a piece of work to an idle replica."""
        replica = next(each for each in self._replicas if each.stage == "idle")
        replica.work = work
        self._go_on(replica, "scoring", [actor.score.remote(work) for actor in replica.actors])

    def look(self, timeout_s: float) -> list[Scored[W] | Lost[W]]:
        """What has happened; waits for something to happen."""
        of_ref = {
            ref: each for each in self._replicas for ref in [*each.pending, *each.asked] if ref not in each.answers
        }
        if not of_ref:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(list(of_ref), num_returns=1, timeout=timeout_s)
        ready, _ = ray.wait(list(of_ref), num_returns=len(of_ref), timeout=0) if ready else ([], [])
        events: list[Scored[W] | Lost[W]] = []
        for replica in {id(of_ref[ref]): of_ref[ref] for ref in ready}.values():
            events += self._advance(replica, set(ready))
        for replica in list(self._replicas):
            if reason := self._standstill(replica):
                events.append(self._lost(replica, reason))
        return events

    def close(self) -> None:
        """Lets all replicas go, whatever they do."""
        self._end(list(self._replicas))

    def _start(self) -> _Replica[W]:
        devices, each = self._config.reference.devices_per_replica, resources_per_device(self._config)
        labels = self._config.reference.label_selector
        custom = {name: amount for name, amount in each.items() if name not in ("CPU", "GPU")}
        group: PlacementGroup | None = None
        strategy: Any = "DEFAULT"
        if devices > 1:
            # All or none of them, near each other where there is room.
            group = placement_group(
                [each] * devices, strategy="PACK", bundle_label_selector=[labels] * devices if labels else None
            )
            strategy = PlacementGroupSchedulingStrategy(group)
        actor = ray.remote(concurrency_groups={"asked": 1}, max_restarts=0, max_task_retries=0)(self._kind)
        place = actor.options(
            num_cpus=each.get("CPU", 0.0),
            num_gpus=each.get("GPU", 0.0),
            resources=custom,
            label_selector=labels or None,
            scheduling_strategy=strategy,
        )
        actors = [place.remote(self._config, *self._arguments, rank) for rank in range(devices)]
        return _Replica(actors, group, [one.here.remote() for one in actors])

    def _advance(self, replica: _Replica[W], ready: set[Any]) -> list[Scored[W] | Lost[W]]:
        """Takes what a replica has answered."""
        try:
            for ref in [ref for ref in replica.asked if ref in ready]:
                del replica.asked[ref]
                still_s = ray.get(ref)
                if still_s > self._limit_s(replica):
                    return [self._lost(replica, f"stood still for {still_s:.0f} s ({replica.stage})")]
            replica.answers |= {ref: ray.get(ref) for ref in replica.pending if ref in ready}
        except Exception as error:
            final, died = final_error(error), isinstance(error, RayActorError)
            if isinstance(final, StorageError):
                # What does not answer now may answer later.
                return [self._lost(replica, str(final))]
            return [self._lost(replica, "its process died" if died else _reason(error), final, raised=not died)]
        if not replica.pending or len(replica.answers) < len(replica.pending):
            return []
        answers = [replica.answers[ref] for ref in replica.pending]
        match replica.stage:
            case "waiting for room":
                replica.places = {rank: place for rank, (place, _) in enumerate(answers)}
                (_, rendezvous), *_ = answers
                self._go_on(replica, "loading", [actor.load.remote(rendezvous) for actor in replica.actors])
            case "loading":
                self._go_on(replica, "idle", [])
            case "scoring":
                assert replica.work is not None
                scored = Scored(replica.work, time.monotonic() - replica.since)
                replica.work = None
                self._go_on(replica, "idle", [])
                return [scored]
        return []

    def _go_on(self, replica: _Replica[W], stage: Stage, pending: Sequence[Any]) -> None:
        replica.stage, replica.pending, replica.answers = stage, list(pending), {}
        replica.since = replica.asked_at = time.monotonic()
        replica.asked.clear()

    def _standstill(self, replica: _Replica[W]) -> str | None:
        """Asks a replica that computes whether it moves, and says so when it does not answer."""
        if replica.stage not in ("loading", "scoring"):
            return None
        now = time.monotonic()
        if replica.asked:
            silent_s = now - min(replica.asked.values())
            return f"gave no answer for {silent_s:.0f} s" if silent_s > self._limit_s(replica) else None
        if now - replica.asked_at > ASK_S:
            replica.asked_at = now
            replica.asked = {actor.still_s.remote(): now for actor in replica.actors}
        return None

    def _limit_s(self, replica: _Replica[W]) -> float:
        return self._config.recovery.hang_timeout_s + START_S * (replica.stage == "loading")

    def _lost(
        self, replica: _Replica[W], reason: str, final: FinalError | None = None, raised: bool = False
    ) -> Lost[W]:
        lost = Lost(replica.work, reason, final, raised)
        self._end([replica])
        return lost

    def _end(self, going: Sequence[_Replica[W]]) -> None:
        self._replicas = [replica for replica in self._replicas if replica not in going]
        places = list[Place]()
        for replica in going:
            for actor in replica.actors:
                with contextlib.suppress(RayError):
                    ray.kill(actor)
            if replica.group is not None:
                remove_placement_group(replica.group)
            if replica.stage in ("loading", "scoring"):
                places += replica.places.values()
        # A process that stands still does not hear Ray.
        if places:
            on_nodes(kill, dict(enumerate(places)))


def _reason(error: Exception) -> str:
    """What an error says, without what Ray says around it."""
    return str(final_error(error) or (str(error).strip() or type(error).__name__).splitlines()[-1])
