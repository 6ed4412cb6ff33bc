"""A Ray Train worker: from Ray's context to a `WorkerContext`, then the train loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_ray import errors, storage
from dpo_ray.config import Config
from dpo_ray.orchestration.stream import Places, attempts_uri, eval_feed, make_feed
from dpo_ray.pairs import pack
from dpo_ray.types import Attempt, GlobalBatch, WorkerContext


def work(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs.

    An error that would come again is written down and ends the run; anything else is raised, so that Ray Train starts
    the group again.

    Args:
        arguments: `config`, `places`, and `board`, which takes lines of metrics to the driver.
    """
    from dpo_ray.training.loop import train  # Ray Train's controller imports this file too, and needs no model.

    config: Config = arguments["config"]
    if storage.exists(stop_uri(config)):
        return
    try:
        train(config, _context(config, arguments["places"], arguments["board"]))
    except Exception as error:
        final = final_error(error)
        # Storage that does not answer now may answer the next attempt.
        if final is None or isinstance(final, errors.StorageError):
            raise
        storage.write_json(stop_uri(config), {"error": type(final).__name__, "message": str(final)})


def stop_uri(config: Config) -> str:
    """Where a worker leaves the error that ended the run."""
    return storage.join(config.run_uri, "stopped.json")


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


def _context(config: Config, places: Places, board: Any) -> WorkerContext:
    import ray.train.torch
    import torch

    ray_context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    rank, world_size = ray_context.get_world_rank(), ray_context.get_world_size()
    shard = ray.train.get_dataset_shard("train")  # A barrier: the attempt is on record afterwards.
    attempt = Attempt(**storage.read_json_lines(attempts_uri(config))[-1])
    feed, pairs = make_feed(config, places)
    held = eval_feed(config, feed, pairs.eval)
    return WorkerContext(
        rank=rank,
        world_size=world_size,
        device=device,
        attempt=attempt,
        batches=_batches(shard, rank) if attempt.position < feed.plan.total_steps else iter(()),
        eval_batches=lambda: held.rank_batches(0, rank, world_size),
        publish=board,
        total_steps=feed.plan.total_steps,
        steps_per_epoch=feed.plan.steps_per_epoch,
        sources=feed.sources,
    )


def _batches(shard: Any, rank: int) -> Iterator[GlobalBatch]:
    for table in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        (row,) = table.to_pylist()
        assert row["rank"] == rank, f"rank {rank} was given rank {row['rank']}'s part of step {row['step']}"
        yield pack.global_batch(row)
