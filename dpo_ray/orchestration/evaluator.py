"""Evaluations beside training: a replica of the policy as its checkpoints have it, one checkpoint after the other.

A thread of the driver looks for checkpoints that are due for an evaluation and have none, and has them evaluated in the
order of their steps, by the same code with which workers would have. What is known of them lies in the run's folder
alone: whoever dies, and whenever, the same look finds what is missing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dpo_ray.config import Config
from dpo_ray.errors import ErrorsWithoutSecrets, EvaluationError
from dpo_ray.orchestration.reference_filler import LOOK_S, STOP_S, TELL_S
from dpo_ray.orchestration.replicas import Replica, ReplicaFailures, Replicas, Scored, until_stopped
from dpo_ray.orchestration.resources import needs, needs_of_device
from dpo_ray.orchestration.stream import Places, eval_feeds, make_feed
from dpo_ray.training import evaluations
from dpo_ray.training.evaluations import Made
from dpo_ray.training.manifest import checkpoint_name, set_aside
from dpo_ray.types import Attempt, Control, GlobalBatch

log = logging.getLogger(__name__)

# A line that tells of a checkpoint may have been lost.
QUIET_LOOK_S = 5.0
# So many checkpoints that wait are told of, then twice as many, and so on.
MANY = 4


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint to be evaluated."""

    made: Made

    @property
    def name(self) -> str:
        return checkpoint_name(self.made.step)


class EvaluationReplica(Replica):
    """One that evaluates."""

    role = "evaluation"

    def __init__(self, config: Config, places: Places, rank: int) -> None:
        """Loads nothing yet."""
        Replica.__init__(self, config, rank)
        self._places = places

    @ErrorsWithoutSecrets()
    def load(self, rendezvous: str) -> None:
        """Loads the policy as it was at its start, or this device's part of it."""
        device = self._join(rendezvous, alone=True)
        import torch.distributed as dist

        from dpo_ray.model.shard import sharded_policy
        from dpo_ray.training.step import objective_of

        config = self._config
        self._objective = objective_of(config.objective)
        self._model = sharded_policy(config.model, device, config.adapter, config.seed)
        # No attempt of training: the reference does not move.
        whose = Attempt(0, 0, 0, None, dist.get_world_size(), self.role, "")
        feed, pairs = make_feed(config, self._places, whose)
        self._feeds = eval_feeds(config, replace(feed, check=self._while_waiting(feed.check)), pairs)
        self._own: Any = None
        if config.needs_reference and config.reference.place == "adapter_off":
            from contextlib import nullcontext

            from dpo_ray.training.own_reference import OwnReference

            assert feed.references is not None
            about = feed.references.start, feed.pairs_uri, self._model, config.reference.tokens_per_microbatch
            self._own = OwnReference(*about, config.needs_token_scores, lambda _: self._moved(), nullcontext)
        self._moved()

    @ErrorsWithoutSecrets()
    def score(self, checkpoint: _Checkpoint) -> None:
        """Evaluates a checkpoint, and leaves the line of metrics in the run's folder."""
        from dpo_ray.training.checkpoint import read_policy
        from dpo_ray.training.evaluate import evaluate

        self._moved()
        run_uri, (step, attempt) = self._config.run_uri, checkpoint.made
        state = read_policy(run_uri, checkpoint.name, attempt, self._model)
        self._moved()
        if self._own is not None:
            self._own.score([chunk for feed in self._feeds.values() for chunk in feed.plan.chunks])
        pairs = _HeldOut(self._feeds, self._rank, self._config.reference.devices_per_replica, self._moved)
        tokens = self._config.reference.tokens_per_microbatch
        line = evaluate(self._model, pairs, self._objective.at(state), step, tokens)
        if self._rank == 0:
            evaluations.put(run_uri, checkpoint.made, line)
            log.info("has evaluated the checkpoint of step %d", step)

    def _while_waiting(self, check: Callable[[], None]) -> Callable[[], None]:
        """Who waits for scores is not standing still."""

        def checked() -> None:
            self._moved()
            check()

        return checked


