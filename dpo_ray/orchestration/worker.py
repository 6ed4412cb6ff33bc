"""A Ray Train worker: from Ray's context to a `WorkerContext`, then the train loop."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.train
from ray.data.collate_fn import ArrowBatchCollateFn

from dpo_ray import errors
from dpo_ray.config import Config, ScalingConfig
from dpo_ray.errors import ErrorsWithoutSecrets
from dpo_ray.orchestration.logs import log_as
from dpo_ray.orchestration.monitor import Failure, FailureKind, Place, Reporter
from dpo_ray.orchestration.stream import Places, eval_feeds, make_feed
from dpo_ray.orchestration.watch import warnings_to
from dpo_ray.pairs import pack
from dpo_ray.redaction import without_secrets
from dpo_ray.training.attempts import Fence
from dpo_ray.types import Attempt, GlobalBatch, WorkerContext

log = logging.getLogger(__name__)

E = TypeVar("E", bound=errors.DpoRayError)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the workers of an attempt are given.

    Attributes:
        config: The run.
        places: Its stores.
        attempt: Its record.
        streams: For each rank where its batches come from; empty when no step is left.
        monitor: Handle of the attempt's `Monitor`.
    """

    config: Config
    places: Places
    attempt: Attempt
    streams: Sequence[ray.data.DataIterator]
    monitor: Any


def work(arguments: dict[str, Assignment]) -> None:
    """What each Ray Train worker runs: the train loop, and a report of how it ended.

    Args:
        arguments: The `assignment`.
    """
    assignment = arguments["assignment"]
    rank, attempt = ray.train.get_context().get_world_rank(), assignment.attempt
    log_as(run=assignment.config.name, attempt=attempt.attempt, rank=rank)
    log.info("begins after step %d, one of %d workers", attempt.position, attempt.world_size)
    reporter = Reporter(assignment.monitor, rank)
    failure = None
    try:
        # What is imported is no garbage: each look through it takes a quarter of a second, and stops every thread.
        gc.disable()
        from dpo_ray.training.loop import train  # The driver imports this file too, and needs no model.

        gc.freeze()
        gc.enable()
        with warnings_to(reporter.warn), ErrorsWithoutSecrets():
            train(assignment.config, _context(assignment, reporter))
    except BaseException as error:
        failure = _failure(error)
        log.error("failed (%s): %s", failure.kind, failure.text)
        raise
    else:
        log.info("ended")
    finally:
        reporter.close(failure)


def _failure(error: BaseException) -> Failure:
    final = final_error(error)
    # Storage that does not answer now may answer the next attempt.
    kind: FailureKind = "worker"
    if isinstance(final, errors.StorageError):
        final, kind = None, "storage"
    elif isinstance(error, errors.OutOfMemoryError):
        kind = "memory"
    text = without_secrets("".join(traceback.format_exception(error)))
    if lost := behind(error, errors.ScoresLostError):
        # The last line is the reason that people see; Ray's advice stands there.
        text += str(lost).splitlines()[0]
    return Failure(final, kind, text)


def final_error(error: BaseException | None) -> errors.FinalError | None:
    """The error that would come again behind an exception, through the layers that Ray wraps around it."""
    return behind(error, errors.FinalError)


def behind(error: BaseException | None, kind: type[E]) -> E | None:
    """The first error of a kind behind an exception, through the layers that Ray wraps around it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, kind):
            # Ray's own class of it carries a traceback in its message.
            original = getattr(error, "cause", None)
            return original if isinstance(original, kind) else error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _context(assignment: Assignment, reporter: Reporter) -> WorkerContext:
    import ray.train.torch
    import torch
    import torch.distributed as dist

    config, attempt = assignment.config, assignment.attempt
    ray_context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    rank, world_size = ray_context.get_world_rank(), ray_context.get_world_size()
    nodes = [""] * world_size
    dist.all_gather_object(nodes, Place.here().node_id)
    feed, pairs = make_feed(config, assignment.places, attempt)
    held = eval_feeds(config, feed, pairs)
    costs = assignment.places.costs

    def batches(tokens_per_microbatch: int) -> Iterator[GlobalBatch]:
        if not assignment.streams:
            return iter(())
        unpack = _Unpack(rank, tokens_per_microbatch, costs)
        # Ray's thread is a batch ahead by itself. What Ray calls prefetching holds a batch back until those after it
        # are there, which may wait for scores that are made after this one's step.
        stream = assignment.streams[rank].iter_torch_batches(batch_size=1, prefetch_batches=0, collate_fn=unpack)
        return iter(stream)

    def eval_batches(name: str, step: int, tokens_per_microbatch: int) -> Iterator[GlobalBatch]:
        return replace(held[name], scored_as=step).rank_batches(0, rank, world_size, tokens_per_microbatch)

    return WorkerContext(
        rank=rank,
        world_size=world_size,
        group=group_among(config.scaling, rank, nodes),
        device=device,
        attempt=attempt,
        batches=batches,
        eval_sets=config.data.eval_sets,
        eval_batches=eval_batches,
        publish=reporter.publish,
        control=reporter,
        fence=Fence(config.run_uri, attempt).check,
        total_steps=feed.plan.total_steps,
        steps_per_epoch=feed.plan.steps_per_epoch,
        sources=feed.sources,
        feeds=(feed, held),
    )


def group_among(scaling: ScalingConfig, rank: int, nodes: Sequence[str]) -> int:
    """How many workers share a copy of the weights; rank 0 says so where they are not those that were asked for.

    Args:
        scaling: Who shall.
        rank: Of this worker.
        nodes: Where each is. Ray Train numbers workers node by node; its own count of a node's goes by addresses.
    """
    group, world_size = scaling.group_of(nodes), len(nodes)
    wanted = {"all": world_size, "node": nodes.count(nodes[0])}.get(str(scaling.shard_over), scaling.shard_over)
    if rank == 0 and group != wanted:
        log.warning(
            "scaling.shard_over is %s, and the %d workers (%s on a node) are no groups of that kind: in this attempt "
            "all of them share one copy of the weights",
            *(scaling.shard_over, world_size, ", ".join(str(nodes.count(node)) for node in dict.fromkeys(nodes))),
        )
    return group


class _Unpack(ArrowBatchCollateFn):
    """From the stream's rows to batches: Ray Data calls it some batches ahead, in a thread beside training."""

    def __init__(self, rank: int, tokens_per_microbatch: int, costs: pack.Costs) -> None:
        self._rank, self._tokens, self._costs = rank, tokens_per_microbatch, costs

    def __call__(self, batch: pa.Table) -> GlobalBatch:
        row = pack.row_of(batch)
        assert row["rank"] == self._rank, f"rank {self._rank} was given rank {row['rank']}'s part of step {row['step']}"
        return pack.global_batch(row, self._tokens, self._costs)
