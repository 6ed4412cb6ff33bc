"""From a window of the plan to packed global batches: the work of a Ray Data task, here without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpo_ray.pairs import pack
from dpo_ray.pairs.plan import Plan, Window
from dpo_ray.pairs.store import Chunk, read_chunk, sources_of
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.versions import References
from dpo_ray.types import GlobalBatch, ScoredPair, TokenizedPair


@dataclass(frozen=True, slots=True)
class Feed:
    """Where batches come from.

    Attributes:
        plan: Which pairs form which batch.
        pairs_uri: The pair store.
        references: Where the scores are; None where the objective needs no reference.
        check: Called while waiting for scores; raises when they will never come.
        costs: To balance the ranks by.
        ld_alpha: See `pack.token_weights`; other than 1 where the stores have scores of tokens.
        scored_as: The step of training whose reference all batches are compared with; None: each with its own.
        chosen_only: Whether the rejected answers are left out, which the objective does not look at.
    """

    plan: Plan
    pairs_uri: str
    references: References | None
    check: Callable[[], None]
    costs: pack.Costs
    ld_alpha: float = 1.0
    scored_as: int | None = None
    chosen_only: bool = False

    def rows(self, window: Window, world_size: int) -> Iterator[list[dict[str, Any]]]:
        """Per global batch of a window, one row per rank (see `pack.RANK_BATCH_SCHEMA`).

        A batch is ready as soon as the chunks that it needs are scored, not when the window's are.
        """
        waiting: list[tuple[_Loaded, int]] = []
        size, step = self.plan.global_batch_pairs, window.first_step
        for segment in window.segments:
            loaded = self._load(segment.chunk)
            order = self.plan.pair_order(segment.take, window.epoch, loaded.ids)
            waiting += [(loaded, index) for index in order[segment.start : segment.stop]]
            while len(waiting) >= size:
                yield self._pack(waiting[:size], step, window.epoch, world_size)
                waiting, step = waiting[size:], step + 1
        if waiting:
            yield self._pack(waiting, step, window.epoch, world_size)

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

    def _load(self, chunk: Chunk) -> _Loaded:
        pairs = read_chunk(self.pairs_uri, chunk)
        if self.chosen_only:
            pairs = [replace(pair, answers=pair.answers[:1]) for pair in pairs]
        return _Loaded(chunk, pairs, [pair.pair_id for pair in pairs])

    def _pack(
        self, batch: Sequence[tuple[_Loaded, int]], step: int, epoch: int, world_size: int
    ) -> list[dict[str, Any]]:
        """A global batch, joined with its scores; waits for them."""
        waited_s = 0.0
        if self.references is not None:
            store = self.references.at(self.scored_as or step)
            for loaded in {loaded.chunk.key: loaded for loaded, _ in batch}.values():
                waited_s += loaded.join(store, self.check, self.ld_alpha)
        scored = [ScoredPair(loaded.pairs[i], loaded.scores[i] if loaded.scores else None) for loaded, i in batch]
        return pack.rank_batches(scored, step, epoch, world_size, self.costs, waited_s)


@dataclass(slots=True, eq=False)
class _Loaded:
    """A chunk's pairs, in store order, and the scores that they were joined with last."""

    chunk: Chunk
    pairs: Sequence[TokenizedPair]
    ids: list[bytes]
    scores: Sequence[np.ndarray] | None = None
    scored_by: str | None = None

    def join(self, store: ReferenceStore, check: Callable[[], None], ld_alpha: float) -> float:
        """Takes the scores of a store; returns the seconds that it waited for them."""
        if self.scored_by == store.uri:
            return 0.0
        scores, waited_s = store.wait(self.chunk, self.ids, check)
        if ld_alpha != 1.0:
            answers = [[len(answer) for answer in pair.answers] for pair in self.pairs]
            scores = [pack.answer_sums(*each, ld_alpha) for each in zip(scores, answers, strict=True)]
        self.scores, self.scored_by = scores, store.uri
        return waited_s
