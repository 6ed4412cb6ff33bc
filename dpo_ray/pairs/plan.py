"""The epoch plan: which pairs form which global batch, a pure function of (seed, epoch, position).

An epoch takes every pair once, or as often as its source's weight says. It permutes the chunks, then the pairs inside
each chunk, and cuts the sequence into global batches; the last one of an epoch is short. The number of workers appears
nowhere. Orders come from keyed digests and not from a random generator, so that no version of any library changes them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo_ray.pairs.store import Chunk


@dataclass(frozen=True, slots=True)
class Take:
    """What an epoch takes from a chunk at once: all of its pairs, where their source has no weight of its own.

    Attributes:
        chunk: The chunk.
        start: The first pair taken, counted in the order that the chunk has in all epochs.
        stop: The one after the last.
        again: How often the epoch takes from this chunk besides.
    """

    chunk: Chunk
    start: int
    stop: int
    again: int = 0

    @property
    def num_pairs(self) -> int:
        """Pairs taken."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Segment:
    """Pairs `start` to `stop` of what is taken from a chunk, counted in the epoch's order."""

    take: Take
    start: int
    stop: int

    @property
    def chunk(self) -> Chunk:
        """The chunk that they lie in."""
        return self.take.chunk


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
        weights: How often an epoch takes the pairs of each source; empty: every pair once.
    """

    seed: int
    chunks: tuple[Chunk, ...]
    global_batch_pairs: int
    total_steps: int
    weights: tuple[float, ...] = ()

    @property
    def num_pairs(self) -> int:
        """Pairs that an epoch takes."""
        return sum(map(self.pairs_of_source, range(len(self.weights) or 1)))

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch; the last may be short."""
        return -(-self.num_pairs // self.global_batch_pairs)

    def pairs_of_source(self, source: int) -> int:
        """Pairs that an epoch takes from a source: the same number in every epoch."""
        if not self.weights:
            return sum(chunk.num_pairs for chunk in self.chunks)
        there = sum(chunk.num_pairs for chunk in self.chunks if chunk.source == source)
        return max(1, round(self.weights[source] * there))

    def takes(self, epoch: int) -> list[Take]:
        """What an epoch takes from the chunks, in the order in which it reads them.

        A source with a weight w is gone through again and again in one order, and an epoch takes the next w-th part of
        that, a whole number of pairs: after E epochs each of its n pairs has been taken E round(w n) / n times, rounded
        down or up. Whole chunks rather than a
        part of each, so that the reference scores nothing that no step needs.
        """
        found = [Take(chunk, 0, chunk.num_pairs) for chunk in self.chunks]
        if self.weights:
            found = [take for source in range(len(self.weights)) for take in self._next_part(source, epoch)]
        return sorted(found, key=lambda take: _keyed(self.seed, epoch, take.chunk.key.encode(), take.again))

    def _next_part(self, source: int, epoch: int) -> Iterator[Take]:
        own = [chunk for chunk in self.chunks if chunk.source == source]
        own.sort(key=lambda chunk: _keyed(self.seed, None, chunk.key.encode()))
        bounds = np.concatenate([[0], np.cumsum([chunk.num_pairs for chunk in own])])
        share = self.pairs_of_source(source)
        position, stop, taken = epoch * share, (epoch + 1) * share, Counter[str]()
        while position < stop:
            offset = position % int(bounds[-1])
            index = int(np.searchsorted(bounds, offset, side="right")) - 1
            first = offset - int(bounds[index])
            last = min(own[index].num_pairs, first + stop - position)
            yield Take(own[index], first, last, taken[own[index].name])
            taken[own[index].name] += 1
            position += last - first

    def pair_order(self, take: Take, epoch: int, pair_ids: Sequence[bytes]) -> list[int]:
        """The order in which an epoch has the pairs that it takes from a chunk.

        Args:
            take: What is taken.
            epoch: Counted from 0.
            pair_ids: Of all pairs of the chunk, in store order.

        Returns:
            Indices into `pair_ids`.
        """
        taken = list(range(len(pair_ids)))
        if take.num_pairs < len(taken):
            taken.sort(key=[_keyed(self.seed, None, pair_id) for pair_id in pair_ids].__getitem__)
            taken = taken[take.start : take.stop]
        keys = {index: _keyed(self.seed, epoch, pair_ids[index], take.again) for index in taken}
        return sorted(taken, key=keys.__getitem__)

    def windows(self, position: int) -> Iterator[Window]:
        """The global batches after the first `position` ones, grouped for loading.

        Args:
            position: Global batches done.
        """
        per_epoch = self.steps_per_epoch
        while position < self.total_steps:
            epoch, offset = divmod(position, per_epoch)
            stop = min(self.total_steps - position + offset, per_epoch)
            yield from self._epoch_windows(epoch, offset, stop, epoch * per_epoch)
            position += stop - offset

    def _epoch_windows(self, epoch: int, first: int, stop: int, steps_before: int) -> Iterator[Window]:
        """Windows over batches `first` to `stop` of an epoch."""
        order = self.takes(epoch)
        bounds = np.concatenate([[0], np.cumsum([take.num_pairs for take in order])])
        size, batch = self.global_batch_pairs, first
        while batch < stop:
            take = int(np.searchsorted(bounds, batch * size, side="right")) - 1
            # The batch after the last one whose first pair is taken here.
            end = min(stop, -(-int(bounds[take + 1]) // size))
            low, high = batch * size, min(end * size, int(bounds[-1]))
            yield Window(epoch, steps_before + batch + 1, tuple(_cut(order, bounds, low, high)))
            batch = end

    def chunks_in_order_of_need(self, position: int) -> list[Chunk]:
        """Each chunk that training from `position` reads, once, in the order in which it does so first."""
        seen: dict[str, Chunk] = {}
        for window in self.windows(position):
            for segment in window.segments:
                seen.setdefault(segment.chunk.name, segment.chunk)
            if len(seen) == len(self.chunks):
                break
        return list(seen.values())


def source_weights(train: Sequence[str] | Mapping[str, float]) -> tuple[float, ...]:
    """The weights of a plan from `data.train`: a mixture's, in the order of its sources' names, else none."""
    return tuple(train[name] for name in sorted(train)) if isinstance(train, Mapping) else ()


def plan_of(
    chunks: Sequence[Chunk],
    seed: int,
    global_batch_pairs: int,
    epochs: int,
    max_steps: int | None,
    weights: tuple[float, ...] = (),
) -> Plan:
    """The plan of a run: whole epochs, or up to `max_steps`."""
    plan = Plan(seed, tuple(chunks), global_batch_pairs, 0, weights)
    return replace(plan, total_steps=total_steps(plan.steps_per_epoch, epochs, max_steps))


def total_steps(steps_per_epoch: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps at which a run ends: whole epochs, or `max_steps`."""
    total = epochs * steps_per_epoch
    return min(total, max_steps or total)


def batch_digest(pair_ids: Sequence[bytes]) -> str:
    """Digest of a global batch's ordered pair ids, as the ledger has it: 32 hex digits."""
    return hashlib.sha256(b"".join(pair_ids)).hexdigest()[:32]


def _keyed(seed: int, epoch: int | None, content: bytes, again: int = 0) -> bytes:
    """What decides the order of an epoch; without one, of all epochs."""
    key = f"{seed}" if epoch is None else f"{seed}:{epoch}:{again}" if again else f"{seed}:{epoch}"
    return hashlib.blake2b(content, digest_size=16, key=key.encode()).digest()


def _cut(order: list[Take], bounds: np.ndarray, low: int, high: int) -> Iterator[Segment]:
    """The segments that make up pairs `low` to `high` of an epoch."""
    index = int(np.searchsorted(bounds, low, side="right")) - 1
    while low < high:
        stop = min(high, int(bounds[index + 1]))
        yield Segment(order[index], low - int(bounds[index]), stop - int(bounds[index]))
        low, index = stop, index + 1
