"""The reference filler: has chunks scored in the plan's order into the reference store, beside the trainer.

A thread of the driver, with a pool of replicas. Nothing but the store connects it to the trainer: a restart of the
trainer leaves it alone, and its devices are given back as soon as all chunks have scores.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ReferenceFillError, StorageError
from dpo_ray.model.weights import weights_digest
from dpo_ray.orchestration.replicas import Lost, ReplicaFailures, Scored, reference_replicas, until_stopped
from dpo_ray.orchestration.resources import ensure_resources, needs, needs_of_device
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.store import Chunk, PairStore
from dpo_ray.redaction import without_secrets
from dpo_ray.reference.claims import Claims
from dpo_ray.reference.demand import Demand
from dpo_ray.reference.store import ReferenceStore, brought_fingerprint, error_place, store_fingerprint
from dpo_ray.reference.versions import Version
from dpo_ray.types import Attempt

log = logging.getLogger(__name__)

LOOK_S = 0.5
# How often chunks that others score, or that a reader has refused, are looked at.
ELSEWHERE_LOOK_S, REFUSED_LOOK_S = 1.0, 5.0
REPORT_S = 10.0
TELL_S, STOP_S = 30.0, 60.0
# Of a rate that is measured step by step, or chunk by chunk, the newest counts this much.
NEWEST = 0.2


def open_reference_store(config: Config, pairs_uri: str) -> ReferenceStore:
    """The store of the configured reference's scores, or of those that came with the pairs."""
    digest = weights_digest(config.reference_path, storage.join(config.store_uri, "digests"))
    model, per_token = config.model, config.needs_token_scores
    name = store_fingerprint(digest, config.reference_dtype, model.attention, per_token, config.adapter.quantize)
    if config.reference.columns:
        name = brought_fingerprint(digest, pairs_uri)
    return ReferenceStore(storage.join(config.store_uri, "reference", name))


def chunks_in_order_of_need(
    config: Config, plan: Plan, pairs: PairStore, position: int, stop: int | None = None
) -> list[Chunk]:
    """All chunks that training from `position` reads, those of the held-out pairs where they are first needed.

    Args:
        config: The run.
        plan: The order of training.
        pairs: The pair store.
        position: Global batches done.
        stop: Only up to this step, where it is before the end.
    """
    last = min(stop or plan.total_steps, plan.total_steps)
    if stop is not None and position >= last:
        return []
    order = replace(plan, total_steps=last).chunks_in_order_of_need(position)
    every = config.train.eval_every_steps
    if every is None or last // every == position // every and last < plan.total_steps:
        return order
    before = sum(1 for _ in _until(order, every * plan.global_batch_pairs))
    return [*order[:before], *pairs.eval, *order[before:]]


def _until(order: Sequence[Chunk], num_pairs: int) -> list[Chunk]:
    taken, total = list[Chunk](), 0
    for chunk in order:
        if total >= num_pairs:
            break
        taken.append(chunk)
        total += chunk.num_pairs
    return taken


@dataclass(slots=True)
class Filled:
    """What a filler has done, as `<run>/reference.json` has it.

    Attributes:
        hit_pairs: Pairs that had scores at the start.
        scored_pairs: Pairs scored by this filler.
        elsewhere_pairs: Pairs that another run scored meanwhile.
        left_pairs: Pairs still to be scored.
        left_chunks: Their chunks.
        pairs_per_s: What one replica scores.
        replicas: How many there are.
        started_replicas: How many were started.
        most_replicas: The most there were.
        lost_replicas: How many were lost.
    """

    hit_pairs: int = 0
    scored_pairs: int = 0
    elsewhere_pairs: int = 0
    left_pairs: int = 0
    left_chunks: int = 0
    pairs_per_s: float | None = None
    replicas: int = 0
    started_replicas: int = 0
    most_replicas: int = 0
    lost_replicas: int = 0


