"""A Ray Train worker: from Ray's context to a `WorkerContext`, then the train loop."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import ray
import ray.train

from dpo_ray import errors
from dpo_ray.config import Config
from dpo_ray.orchestration.monitor import Failure, Reporter
from dpo_ray.orchestration.stream import Places, eval_feed, make_feed
from dpo_ray.orchestration.watch import warnings_to
from dpo_ray.pairs import pack
from dpo_ray.training.attempts import Fence
from dpo_ray.types import Attempt, GlobalBatch, WorkerContext


def work(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the train loop, and a report of how it ended.

    Args:
        arguments: `config`, `places`, `attempt`, and `monitor`, the handle of the attempt's `Monitor`.
    """
    from dpo_ray.training.loop import train  # Ray Train's controller imports this file too, and needs no model.

    config: Config = arguments["config"]
    reporter = Reporter(arguments["monitor"], ray.train.get_context().get_world_rank())
    failure = None
    try:
        with warnings_to(reporter.warn):
            train(config, _context(config, arguments["places"], arguments["attempt"], reporter))
    except BaseException as error:
        failure = _failure(error)
        raise
    finally:
        reporter.close(failure)


def _failure(error: BaseException) -> Failure:
    final = final_error(error)
    # Storage that does not answer now may answer the next attempt.
    storage_failed = isinstance(final, errors.StorageError)
    return Failure(None if storage_failed else final, storage_failed, "".join(traceback.format_exception(error)))


def final_error(error: BaseException | None) -> errors.FinalError | None:
    """The error that would come again behind an exception, through the layers that Ray wraps around it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, errors.FinalError):
            # Ray's own class of it carries a traceback in its message.
            original = getattr(error, "cause", None)
            return original if isinstance(original, errors.FinalError) else error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _context(config: Config, places: Places, attempt: Attempt, reporter: Reporter) -> WorkerContext:
    import ray.train.torch
    import torch

    ray_context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    rank, world_size = ray_context.get_world_rank(), ray_context.get_world_size()
    shard = ray.train.get_dataset_shard("train")
    feed, pairs = make_feed(config, places)
    held = eval_feed(config, feed, pairs.eval)
    batches = _batches(shard, rank) if attempt.position < feed.plan.total_steps else iter(())
    return WorkerContext(
        rank=rank,
        world_size=world_size,
        device=device,
        attempt=attempt,
        batches=batches,
        eval_batches=lambda: held.rank_batches(0, rank, world_size),
        publish=reporter.publish,
        control=reporter,
        fence=Fence(config.run_uri, attempt).check,
        total_steps=feed.plan.total_steps,
        steps_per_epoch=feed.plan.steps_per_epoch,
        sources=feed.sources,
    )


def _batches(shard: Any, rank: int) -> Iterator[GlobalBatch]:
    for table in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        (row,) = table.to_pylist()
        assert row["rank"] == rank, f"rank {rank} was given rank {row['rank']}'s part of step {row['step']}"
        yield pack.global_batch(row)
