"""From a window of the plan to packed global batches: the work of a Ray Data task, here without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.pairs import pack
from dpo_ray.pairs.plan import Plan, Window, pair_order
from dpo_ray.pairs.store import Chunk, read_chunk, sources_of
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.types import GlobalBatch, ScoredPair

# Batches that a rank fetches before it is handed one.
PREFETCHED = 2


@dataclass(frozen=True, slots=True)
class Feed:
    """Where batches come from.

    Attributes:
        plan: Which pairs form which batch.
        pairs_uri: The pair store.
        reference: The reference store; None where the objective needs no reference.
        check: Called while waiting for scores; raises when they will never come.
        costs: To balance the ranks by.
    """

    plan: Plan
    pairs_uri: str
    reference: ReferenceStore | None
    check: Callable[[], None]
    costs: pack.Costs

    def rows(self, window: Window, world_size: int) -> Iterator[list[dict[str, Any]]]:
        """Per global batch of a window, one row per rank (see `pack.RANK_BATCH_SCHEMA`).

        A batch is ready as soon as the chunks that it needs are scored, not when the window's are.
        """
        waiting: list[ScoredPair] = []
        size, step, waited_s = self.plan.global_batch_pairs, window.first_step, 0.0
        for segment in window.segments:
            pairs, chunk_waited_s = self._load(segment.chunk, window.epoch)
            waiting, waited_s = waiting + pairs[segment.start : segment.stop], waited_s + chunk_waited_s
            while len(waiting) >= size:
                yield pack.rank_batches(waiting[:size], step, window.epoch, world_size, self.costs, waited_s)
                waiting, step, waited_s = waiting[size:], step + 1, 0.0
        if waiting:
            yield pack.rank_batches(waiting, step, window.epoch, world_size, self.costs, waited_s)

    def rank_batches(
        self, position: int, rank: int, world_size: int, tokens_per_microbatch: int
    ) -> Iterator[GlobalBatch]:
        """One rank's part of every global batch from a position on, without Ray."""
        for window in self.plan.windows(position):
            for rows in self.rows(window, world_size):
                yield pack.global_batch(rows[rank], tokens_per_microbatch, self.costs)

    def sources(self, step: int) -> dict[bytes, str]:
        """Where the pairs of a global batch, and of its neighbours, come from: file and row, by id."""
        (window, *_) = self.plan.windows(step - 1)
        found: dict[bytes, str] = {}
        for segment in window.segments:
            found |= sources_of(self.pairs_uri, segment.chunk)
        return found

    def _load(self, chunk: Chunk, epoch: int) -> tuple[list[ScoredPair], float]:
        """A chunk's pairs in the epoch's order, joined with their scores, and the seconds that it waited for those."""
        pairs = read_chunk(self.pairs_uri, chunk)
        ids, waited_s = [pair.pair_id for pair in pairs], 0.0
        scores: Sequence[np.ndarray | None] = [None] * len(pairs)
        if self.reference is not None:
            scores, waited_s = self.reference.wait(chunk, ids, self.check)
        order = pair_order(self.plan.seed, epoch, ids)
        return [ScoredPair(pairs[index], scores[index]) for index in order], waited_s