class _HeldOut:
    """The held-out pairs, as `evaluate` wants them."""

    def __init__(self, feeds: dict[str, Any], rank: int, world_size: int, moved: Callable[[], None]) -> None:
        self._feeds, self._rank, self._world_size, self._moved = feeds, rank, world_size, moved
        self.eval_sets = tuple(feeds)

    @property
    def control(self) -> Control:
        return self

    def doing(self, what: str) -> None:
        self._moved()

    def leaving(self) -> bool:
        return False

    def eval_batches(self, name: str, step: int, tokens: int) -> Iterator[GlobalBatch]:
        feed = replace(self._feeds[name], scored_as=step)
        batches: Iterator[GlobalBatch] = feed.rank_batches(0, self._rank, self._world_size, tokens)
        return batches


class Evaluator:
    """Has checkpoints evaluated, in a thread of the driver."""

    def __init__(self, config: Config, places: Places, total_steps: int) -> None:
        """Starts nothing yet.

        Args:
            config: The run.
            places: Its stores.
            total_steps: Where training ends.
        """
        self._config, self._total_steps = config, total_steps
        self._pool: Replicas[_Checkpoint] = Replicas(config, EvaluationReplica, places)
        self._failures = ReplicaFailures(
            config.recovery.max_reference_failures, EvaluationError, "evaluation", config.run_uri
        )
        self._waiting = list[_Checkpoint]()
        self._looked, self._many, self._told = 0.0, MANY, False
        # When somebody first asked whether all is done, and when the last look that found nothing began.
        self._asked_at, self._nothing_at = math.inf, -math.inf
        self._error: BaseException | None = None
        self._news, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluator", daemon=True)

    def start(self) -> None:
        """Begins; until a checkpoint is due no actor or device is asked for."""
        self._thread.start()

    def trained(self, line: dict[str, Any]) -> None:
        """Takes note of a checkpoint, by the line that tells of it."""
        self._asked_at = math.inf
        if "checkpoint" in line:
            self._news.set()

    def done(self) -> bool:
        """Whether every checkpoint that was there when this was first asked, and is due, has been evaluated."""
        if self._asked_at == math.inf:
            self._asked_at = time.monotonic()
            self._news.set()
        return self._nothing_at > self._asked_at

    def check(self) -> None:
        """Raises when no more checkpoints will be evaluated.

        Raises:
            EvaluationError: They will not.
        """
        if self._error is not None:
            raise EvaluationError(f"the evaluation stopped: {self._error}") from self._error

    def stop(self) -> None:
        """Ends, whatever is still to be evaluated."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=STOP_S)

    def _run(self) -> None:
        try:
            until_stopped(self._go_on, self._stopped, "evaluation")
        except BaseException as error:
            self._error = error
        finally:
            self._pool.close()

    def _go_on(self) -> None:
        now = time.monotonic()
        if self._news.is_set() or now - self._looked > QUIET_LOOK_S:
            self._news.clear()
            self._looked = now
            run_uri = self._config.run_uri
            found = evaluations.waiting(run_uri, self._config.train, self._total_steps, partial(set_aside, run_uri))
            self._waiting = [_Checkpoint(made) for made in found]
            if not found:
                self._nothing_at = now
            self._warn_of_many(found)
        # The replica stays between two checkpoints: its room is kept for it.
        if self._waiting and not self._failures.pausing():
            self._pool.resize(1)
        if self._waiting and self._pool.idle():
            self._pool.score(self._waiting[0])
        for event in self._pool.look(LOOK_S):
            self._news.set()
            if isinstance(event, Scored):
                self._failures.done()
            else:
                self._failures.count(event)
        if self._pool.waiting_s() > TELL_S and not self._told:
            self._told = True
            count = self._config.reference.devices_per_replica
            (need,) = needs([("reference.devices_per_replica", count, needs_of_device(self._config))])
            log.warning("the evaluation waits for room: %s%s", need, f": {need.remedy}" if need.impossible else "")

    def _warn_of_many(self, found: Sequence[Made]) -> None:
        if len(found) >= self._many:
            self._many = 2 * len(found)
            log.warning(
                "%d checkpoints, from step %d on, wait to be evaluated and are kept until then: evaluations take "
                "longer than train.eval_every_steps: %d steps do; raise it, or hold out fewer pairs",
                *(len(found), found[0].step, self._config.train.eval_every_steps),
            )