class ReferenceFiller:
    """Fills the reference store in a thread of the driver."""

    def __init__(
        self,
        config: Config,
        pairs: PairStore,
        chunks: Sequence[Chunk],
        reference: ReferenceStore,
        family: str,
        generation: int = 0,
        position: int = 0,
        version: Version | None = None,
        done: Filled | None = None,
    ) -> None:
        """Looks what is missing.

        Args:
            config: The run.
            pairs: The pair store.
            chunks: What to score, in the order of need.
            reference: Where scores go.
            family: See `Claims`.
            generation: Of the run's lease, and see `Claims`; 0 where nobody trains.
            position: Global batches trained on so far.
            version: Of a reference that has moved.
            done: What the fillers of earlier versions have done, to be added to.
        """
        self._position, self._generation = position, generation
        name = "reference.json" if generation else "reference_ahead.json"
        self._report_uri = storage.join(config.run_uri, name)
        self._train_keys = {chunk.key for chunk in pairs.train}
        self._config, self._reference = config, reference
        self._name = family, generation
        self._chunks = {chunk.key: chunk for chunk in chunks}
        self.missing = reference.missing(chunks)
        self.error: BaseException | None = None
        total = sum(chunk.num_pairs for chunk in chunks)
        left = sum(chunk.num_pairs for chunk in self.missing)
        self.filled = replace(done or Filled(), left_pairs=left, left_chunks=len(self.missing), replicas=0)
        self.filled.hit_pairs += total - left
        self._todo, self._elsewhere = deque(self.missing), list[Chunk]()
        self._claims: Claims | None = None
        self._pool = reference_replicas(config, pairs.uri, reference, version)
        self._started_before = self.filled.started_replicas
        self._demand = Demand(config.reference.least_replicas, config.reference.most_replicas)
        on_record = config.run_uri if generation else None
        self._failures = ReplicaFailures(
            config.recovery.max_reference_failures, ReferenceFillError, "reference", on_record
        )
        # Refused by a reader, and not scored again yet.
        self._again: set[str] = set()
        # The order of need, up to the first chunk without scores.
        self._order, self._without = deque(chunks), {chunk.key for chunk in self.missing}
        self._ready_pairs = self._trained_pairs = 0
        self._trained_per_s: float | None = None
        self._workers_short = self._workers_wait = False
        self._looked = {"elsewhere": 0.0, "refused": 0.0, "report": 0.0}
        self._told = False
        self._reported: dict[str, Any] = {}
        self._stopped, self._complete = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="reference-filler", daemon=True)

    def start(self) -> None:
        """Begins; without missing chunks no actor or device is asked for."""
        self._thread.start()

    def begins(self, attempt: Attempt) -> None:
        """An attempt begins: nothing changes for those who score."""

    def working(self) -> bool:
        """Whether replicas have, or need, room."""
        return self._thread.is_alive() and not self._complete.is_set()

    def trained(self, line: dict[str, Any]) -> None:
        """Takes note of a training step, by its line of metrics."""
        if "perf/step_s" not in line:
            return
        num_pairs = line["perf/pairs_per_s"] * line["perf/step_s"]
        self._trained_pairs = (line["step"] - self._position) * self._config.train.global_batch_pairs
        # A step that waited says nothing of how fast the trainer could be but for the rest of its time.
        rate = num_pairs / max(1e-3, line["perf/step_s"] - line["perf/data_wait_s"])
        self._trained_per_s = _smoothed(self._trained_per_s, rate)

    def workers_wait(self, short: bool | None) -> None:
        """Policy workers wait for room: replicas beyond the least give way.

        Args:
            short: Whether there is too little room; False: only nobody else shall take it; None: the wait is over.
        """
        self._workers_wait, self._workers_short = short is not None, bool(short)

    def stop(self) -> None:
        """Ends, whatever is still to be scored."""
        self._stopped.set()
        if self._thread.ident is not None:
            # Nothing must keep a finished driver.
            self._thread.join(timeout=STOP_S)

    def check(self) -> None:
        """Raises when the filler has stopped with an error.

        Raises:
            ReferenceFillError: Not all chunks will be scored.
        """
        if self.error is not None:
            raise ReferenceFillError(f"the reference stopped: {self.error}") from self.error

    def _run(self) -> None:
        try:
            until_stopped(self._go_on, self._stopped, "reference")
        except BaseException as error:
            self.error = error
        finally:
            self._pool.close()
            with contextlib.suppress(StorageError), storage.patience(STOP_S / 2):
                if self.error is not None and self._generation:
                    # The waiting stream sees only storage.
                    place = error_place(self._config.run_uri, self._generation)
                    said = without_secrets(str(self.error)) or type(self.error).__name__
                    storage.write_json(place, {"error": said})
                if self._claims is not None:
                    self._claims.close()
                self._report(last=True)

    def _go_on(self) -> None:
        self._take_refused()
        if self._without:
            self._work()
        else:
            self._rest()
        self._report()

    def _work(self) -> None:
        if self._claims is None:
            self._claims = Claims(self._reference.uri, *self._name)
        self._look_elsewhere()
        if not self._failures.pausing():
            self._pool.resize(min(self._wanted(), len(self._without) - len(self._elsewhere)))
        self._hand_out()
        for event in self._pool.look(LOOK_S):
            if isinstance(event, Scored):
                self._scored(event)
            else:
                self._lost(event)
        self.filled.replicas = self._pool.at_work()
        self.filled.started_replicas = self._started_before + self._pool.started
        self.filled.most_replicas = max(self.filled.most_replicas, self.filled.replicas)
        if self._pool.waiting_s() > TELL_S and not self._told and not self._pool.at_work():
            options, self._told = self._config.reference, True
            (need,) = needs([("reference.replicas", options.devices_per_replica, needs_of_device(self._config))])
            log.warning("the reference waits for room: %s%s", need, f": {need.remedy}" if need.impossible else "")

    def _rest(self) -> None:
        """Nothing to do: no actor, no device, no claim."""
        if not self._complete.is_set():
            self._pool.close()
            if self._claims is not None:
                self._claims.close()
                self._claims = None
            self.filled.replicas = 0
            self._looked["report"] = 0.0
            self._complete.set()
        self._stopped.wait(LOOK_S)

    def _wanted(self) -> int:
        if self._workers_short:
            return self._demand.least
        ahead = self._ready_pairs - self._trained_pairs
        wanted = self._demand.replicas(len(self._pool), ahead, self._trained_per_s, self.filled.pairs_per_s)
        # What waits for room beyond the least might take that of workers that are just being started again.
        return max(self._demand.least, min(wanted, self._pool.at_work())) if self._workers_wait else wanted

    def _hand_out(self) -> None:
        assert self._claims is not None
        while self._todo and self._pool.idle():
            chunk = self._todo[0]
            ours = self._claims.take(chunk.key)
            # Perhaps by another, who has committed it and given it back.
            scored = ours and self._is_scored(chunk)
            # From here on nothing can fail: a chunk is always in one place.
            self._todo.popleft()
            if not ours:
                self._elsewhere.append(chunk)
            elif scored:
                self._elsewhere_scored(chunk)
            else:
                self._pool.score(chunk)

    def _look_elsewhere(self) -> None:
        """Chunks that others score: done, or still theirs, or nobody's any more."""
        assert self._claims is not None
        if not self._elsewhere or not self._due("elsewhere", ELSEWHERE_LOOK_S):
            return
        for chunk in list(self._elsewhere):
            if self._is_scored(chunk):
                self._elsewhere.remove(chunk)
                self._elsewhere_scored(chunk)
            elif self._pool.idle() and self._claims.take(chunk.key):
                self._elsewhere.remove(chunk)
                self._todo.appendleft(chunk)

    def _is_scored(self, chunk: Chunk) -> bool:
        place = self._reference.place(chunk.key)
        return self._reference.has(chunk) if chunk.key in self._again else storage.exists(place)

    def _take_refused(self) -> None:
        """Has chunks scored again whose scores a reader could not use."""
        if not self._due("refused", REFUSED_LOOK_S):
            return
        for key in self._reference.refused():
            chunk = self._chunks.get(key)
            if chunk is None or key in self._without:
                continue
            reason = self._reference.refusal(key)
            if reason is None:
                continue
            if self._config.reference.place == "store_only":
                raise ReferenceFillError(
                    f"{reason}, and reference.place is store_only: score it again with `dpo-ray reference`, or set "
                    "reference.place: actors"
                )
            # Workers may have taken all the room since.
            ensure_resources(self._config, workers=bool(self._generation))
            log.warning("%s: it is scored again", reason)
            self._without.add(key)
            self._again.add(key)
            self._todo.appendleft(chunk)
            self.filled.hit_pairs -= chunk.num_pairs
            self.filled.left_pairs += chunk.num_pairs
            self.filled.left_chunks += 1
            self._complete.clear()

    def _scored(self, event: Scored[Chunk]) -> None:
        self._failures.done()
        self.filled.scored_pairs += event.work.num_pairs
        rate = event.work.num_pairs / max(1e-3, event.seconds)
        self.filled.pairs_per_s = _smoothed(self.filled.pairs_per_s, rate)
        self._has_scores(event.work)

    def _elsewhere_scored(self, chunk: Chunk) -> None:
        self.filled.elsewhere_pairs += chunk.num_pairs
        self._has_scores(chunk)

    def _has_scores(self, chunk: Chunk) -> None:
        self._give_back(chunk)
        self._without.discard(chunk.key)
        self._again.discard(chunk.key)
        self.filled.left_pairs -= chunk.num_pairs
        self.filled.left_chunks -= 1
        while self._order and self._order[0].key not in self._without:
            ready = self._order.popleft()
            self._ready_pairs += ready.num_pairs * (ready.key in self._train_keys)

    def _lost(self, event: Lost[Chunk]) -> None:
        self.filled.lost_replicas += event.final is None
        if event.work is not None:
            self._give_back(event.work)
            self._todo.appendleft(event.work)
        self._failures.count(event)

    def _give_back(self, chunk: Chunk) -> None:
        assert self._claims is not None
        # What cannot be given back now is at the end.
        with contextlib.suppress(StorageError):
            self._claims.release(chunk.key)

    def _due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._looked[what] < every_s:
            return False
        self._looked[what] = now
        return True

    def _report(self, last: bool = False) -> None:
        if self._due("report", 0.0 if last else REPORT_S) and (last or asdict(self.filled) != self._reported):
            self._reported = asdict(self.filled)
            storage.write_json(self._report_uri, self._reported)


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else (1 - NEWEST) * before + NEWEST * value
