"""What a pair store holds, in numbers: lengths, length bias, repeated prompts, gaps of scores, rejects by reason."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ray import storage
from dpo_ray.pairs.store import Chunk, PairStore, read_ahead, read_chunk, score_gaps
from dpo_ray.types import TokenizedPair

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
REASONS_SHOWN, REASON_CHARS = 20, 160
# A store may have gigabytes of rejects: of so many files at most, and so many bytes of all, the reasons are counted.
REJECT_FILES, REJECT_BYTES = 64, 2**24
# What differs from row to row in the reason of a reject.
_OWN = re.compile(r"(?<!\w)'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\b\d+(\.\d+)?\b")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens.

    Attributes:
        mean: Their mean.
        percentiles: At `PERCENTILES`, the smallest length that so many percent do not exceed.
        histogram: Shape (longest + 1,): how many have each length.
    """

    mean: float
    percentiles: list[int]
    histogram: list[int]


@dataclass(frozen=True, slots=True)
class ScoreGaps:
    """By how much the score of a pair's first answer is above that of its last.

    Attributes:
        pairs: How many pairs have scores.
        percentiles: At `PERCENTILES`, the smallest gap that so many percent do not exceed.
        left_out: How many pairs each of these would leave out as `data.min_score_gap`.
    """

    pairs: int
    percentiles: list[float]
    left_out: list[int]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a pair store holds.

    Attributes:
        store_uri: The store.
        counts: What became of the rows, see `store.COUNTS`.
        lengths: Of prompts, of chosen answers and of rejected ones.
        comparisons: Of a chosen answer with a rejected one.
        chosen_longer: Share of the comparisons whose chosen answer has more tokens.
        chosen_shorter: Share of them whose chosen answer has fewer.
        more_tokens: How many tokens a chosen answer has more than a rejected one, on average.
        answers: How many pairs have how many answers.
        prompts: How many prompts there are.
        score_gaps: Of the pairs whose answers have scores; None where none have.
        rejects: Reason -> rows, what differs from row to row left out; the most frequent ones.
        rejects_read: Of how many rejects these are; of fewer than `counts` has where there are many.
    """

    store_uri: str
    counts: dict[str, int]
    lengths: dict[str, Lengths]
    comparisons: int
    chosen_longer: float
    chosen_shorter: float
    more_tokens: float
    answers: dict[int, int]
    prompts: int
    score_gaps: ScoreGaps | None
    rejects: dict[str, int]
    rejects_read: int


def describe(pairs: PairStore, progress: Callable[[int, int], None] = lambda done, total: None) -> Statistics:
    """Reads all chunks of a store, a few at a time; of each prompt 8 bytes are kept, of each gap of scores 4.

    Of rejects no more than a sample is read.

    Args:
        pairs: The store; training and held-out pairs count alike.
        progress: Told how many of the chunks are read.

    Raises:
        DataError: A chunk, or what stands beside it, is missing or damaged.
    """
    lengths = {name: np.zeros(0, np.int64) for name in ("prompt", "chosen", "rejected")}
    gaps, answers = np.zeros(3), Counter[int]()  # Longer, shorter, tokens more.
    prompts, scores, chunks = list[np.ndarray](), list[np.ndarray](), (*pairs.train, *pairs.eval)

    def read(chunk: Chunk) -> tuple[list[TokenizedPair], np.ndarray]:
        its_pairs = read_chunk(pairs.uri, chunk)
        if not pairs.counts["with_scores"]:
            return its_pairs, np.zeros(0, np.float32)
        return its_pairs, score_gaps(pairs.uri, chunk, [pair.pair_id for pair in its_pairs])

    for done, (its_pairs, its_scores) in enumerate(read_ahead(read, chunks), start=1):
        found = _lengths_of(its_pairs)
        for name, each in found[0].items():
            lengths[name] = _added(lengths[name], each)
        more = found[1]
        gaps += ((more > 0).sum(), (more < 0).sum(), more.sum())
        answers.update(found[2])
        prompts.append(found[3])
        scores.append(its_scores[np.isfinite(its_scores)])
        progress(done, len(chunks))
    comparisons = int(lengths["rejected"].sum())
    reasons = _rejects(pairs.uri)
    return Statistics(
        store_uri=pairs.uri,
        counts=pairs.counts,
        lengths={name: _described(histogram) for name, histogram in lengths.items()},
        comparisons=comparisons,
        chosen_longer=float(gaps[0] / comparisons),
        chosen_shorter=float(gaps[1] / comparisons),
        more_tokens=float(gaps[2] / comparisons),
        answers=dict(sorted(answers.items())),
        prompts=len(np.unique(np.concatenate(prompts))),
        score_gaps=_score_gaps(np.sort(np.concatenate(scores))),
        rejects=dict(reasons.most_common(REASONS_SHOWN)),
        rejects_read=reasons.total(),
    )


def _lengths_of(pairs: Sequence[TokenizedPair]) -> tuple[dict[str, np.ndarray], np.ndarray, list[int], np.ndarray]:
    """Of a chunk: lengths, how much longer chosen answers are, numbers of answers, and digests of prompts."""
    sizes = [[len(answer) for answer in pair.answers] for pair in pairs]
    lengths = {
        "prompt": np.array([len(pair.prompt) for pair in pairs]),
        "chosen": np.array([size[0] for size in sizes]),
        "rejected": np.array([other for size in sizes for other in size[1:]]),
    }
    more = np.array([size[0] - other for size in sizes for other in size[1:]])
    digests = b"".join(hashlib.sha256(pair.prompt.tobytes()).digest()[:8] for pair in pairs)
    return lengths, more, list(map(len, sizes)), np.frombuffer(digests, np.uint64)


def _added(histogram: np.ndarray, values: np.ndarray) -> np.ndarray:
    counted = np.bincount(values, minlength=len(histogram))
    counted[: len(histogram)] += histogram
    return counted


def _described(histogram: np.ndarray) -> Lengths:
    total, below = int(histogram.sum()), histogram.cumsum()
    at = [int(below.searchsorted(max(1, -(-total * percent // 100)))) for percent in PERCENTILES]
    return Lengths(float(np.arange(len(histogram)) @ histogram / total), at, histogram.tolist())


def _score_gaps(gaps: np.ndarray) -> ScoreGaps | None:
    if not len(gaps):
        return None
    at = gaps[[max(1, -(-len(gaps) * percent // 100)) - 1 for percent in PERCENTILES]]
    return ScoreGaps(len(gaps), at.tolist(), gaps.searchsorted(at, side="right").tolist())


def _rejects(uri: str) -> Counter[str]:
    """Reasons of the rejects, or of a sample: the first ones of files that are evenly chosen."""
    reasons, folder = Counter[str](), storage.join(uri, "rejects")
    names = storage.list_names(folder)
    some = names[:: max(1, -(-len(names) // REJECT_FILES))]
    for name in some:
        data = storage.read_bytes(storage.join(folder, name), 0, REJECT_BYTES // len(some))
        # Where the file goes on, the last line is cut; where it ends, this is empty.
        *lines, _ = data.split(b"\n")
        reasons.update(_OWN.sub("_", json.loads(line)["reason"])[:REASON_CHARS] for line in lines)
    return reasons


def bars(histogram: Sequence[int], width: int) -> list[tuple[int, int, int]]:
    """A histogram in at most `width` bins of equal size: first length, last length, and how many, of each."""
    size = -(-len(histogram) // width)
    starts = range(0, len(histogram), size)
    return [(start, min(start + size, len(histogram)) - 1, sum(histogram[start : start + size])) for start in starts]
