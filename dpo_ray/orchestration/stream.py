"""The stream: plan -> load and join scores -> pack -> one row per worker and step, through Ray Data.

Ray Data keeps no position, so every start of a worker group gets a pipeline that begins where the run stands.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.train

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import DataError
from dpo_ray.pairs import pack
from dpo_ray.pairs.plan import Plan, Window, steps_per_epoch
from dpo_ray.pairs.store import Chunk, PairStore, open_store
from dpo_ray.reference.store import ReferenceStore, fill_check
from dpo_ray.training import manifest
from dpo_ray.training.feed import Feed
from dpo_ray.types import Attempt

# Loading waits for storage and for scores more than it computes.
LOAD_CPUS = 0.25
LOADS_IN_FLIGHT = 4


def make_plan(config: Config, pairs: PairStore) -> Plan:
    """The order of training."""
    batch = config.train.global_batch_pairs
    num_pairs = sum(chunk.num_pairs for chunk in pairs.train)
    total = config.train.epochs * steps_per_epoch(num_pairs, batch)
    return Plan(config.seed, pairs.train, batch, min(total, config.train.max_steps or total))


@dataclass(frozen=True, slots=True)
class Places:
    """The stores of a run, found by the driver once.

    Attributes:
        pairs_uri: The pair store.
        reference_uri: The reference store; None where the objective needs none.
    """

    pairs_uri: str
    reference_uri: str | None


def make_feed(config: Config, places: Places) -> tuple[Feed, PairStore]:
    """Where batches come from.

    Raises:
        DataError: The pair store is gone.
    """
    pairs = open_store(places.pairs_uri)
    if pairs is None:
        raise DataError(f"{places.pairs_uri}: the pair store is gone; run `dpo-ray prepare`")
    reference = ReferenceStore(places.reference_uri) if places.reference_uri else None
    feed = Feed(
        make_plan(config, pairs), pairs.uri, reference, fill_check(config.run_uri), config.train.tokens_per_microbatch
    )
    return feed, pairs


def eval_feed(config: Config, feed: Feed, chunks: tuple[Chunk, ...]) -> Feed:
    """One pass over the held-out pairs, in batches of the training's size."""
    batch = config.train.global_batch_pairs
    total = steps_per_epoch(sum(chunk.num_pairs for chunk in chunks), batch)
    plan = Plan(config.seed, chunks, batch, total)
    return Feed(plan, feed.pairs_uri, feed.reference, feed.check, feed.tokens_per_microbatch)


def attempts_uri(config: Config) -> str:
    """Where the starts of worker groups are recorded."""
    return storage.join(config.run_uri, "attempts.jsonl")


def begin_attempt(config: Config, world_size: int) -> Attempt:
    """Fixes, in one record, where a new worker group starts: all ranks and the stream use exactly this."""
    uri = attempts_uri(config)
    past = storage.read_json_lines(uri)
    found = manifest.newest(config.run_uri)
    reason = "start" if not past else ("continue" if found else "start over: no checkpoint yet")
    attempt = Attempt(len(past), found[1].step if found else 0, found[0] if found else None, world_size, reason)
    storage.write_json_lines(uri, [*past, asdict(attempt)])
    return attempt


class StreamConfig(ray.train.DataConfig):
    """Ray Train's hook: called at each start of a worker group, and the only place that knows its size."""

    def __init__(self, config: Config, places: Places) -> None:
        """Args: config: The run; places: its stores."""
        super().__init__()
        self._config, self._places = config, places

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One iterator per worker over its rows, from the newest checkpoint's position on."""
        attempt = begin_attempt(self._config, world_size)
        feed, _ = make_feed(self._config, self._places)
        windows = list(feed.plan.windows(attempt.position))
        splits = stream(feed, windows, world_size).streaming_split(world_size, equal=True)
        return [dict.fromkeys(datasets, split) for split in splits]


def stream(feed: Feed, windows: list[Window], world_size: int) -> ray.data.Dataset:
    """A dataset with one row per rank and step, in order.

    `streaming_split(equal=True)` drops rows that do not divide; the rows here are whole multiples of the world size.
    """

    def load(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for window in batch["item"]:
            for rows in feed.rows(pickle.loads(window), world_size):
                yield pack.table_of(rows)

    rows = ray.data.from_items([pickle.dumps(window) for window in windows], override_num_blocks=max(1, len(windows)))
    # One row a block: a step is handed on when it is packed, and consecutive rows go to consecutive ranks.
    rows.context.target_max_block_size = 1
    rows = rows.map_batches(load, batch_size=1, num_cpus=LOAD_CPUS, compute=ray.data.TaskPoolStrategy(LOADS_IN_FLIGHT))
    rows.context.execution_options.preserve_order = True
    return rows
