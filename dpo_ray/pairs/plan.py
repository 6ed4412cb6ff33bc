"""The epoch plan: which pairs form which global batch, a pure function of (seed, epoch, position).

An epoch permutes the chunks, then the pairs inside each chunk, and cuts the sequence into global batches; the last one
of an epoch is short. The number of workers appears nowhere. Orders come from keyed digests and not from a random
generator, so that no version of any library changes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ray.pairs.store import Chunk


@dataclass(frozen=True, slots=True)
class Segment:
    """Pairs `start` to `stop` of a chunk, counted in the epoch's order."""

    chunk: Chunk
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive global batches of one epoch that begin in the same chunk: the unit of loading.

    Attributes:
        epoch: Counted from 0.
        first_step: The optimizer step, counted from 1, of the first batch.
        segments: Where the pairs of these batches lie, in order.
    """

    epoch: int
    first_step: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of training.

    Attributes:
        seed: Decides the order.
        chunks: All chunks of the store, in store order.
        global_batch_pairs: Pairs per optimizer step.
        total_steps: Where training ends.
    """

    seed: int
    chunks: tuple[Chunk, ...]
    global_batch_pairs: int
    total_steps: int

    @property
    def num_pairs(self) -> int:
        """Pairs of one epoch."""
        return sum(chunk.num_pairs for chunk in self.chunks)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch; the last may be short."""
        return steps_per_epoch(self.num_pairs, self.global_batch_pairs)

    def chunk_order(self, epoch: int) -> list[Chunk]:
        """The chunks in the order in which an epoch reads them."""
        return sorted(self.chunks, key=lambda chunk: _keyed(self.seed, epoch, chunk.key.encode()))

    def windows(self, position: int) -> Iterator[Window]:
        """The global batches after the first `position` ones, grouped for loading.

        Args:
            position: Global batches done.
        """
        while position < self.total_steps:
            epoch, offset = divmod(position, self.steps_per_epoch)
            stop = min(self.total_steps - position + offset, self.steps_per_epoch)
            yield from self._epoch_windows(epoch, offset, stop)
            position += stop - offset

    def _epoch_windows(self, epoch: int, first: int, stop: int) -> Iterator[Window]:
        """Windows over batches `first` to `stop` of an epoch."""
        order = self.chunk_order(epoch)
        bounds = np.concatenate([[0], np.cumsum([chunk.num_pairs for chunk in order])])
        size, batch = self.global_batch_pairs, first
        while batch < stop:
            chunk = int(np.searchsorted(bounds, batch * size, side="right")) - 1
            # The batch after the last one whose first pair lies in this chunk.
            end = min(stop, -(-int(bounds[chunk + 1]) // size))
            low, high = batch * size, min(end * size, int(bounds[-1]))
            yield Window(epoch, epoch * self.steps_per_epoch + batch + 1, tuple(_cut(order, bounds, low, high)))
            batch = end

    def chunks_in_order_of_need(self, position: int) -> list[Chunk]:
        """Each chunk once, in the order in which training from `position` first reads it."""
        seen: dict[str, Chunk] = {}
        for window in self.windows(position):
            for segment in window.segments:
                seen.setdefault(segment.chunk.name, segment.chunk)
            if len(seen) == len(self.chunks):
                break
        return list(seen.values())


def plan_of(chunks: Sequence[Chunk], seed: int, global_batch_pairs: int, epochs: int, max_steps: int | None) -> Plan:
    """The plan of a run: whole epochs, or up to `max_steps`."""
    total = epochs * steps_per_epoch(sum(chunk.num_pairs for chunk in chunks), global_batch_pairs)
    return Plan(seed, tuple(chunks), global_batch_pairs, min(total, max_steps or total))


def steps_per_epoch(num_pairs: int, global_batch_pairs: int) -> int:
    """Global batches of one epoch; the last may be short."""
    return -(-num_pairs // global_batch_pairs)


def pair_order(seed: int, epoch: int, pair_ids: Sequence[bytes]) -> list[int]:
    """The order of an epoch inside a chunk: indices into `pair_ids`."""
    keys = [_keyed(seed, epoch, pair_id) for pair_id in pair_ids]
    return sorted(range(len(keys)), key=keys.__getitem__)


def batch_digest(pair_ids: Sequence[bytes]) -> str:
    """Digest of a global batch's ordered pair ids, as the ledger has it: 32 hex digits."""
    return hashlib.sha256(b"".join(pair_ids)).hexdigest()[:32]


def _keyed(seed: int, epoch: int, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=f"{seed}:{epoch}".encode()).digest()


def _cut(order: list[Chunk], bounds: np.ndarray, low: int, high: int) -> Iterator[Segment]:
    """The segments that make up pairs `low` to `high` of an epoch."""
    index = int(np.searchsorted(bounds, low, side="right")) - 1
    while low < high:
        stop = min(high, int(bounds[index + 1]))
        yield Segment(order[index], low - int(bounds[index]), stop - int(bounds[index]))
        low, index = stop, index + 1
