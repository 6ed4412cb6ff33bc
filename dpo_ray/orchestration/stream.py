"""The stream: plan -> load and join scores -> pack -> one row per worker and step, through Ray Data.

Ray Data keeps no position, so every attempt gets a pipeline that begins where the run stands.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from dpo_ray.config import Config
from dpo_ray.orchestration.forget import ForgetBlocks
from dpo_ray.pairs import pack
from dpo_ray.pairs.plan import Plan, plan_of, source_weights
from dpo_ray.pairs.store import PairStore, not_seen, open_store
from dpo_ray.reference.store import ReferenceStore, fill_check
from dpo_ray.reference.versions import References
from dpo_ray.training.feed import Feed
from dpo_ray.types import Attempt

LOADS_IN_FLIGHT = 4
# Each input costs the driver and the stream's coordinator some 10 KiB: with many windows a task loads several.
MOST_LOADS = 256
# Ray hands smaller results over within its messages, and those that a rank was given stay in the memory of the stream's
# coordinator for good. So rows go through the object store, and only what Ray itself says about them, 2 KiB, does not.
INLINE_BYTES = 4096


def make_plan(config: Config, pairs: PairStore) -> Plan:
    """The order of training."""
    train = config.train
    about = config.seed, train.global_batch_pairs, train.epochs, train.max_steps, source_weights(config.data.train)
    return plan_of(pairs.train, *about)


@dataclass(frozen=True, slots=True)
class Places:
    """The stores of a run, and what its pairs cost; found by the driver once.

    Attributes:
        pairs_uri: The pair store.
        reference_uri: The reference store; None where the objective needs none.
        costs: To balance work by.
        fill_error: Where the driver's filler says that no more scores will come.
    """

    pairs_uri: str
    reference_uri: str | None
    costs: pack.Costs
    fill_error: str


def make_feed(config: Config, places: Places, attempt: Attempt) -> tuple[Feed, PairStore]:
    """Where batches come from.

    Raises:
        StorageError: Nothing of the pair store is to be seen from here.
    """
    pairs = open_store(places.pairs_uri)
    if pairs is None:
        raise not_seen(places.pairs_uri)
    references = None
    if places.reference_uri:
        start = ReferenceStore(places.reference_uri, filled_beside=config.reference.place != "adapter_off")
        references = References(start, config.run_uri, config.reference.sync_steps, attempt, config.model.attention)
    about = references, fill_check(places.fill_error), places.costs, config.objective.ld_alpha
    return Feed(make_plan(config, pairs), pairs.uri, *about, chosen_only=config.objective.chosen_only), pairs


def eval_feeds(config: Config, feed: Feed, pairs: PairStore) -> dict[str, Feed]:
    """One pass over each held-out set, by its name, in batches of the training's size."""
    feeds = {}
    for number, name in enumerate(config.data.eval_sets):
        chunks = [chunk for chunk in pairs.eval if chunk.source == number]
        plan = plan_of(chunks, config.seed, config.train.global_batch_pairs, epochs=1, max_steps=None)
        feeds[name] = replace(feed, plan=plan, chosen_only=False)
    return feeds


def open_streams(config: Config, places: Places, attempt: Attempt) -> list[ray.data.DataIterator]:
    """One iterator per worker over its rows, from the attempt's position on; none when no step is left.

    Not through Ray Train's `datasets`: their processes would start one after the other with the workers', not beside.
    """
    feed, _ = make_feed(config, places, attempt)
    if attempt.position >= feed.plan.total_steps:
        return []
    rows = stream(feed, attempt.position, attempt.world_size)
    rows.set_name(f"{config.name}-attempt-{attempt.attempt}")
    return rows.streaming_split(attempt.world_size, equal=True)


def close_streams(streams: Sequence[ray.data.DataIterator]) -> None:
    """Ends the actor behind the iterators, and with it the tasks that load for them."""
    for actor in {each._coord_actor for each in streams[:1]}:
        with contextlib.suppress(RayError):
            ray.kill(actor)


def stream(feed: Feed, position: int, world_size: int) -> ray.data.Dataset:
    """A dataset with one row per rank and step, in order, of all steps after the first `position` ones.

    `streaming_split(equal=True)` drops rows that do not divide; the rows here are whole multiples of the world size.
    """
    windows = list(feed.plan.windows(position))
    at_once = -(-len(windows) // MOST_LOADS)
    loads = [pickle.dumps(windows[start : start + at_once]) for start in range(0, len(windows), at_once)]
    # What a window needs is in it; the whole plan would travel to every task.
    feed = replace(feed, plan=replace(feed.plan, chunks=()))

    def load(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for window in pickle.loads(batch["item"][0]):
            for rows in feed.rows(window, world_size):
                yield pack.table_of(rows)

    rows = ray.data.from_items(loads, override_num_blocks=len(loads))
    # One row a block: a step is handed on when it is packed, and consecutive rows go to consecutive ranks.
    rows.context.target_max_block_size = 1
    rows = rows.map_batches(
        load,
        batch_size=1,
        # A load that waits for scores must not hold the CPU that the reference needs to make them.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(LOADS_IN_FLIGHT),
        runtime_env={"env_vars": {"RAY_max_direct_call_object_size": str(INLINE_BYTES)}},
    )
    rows.context.execution_options.preserve_order = True
    rows.context.custom_execution_callback_classes.append(ForgetBlocks)
    return rows
