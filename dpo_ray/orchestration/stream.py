"""The stream: plan -> load and join scores -> pack -> one row per worker and step, through Ray Data.

Ray Data keeps no position, so every attempt gets a pipeline that begins where the run stands.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.train

from dpo_ray.config import Config
from dpo_ray.errors import DataError
from dpo_ray.pairs import pack
from dpo_ray.pairs.plan import Plan, Window, plan_of
from dpo_ray.pairs.store import Chunk, PairStore, open_store
from dpo_ray.reference.store import ReferenceStore, fill_check
from dpo_ray.training.feed import Feed
from dpo_ray.types import Attempt

# Loading waits for storage and for scores more than it computes.
LOAD_CPUS = 0.25
LOADS_IN_FLIGHT = 4


def make_plan(config: Config, pairs: PairStore) -> Plan:
    """The order of training."""
    train = config.train
    return plan_of(pairs.train, config.seed, train.global_batch_pairs, train.epochs, train.max_steps)


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
    plan = plan_of(chunks, config.seed, config.train.global_batch_pairs, epochs=1, max_steps=None)
    return Feed(plan, feed.pairs_uri, feed.reference, feed.check, feed.tokens_per_microbatch)


class StreamConfig(ray.train.DataConfig):
    """Ray Train's hook: called when the worker group starts, in Ray Train's controller."""

    def __init__(self, config: Config, places: Places, attempt: Attempt) -> None:
        """Args: config: The run; places: its stores; attempt: where to begin."""
        super().__init__()
        self._config, self._places, self._attempt = config, places, attempt

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One iterator per worker over its rows, from the attempt's position on."""
        feed, _ = make_feed(self._config, self._places)
        windows = list(feed.plan.windows(self._attempt.position))
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
