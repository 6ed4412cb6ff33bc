"""From a global batch to one part per rank, each with the same number of balanced microbatches.

Which pairs form the batch is decided before (in `plan`); here only who computes what.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpo_ray.types import GlobalBatch, Microbatch, ScoredPair, TokenizedPair

if TYPE_CHECKING:
    import torch

IDS = pa.list_(pa.binary(16))
RANK_BATCH_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("rank", pa.int32()),
        ("pair_ids", IDS),
        ("microbatch_pairs", pa.list_(pa.int32())),
        ("own_ids", IDS),
        ("lengths", pa.list_(pa.list_(pa.int32()))),
        ("tokens", pa.list_(pa.int32())),
        ("ref_logps", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True)
class Packing:
    """How much goes into a microbatch, and what it costs.

    Attributes:
        tokens_per_microbatch: Budget of one forward and backward pass.
        completion_cost: What the way through the output layer adds to a completion token, in tokens.
        attention_cost: What one token's look at another costs, in tokens.
    """

    tokens_per_microbatch: int
    completion_cost: float = 0.0
    attention_cost: float = 0.0

    def cost(self, pair: TokenizedPair) -> float:
        """The computation for a pair, in tokens."""
        prompt, *answers = map(len, pair.parts)
        seen = prompt**2 / 2 + sum(prompt * answer + answer**2 / 2 for answer in answers)
        return pair.num_tokens + self.completion_cost * sum(answers) + self.attention_cost * seen


def assign(pairs: Sequence[TokenizedPair], num_ranks: int, packing: Packing) -> list[list[list[int]]]:
    """Spreads pairs over ranks and microbatches.

    Costliest first into the lightest microbatch, with as few microbatches as keep each within the budget of tokens (a
    pair that alone exceeds it gets one of its own). Deterministic; every rank gets the same number of microbatches,
    some of them empty when there are fewer pairs than microbatches.

    Args:
        pairs: A global batch.
        num_ranks: World size.
        packing: The budget and the costs.

    Returns:
        Per rank, per microbatch, indices into `pairs` in ascending order.
    """
    budget = packing.tokens_per_microbatch
    tokens, costs = [pair.num_tokens for pair in pairs], [packing.cost(pair) for pair in pairs]
    costliest_first = sorted(range(len(pairs)), key=lambda index: (-costs[index], index))
    per_rank = max(1, -(-sum(tokens) // (num_ranks * budget)))
    while True:
        bins: list[list[int]] = [[] for _ in range(num_ranks * per_rank)]
        loads = [0.0] * len(bins)
        heap = [(0.0, place) for place in range(len(bins))]
        for index in costliest_first:
            load, lightest = heap[0]
            bins[lightest].append(index)
            loads[lightest] = load + costs[index]
            heapq.heapreplace(heap, (loads[lightest], lightest))
        if all(sum(tokens[index] for index in bin_) <= budget or len(bin_) <= 1 for bin_ in bins):
            break
        per_rank += 1
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for place, heavy in enumerate(sorted(range(len(bins)), key=lambda index: (-loads[index], index))):
        row, column = divmod(place, num_ranks)
        # Back and forth, so that the first rank does not get the heaviest of every row.
        ranks[column if row % 2 == 0 else num_ranks - 1 - column].append(sorted(bins[heavy]))
    return ranks


def microbatch(pairs: Sequence[ScoredPair]) -> Microbatch:
    """Lays pairs out one after the other; without pairs, an empty microbatch."""
    import torch  # Only here: the tasks that pack need not wait seconds for it.

    lengths = [list(map(len, scored.pair.parts)) for scored in pairs]
    parts = [part for scored in pairs for part in scored.pair.parts]
    scores = [scored.ref_logps for scored in pairs if scored.ref_logps is not None]
    return Microbatch(
        tokens=torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64),
        lengths=lengths,
        pair_index=_indices(pair for pair, (_, *answers) in enumerate(lengths) for _ in answers),
        answer_index=_indices(answer for _, *answers in lengths for answer in range(len(answers))),
        num_tokens=_indices(length for _, *answers in lengths for length in answers),
        ref_logps=torch.from_numpy(np.concatenate(scores)) if scores else None,
    )


def rank_batches(
    pairs: Sequence[ScoredPair], step: int, epoch: int, num_ranks: int, packing: Packing
) -> list[dict[str, Any]]:
    """A global batch as one row of `RANK_BATCH_SCHEMA` per rank.

    Args:
        pairs: The global batch in plan order.
        step: The optimizer step it feeds, counted from 1.
        epoch: Counted from 0.
        num_ranks: World size.
        packing: The budget and the costs.
    """
    pair_ids = [scored.pair.pair_id for scored in pairs]
    rows = []
    for rank, bins in enumerate(assign([scored.pair for scored in pairs], num_ranks, packing)):
        own = [pairs[index] for bin_ in bins for index in bin_]
        parts = [part for scored in own for part in scored.pair.parts]
        scores = [scored.ref_logps for scored in own if scored.ref_logps is not None]
        rows.append(
            {
                "step": step,
                "epoch": epoch,
                "rank": rank,
                "pair_ids": pair_ids,
                "microbatch_pairs": [len(bin_) for bin_ in bins],
                "own_ids": [scored.pair.pair_id for scored in own],
                "lengths": [list(map(len, scored.pair.parts)) for scored in own],
                "tokens": np.concatenate(parts) if parts else np.zeros(0, np.int32),
                "ref_logps": np.concatenate(scores) if len(scores) == len(own) and scores else None,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `rank_batches` as an Arrow table."""
    return pa.table({name: [row[name] for row in rows] for name in RANK_BATCH_SCHEMA.names}, schema=RANK_BATCH_SCHEMA)


def global_batch(row: dict[str, Any]) -> GlobalBatch:
    """One rank's part of a global batch, from a row of `RANK_BATCH_SCHEMA`."""
    pairs, token, score = [], 0, 0
    tokens = np.asarray(row["tokens"], dtype=np.int32)
    scores = None if row["ref_logps"] is None else np.asarray(row["ref_logps"], dtype=np.float32)
    for pair_id, lengths in zip(row["own_ids"], row["lengths"], strict=True):
        bounds = token + np.cumsum(lengths)
        prompt, *answers = np.split(tokens[token : bounds[-1]], bounds[:-1] - token)
        ref_logps = None if scores is None else scores[score : score + len(answers)]
        pairs.append(ScoredPair(TokenizedPair(pair_id, prompt, tuple(answers)), ref_logps))
        token, score = int(bounds[-1]), score + len(answers)
    ends = np.cumsum(row["microbatch_pairs"])
    groups = [pairs[end - size : end] for end, size in zip(ends, row["microbatch_pairs"], strict=True)]
    return GlobalBatch(
        step=row["step"],
        epoch=row["epoch"],
        num_pairs=len(row["pair_ids"]),
        pair_ids=list(row["pair_ids"]),
        microbatches=[microbatch(group) for group in groups],
        microbatch_pair_ids=[[scored.pair.pair_id for scored in group] for group in groups],
    )


def _indices(values: Any) -> torch.Tensor:
    import torch

    return torch.tensor(list(values), dtype=torch.int64)
