"""Pairs that say nearly the same as another one: MinHash LSH over the shingles of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_ray.errors import ConfigError
from dpo_ray.pairs.store import Chunk, PairStore, read_ahead, read_chunk, sources_of
from dpo_ray.types import TokenizedPair

if TYPE_CHECKING:
    from datasketch import MinHash

THRESHOLD = 0.8
SHINGLE_TOKENS = 5
# Of 16 bands of 8 hashes, 95 % of the pairs at the threshold share one, and 6 % of those at 0.5: these are sorted out
# by all 128 hashes.
BANDS, BAND_HASHES = 16, 8
SEED = 1
# A shingle that so many pairs have is the chat template's, or a system prompt's: short pairs would all look alike. They
# are looked for in some chunks.
COMMON_SHARE, COMMON_CHUNKS = 0.9, 8
EXAMPLES_SHOWN = 5
_POWERS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, SHINGLE_TOKENS + 1)], np.uint64)


@dataclass(frozen=True, slots=True)
class Match:
    """Two pairs that are nearly the same.

    Attributes:
        place: File and row of the one.
        other: Of the other, a training pair.
        similarity: Estimated Jaccard similarity of their shingles.
    """

    place: str
    other: str
    similarity: float


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """The near-duplicates of a pair store.

    Attributes:
        train: How many training pairs are near-duplicates of another one.
        eval: How many held-out pairs are near-duplicates of a training pair.
        train_examples: Some of the former.
        eval_examples: Some of the latter.
    """

    train: int
    eval: int
    train_examples: list[Match]
    eval_examples: list[Match]


def near_duplicates(
    pairs: PairStore, progress: Callable[[int, int], None] = lambda done, total: None
) -> NearDuplicates:
    """Compares all pairs of a store with its training pairs by their prompts and chosen answers.

    Args:
        pairs: The store; its chunks are read a few at a time.
        progress: Told how many of the chunks are compared.

    Raises:
        ConfigError: The extra `data` is not installed.
        DataError: A chunk is missing or damaged.
    """
    index = _Index(sum(chunk.num_pairs for chunk in pairs.train))
    common, chunks = _common(pairs), (*pairs.train, *pairs.eval)
    places, near, held_out = list[tuple[Chunk, bytes]](), set[int](), 0
    examples: dict[str, list[tuple[tuple[Chunk, bytes], int, float]]] = {"train": [], "eval": []}
    for done, its_pairs in enumerate(read_ahead(lambda chunk: read_chunk(pairs.uri, chunk), chunks)):
        split = "train" if done < len(pairs.train) else "eval"
        shingles = [np.setdiff1d(_shingles(pair), common, assume_unique=True) for pair in its_pairs]
        for pair, sketch in zip(its_pairs, index.sketches(shingles), strict=True):
            place = chunks[done], pair.pair_id
            others, similarities = index.like(sketch)
            if len(others) and len(examples[split]) < EXAMPLES_SHOWN:
                best = int(similarities.argmax())
                examples[split].append((place, int(others[best]), float(similarities[best])))
            if split == "eval":
                held_out += len(others) > 0
                continue
            if len(others):
                near.update(others.tolist(), [len(places)])
            # Whatever is like this one is like its equal, which is there already.
            if not (similarities == 1).any():
                index.insert(len(places), sketch)
            places.append(place)
        progress(done + 1, len(chunks))
    shown = {
        split: [Match(_source(pairs, place), _source(pairs, places[other]), alike) for place, other, alike in found]
        for split, found in examples.items()
    }
    return NearDuplicates(len(near), held_out, shown["train"], shown["eval"])


class _Index:
    """Training pairs by their sketches."""

    def __init__(self, num_pairs: int) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ConfigError(
                f"--near-duplicates: {error}: pip install 'dpo_ray[data]', or leave --near-duplicates out"
            ) from None
        self._minhash = MinHash
        self._bands = MinHashLSH(num_perm=BANDS * BAND_HASHES, params=(BANDS, BAND_HASHES))
        self._hashes = np.zeros((num_pairs, BANDS * BAND_HASHES), np.uint32)

    def sketches(self, shingles: Sequence[np.ndarray]) -> Sequence[MinHash]:
        """One for each set of shingles."""
        sets = (each.tolist() for each in shingles)
        return self._minhash.bulk(sets, num_perm=BANDS * BAND_HASHES, seed=SEED, hashfunc=int)

    def like(self, sketch: MinHash) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the pairs that are no less similar than the threshold, in order, and how similar they are."""
        numbers = np.array(sorted(self._bands.query(sketch)), np.int64)
        similarities = (self._hashes[numbers] == sketch.hashvalues).mean(axis=1)
        return numbers[similarities >= THRESHOLD], similarities[similarities >= THRESHOLD]

    def insert(self, number: int, sketch: MinHash) -> None:
        """Adds a pair."""
        self._hashes[number] = sketch.hashvalues
        self._bands.insert(number, sketch)


def _shingles(pair: TokenizedPair) -> np.ndarray:
    """Shape (different shingles,), uint32, sorted: digests of them."""
    tokens = np.concatenate([pair.prompt, pair.answers[0]]).astype(np.uint64)
    size = min(SHINGLE_TOKENS, len(tokens))
    # Of such a sum the upper bits depend on all of its terms' bits, the lower do not.
    digests = np.lib.stride_tricks.sliding_window_view(tokens, size) @ _POWERS[:size]
    return np.unique((digests >> np.uint64(32)).astype(np.uint32))


def _common(pairs: PairStore) -> np.ndarray:
    """Shingles that nearly all pairs have."""
    sample = pairs.train[:: -(-len(pairs.train) // COMMON_CHUNKS)]
    shingles = [_shingles(pair) for chunk in sample for pair in read_chunk(pairs.uri, chunk)]
    found, counts = np.unique(np.concatenate(shingles), return_counts=True)
    return found[counts > COMMON_SHARE * len(shingles)]


def _source(pairs: PairStore, place: tuple[Chunk, bytes]) -> str:
    chunk, pair_id = place
    return sources_of(pairs.uri, chunk)[pair_id]
