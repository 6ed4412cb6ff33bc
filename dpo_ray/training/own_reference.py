"""The policy without its adapter as the reference (`reference.place: adapter_off`): it scores what is next, in time.

All ranks score a chunk together before the first step that needs it, into the same store that a reference beside
training fills: what is there is never scored again, by whomever it was scored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import PreTrainedModel

from dpo_ray.config import Config
from dpo_ray.errors import ReferenceMismatchError
from dpo_ray.model.adapter import adapter_off
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.store import Chunk, read_chunk, read_pair_ids
from dpo_ray.reference.scorer import score_pairs
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.training.budget import Budget
from dpo_ray.training.checkpoint import patient_group
from dpo_ray.types import WAITING, GlobalBatch, WorkerContext

log = logging.getLogger(__name__)
T = TypeVar("T")

# Beyond what a step needs: a task of the stream that waits for scores looks for them every few seconds only.
STEPS_AHEAD, CHUNKS_AHEAD = 1, 1


def with_own_reference(
    config: Config, context: WorkerContext, model: PreTrainedModel, tokens_per_microbatch: int, budget: Budget
) -> WorkerContext:
    """A context whose batches are asked for only when the policy without its adapter has scored their pairs.

    Where it is not the reference, or all is scored already, the context as it is.

    Args:
        config: The run.
        context: Of this rank.
        model: The sharded policy.
        tokens_per_microbatch: Of training: a pass without gradients needs no more memory.
        budget: Learns of it when even that is too much.

    Collective: all ranks.
    """
    train, held = context.feeds
    if config.reference.place != "adapter_off":
        return context
    chunks = train.plan.chunks_in_order_of_need(context.attempt.position)
    if config.train.eval_every_steps and config.train.eval_place == "workers":
        chunks += [chunk for feed in held.values() for chunk in feed.plan.chunks]
    tokens = min(config.reference.tokens_per_microbatch, tokens_per_microbatch)
    about = train.references.start, train.pairs_uri, model, tokens, config.needs_token_scores
    own = OwnReference(*about, context.control.doing, budget.watched)
    if not own.begin(chunks):
        return context

    def batches(tokens: int) -> Iterator[GlobalBatch]:
        needs, stream = Needs(train.plan, context.attempt.position), None
        for step in range(context.attempt.position + 1, context.total_steps + 1):
            waited_s = own.score(needs.of(step))
            # Not before: it waits for the scores of its first batches at once.
            stream = stream or context.batches(tokens)
            batch = next(stream)
            yield replace(batch, reference_wait_s=batch.reference_wait_s + waited_s)
        yield from stream or ()

    def eval_batches(name: str, step: int, tokens: int) -> Iterator[GlobalBatch]:
        own.score(held[name].plan.chunks)
        yield from context.eval_batches(name, step, tokens)

    return replace(context, batches=batches, eval_batches=eval_batches)


class Needs:
    """Which chunks the steps of a plan come to, in order."""

    def __init__(self, plan: Plan, position: int) -> None:
        """Begins after the first `position` steps."""
        self._coming = _first_steps(plan, position)
        self._next = next(self._coming, None)

    def of(self, step: int) -> list[Chunk]:
        """What must have scores when the batch of `step` is asked for, but for what an earlier call has named."""
        found = list[Chunk]()
        while self._next is not None and self._next[0] <= step + STEPS_AHEAD:
            found.append(self._next[1])
            self._next = next(self._coming, None)
        for _ in range(CHUNKS_AHEAD if found else 0):
            if self._next is not None:
                found.append(self._next[1])
                self._next = next(self._coming, None)
        return found


def _first_steps(plan: Plan, position: int) -> Iterator[tuple[int, Chunk]]:
    """Chunks as the stream loads them, each with the first step of its window that needs it."""
    for window in plan.windows(position):
        before = 0
        for segment in window.segments:
            yield window.first_step + before // plan.global_batch_pairs, segment.chunk
            before += segment.stop - segment.start


class OwnReference:
    """Scores chunks with the policy without its adapter; rank 0 reads and writes the store."""

    def __init__(
        self,
        reference: ReferenceStore,
        pairs_uri: str,
        model: PreTrainedModel,
        tokens_per_microbatch: int,
        per_token: bool,
        doing: Callable[[str], None],
        watched: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Makes a process group for what ranks tell one another.

        Args:
            reference: Where scores go.
            pairs_uri: The pair store.
            model: The sharded policy.
            tokens_per_microbatch: Tokens of one forward pass.
            per_token: See `score_pairs`.
            doing: Told of each chunk, and of each pass over a part of it.
            watched: Around each chunk: turns running out of memory into what the next attempt understands.

        Collective: all ranks.
        """
        self._reference, self._pairs_uri, self._model = reference, pairs_uri, model
        self._doing, self._watched = doing, watched
        self._tokens_per_microbatch, self._per_token = tokens_per_microbatch, per_token
        self._group = patient_group()
        self._settled = set[str]()

    def begin(self, chunks: Sequence[Chunk]) -> bool:
        """Whether some of a run's chunks have no scores.

        Where a reader has refused some, all that are there are read, and what is damaged is scored again at once: the
        stream would come upon one after the other, and each would end an attempt.

        Collective: all ranks.
        """
        missing, damaged = self._from_rank_0(
            lambda: (bool(self._reference.missing(chunks)), self._reference.damaged(chunks))
        )
        if damaged:
            there = self._from_rank_0(self._reference.scored)
            self.score([chunk for chunk in chunks if chunk.key in there])
            missing = self._from_rank_0(lambda: bool(self._reference.missing(chunks)))
        return missing

    def score(self, chunks: Sequence[Chunk]) -> float:
        """Makes sure that chunks have scores; each is looked at once.

        Returns:
            The seconds that it took.

        Collective: all ranks.
        """
        began = time.monotonic()
        new = [chunk for chunk in dict.fromkeys(chunks) if chunk.key not in self._settled]
        if not new:
            return 0.0
        without = self._from_rank_0(lambda: [chunk for chunk in new if not self._usable(chunk)])
        for chunk in without:
            moved = partial(self._doing, f"scoring {chunk.name}")
            moved()
            pairs = read_chunk(self._pairs_uri, chunk)
            with self._watched(), adapter_off(self._model):
                about = self._tokens_per_microbatch, self._group, moved, self._per_token
                scores = score_pairs(self._model, pairs, *about)
            if dist.get_rank() == 0:
                self._reference.put(chunk, [pair.pair_id for pair in pairs], scores)
        self._settled |= {chunk.key for chunk in new}
        self._doing(WAITING)
        return time.monotonic() - began

    def _usable(self, chunk: Chunk) -> bool:
        try:
            self._reference.get(chunk, read_pair_ids(self._pairs_uri, chunk))
        except FileNotFoundError:
            return False
        except ReferenceMismatchError as error:
            log.warning("%s: it is scored again", error)
            return False
        return True

    def _from_rank_0(self, work: Callable[[], T]) -> T:
        answer: list[Any] = [work() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        found: T = answer[0]
        return found
