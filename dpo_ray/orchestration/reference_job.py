"""`dpo-ray reference`: scores ahead of training, what there is of them, and what nobody uses any more."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.gauges import Gauges
from dpo_ray.orchestration.prepare import check_reachable, prepare, prepared, survey
from dpo_ray.orchestration.reference_filler import (
    LOOK_S,
    Filled,
    ReferenceFiller,
    chunks_in_order_of_need,
    open_reference_store,
)
from dpo_ray.orchestration.resources import ensure_resources
from dpo_ray.orchestration.stream import make_plan
from dpo_ray.orchestration.trainer import final_errors, finished_run, start_ray
from dpo_ray.orchestration.watch import Watcher, warnings_to
from dpo_ray.pairs.store import Chunk, PairStore
from dpo_ray.reference.claims import living_fillers
from dpo_ray.reference.usage import Unused, note_use, remove_unused, unused


def scored_config(config: Config) -> Config:
    """The configuration of the run whose pairs are scored: DPO's, where a start by likelihood comes first.

    Raises:
        ConfigError: The reference is that start, and it is not there yet.
    """
    if config.sft.epochs is None:
        return config
    if finished_run(config.start(), evaluated=False) is None:
        raise ConfigError(
            f"sft.epochs is {config.sft.epochs}, so that the reference is the model that {config.start().name} makes, "
            "which is not there yet: run `dpo-ray sft` first"
        )
    return config.after_start()


def fill_reference(config: Config, watcher: Watcher | None = None) -> tuple[Filled, str]:
    """Scores all pairs that have no scores yet, training or not.

    Args:
        config: The run.
        watcher: Told what happens; None for silence.

    Returns:
        What was done, and the reference store.

    Raises:
        ConfigError: The cluster has no room for a replica, or replicas are not what scores for this run.
        ReferenceFillError: Not all chunks could be scored.
    """
    if config.adapter.quantize:
        raise ConfigError(
            f"adapter.quantize is {config.adapter.quantize}, so that the reference is the policy's quantized weights, "
            "which score as the run goes: nothing can be scored ahead of it"
        )
    # Here all that is missing is scored, whatever training may do.
    config = config.model_copy(update={"reference": config.reference.model_copy(update={"place": "actors"})})
    with Gauges(config, watcher or Watcher()) as watcher, warnings_to(watcher.warning):
        check_reachable(config)
        found = survey(config, watcher)
        start_ray(config)
        with final_errors():
            pairs = prepare(config, watcher, found)
        reference = open_reference_store(config, pairs.uri)
        note_use(reference, config.run_uri, pairs.uri)
        order = _needed(config, pairs)
        filler = ReferenceFiller(config, pairs, order, reference, f"fill-{uuid.uuid4().hex[:12]}")
        if filler.missing:
            ensure_resources(config, workers=False)
        filler.start()
        total = sum(chunk.num_pairs for chunk in filler.missing)
        try:
            while filler.working():
                time.sleep(LOOK_S)
                watcher.scored(asdict(filler.filled))
                watcher.progress("scoring (pairs)", max(0, total - filler.filled.left_pairs), max(1, total))
        finally:
            filler.stop()
        filler.check()
        return filler.filled, reference.uri


def _needed(config: Config, pairs: PairStore) -> list[Chunk]:
    """What a run needs scores of, in the order of need; of a reference that moves, before it does."""
    moves_at = config.reference.sync_steps
    order = chunks_in_order_of_need(config, make_plan(config, pairs), pairs, 0, moves_at)
    return order if moves_at is not None else list(dict.fromkeys([*order, *pairs.eval]))


@dataclass(frozen=True, slots=True)
class Status:
    """How much of what a run needs has scores.

    Attributes:
        store_uri: The reference store.
        chunks: Of the run's pair store, those that it needs.
        scored_chunks: Those with scores.
        pairs: Pairs in them all.
        scored_pairs: Those with scores.
        refused_chunks: Chunks whose scores a reader could not use, which wait to be scored again.
        fillers: Who scores for this store now.
    """

    store_uri: str
    chunks: int
    scored_chunks: int
    pairs: int
    scored_pairs: int
    refused_chunks: int
    fillers: tuple[str, ...]


def reference_status(config: Config) -> Status:
    """Looks only; needs no Ray.

    Raises:
        ConfigError: The pairs are not prepared.
    """
    pairs = prepared(config)
    reference = open_reference_store(config, pairs.uri)
    chunks = _needed(config, pairs)
    missing = reference.missing(chunks)
    total, left = (sum(chunk.num_pairs for chunk in each) for each in (chunks, missing))
    refused = len(reference.refused() & {chunk.key for chunk in chunks})
    fillers = tuple(living_fillers(reference.uri))
    return Status(reference.uri, len(chunks), len(chunks) - len(missing), total, total - left, refused, fillers)


def unused_scores(config: Config) -> list[Unused]:
    """What no run under `storage_path` uses, by store."""
    folder = storage.join(config.store_uri, "reference")
    stores = [storage.join(folder, name) for name in storage.list_names(folder)]
    found = [unused(uri, alive=lambda run_uri: bool(storage.list_names(run_uri))) for uri in stores]
    return [each for each in found if each.keys or each.whole]


def remove_scores(config: Config, found: list[Unused]) -> None:
    """Removes what `unused_scores` has found, as far as nobody uses it now either."""
    now = {each.store_uri: each for each in unused_scores(config)}
    for each in found:
        if each.store_uri in now:
            remove_unused(now[each.store_uri])
