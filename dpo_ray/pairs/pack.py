"""From a global batch to one part per rank, each with the same number of balanced microbatches.

Which pairs form the batch is decided before (in `plan`); here only who computes what.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpo_ray.types import GlobalBatch, Microbatch, ScoredPair, TokenizedPair

if TYPE_CHECKING:
    import torch

ID_BYTES = 16
# What all ranks of a batch are told is packed into bytes: with many ranks it makes up most of what is sent.
RANK_BATCH_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("rank", pa.int32()),
        ("num_ranks", pa.int32()),
        # Of the whole batch in plan order: ids; as int32, parts of each pair (1 + its answers), tokens of each part.
        ("pair_ids", pa.binary()),
        ("num_parts", pa.binary()),
        ("part_tokens", pa.binary()),
        # Of the rank's own pairs.
        ("tokens", pa.list_(pa.int32())),
        ("ref_logps", pa.list_(pa.float32())),
        # Null where all are 1, and all 0.
        ("weights", pa.list_(pa.float32())),
        ("margins", pa.list_(pa.float32())),
        # What making the batch has waited for scores.
        ("reference_wait_s", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Costs:
    """What computing a pair costs, in tokens.

    Attributes:
        completion: What the way through the output layer adds to a completion token.
        attention: One token's look at another.
    """

    completion: float = 0.0
    attention: float = 0.0

    def of(self, lengths: Sequence[int]) -> float:
        """The cost of a pair.

        Args:
            lengths: Tokens of the prompt, then of each answer.
        """
        prompt, *answers = lengths
        looks = prompt**2 / 2 + sum(prompt * answer + answer**2 / 2 for answer in answers)
        return sum(lengths) + self.completion * sum(answers) + self.attention * looks


def spread(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Spreads work evenly: costliest first, into the part that has least so far. Deterministic.

    Returns:
        Per part, indices into `costs` in ascending order; parts with much work first.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0.0, part) for part in range(num_parts)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, lightest = loads[0]
        parts[lightest].append(index)
        heapq.heapreplace(loads, (load + costs[index], lightest))
    return [sorted(parts[part]) for _, part in sorted(loads, key=lambda load: (-load[0], load[1]))]


def microbatches(
    lengths: Sequence[Sequence[Sequence[int]]], rank: int, tokens_per_microbatch: int, costs: Costs
) -> list[list[int]]:
    """How a rank groups its pairs.

    As few microbatches as keep each within the budget on every rank (a pair that alone exceeds it gets one of its
    own); every rank gets the same number, the costly ones first on all, and some empty where pairs are few.

    Args:
        lengths: Per rank, per pair: tokens of the prompt, then of each answer.
        rank: Whose.
        tokens_per_microbatch: The budget.
        costs: To balance by.

    Returns:
        Per microbatch, indices into the rank's pairs in ascending order.
    """

    def fits(pairs: Sequence[Sequence[int]], parts: list[list[int]]) -> bool:
        return all(len(part) <= 1 or sum(sum(pairs[i]) for i in part) <= tokens_per_microbatch for part in parts)

    of_pairs = [[costs.of(pair) for pair in pairs] for pairs in lengths]
    num = max(1, max(-(-sum(map(sum, pairs)) // tokens_per_microbatch) for pairs in lengths))
    while not all(fits(pairs, spread(each, num)) for pairs, each in zip(lengths, of_pairs, strict=True)):
        num += 1
    return spread(of_pairs[rank], num)


def token_weights(answers: Sequence[Sequence[int]], ld_alpha: float) -> np.ndarray:
    """LD-DPO's: what is longer than the shortest answer of its pair counts less.

    Args:
        answers: Per pair: tokens of each answer.
        ld_alpha: What a token counts that stands where another answer of its pair has ended.

    Returns:
        Shape (N,), float32: of each completion token of the pairs, in their order.

    Source: arXiv 2409.06411 (length-desensitized DPO).
    """
    found = []
    for lengths in answers:
        shared = min(lengths)
        for length in lengths:
            found += [np.ones(shared, np.float32), np.full(length - shared, ld_alpha, np.float32)]
    return np.concatenate(found)


def answer_sums(token_logps: np.ndarray, answers: Sequence[int], ld_alpha: float) -> np.ndarray:
    """Log-probabilities of a pair's answers from those of their tokens.

    Args:
        token_logps: Shape (N,), float32, nats: of all completion tokens of the pair.
        answers: Tokens of each answer.
        ld_alpha: See `token_weights`.

    Returns:
        Shape (answers,), float32, nats.
    """
    weighted = (token_logps * token_weights([answers], ld_alpha)).astype(np.float64)
    return np.array([part.sum() for part in np.split(weighted, np.cumsum(answers)[:-1])], np.float32)


def microbatch(pairs: Sequence[ScoredPair]) -> Microbatch:
    """Lays pairs out one after the other; without pairs, an empty microbatch."""
    import torch  # Only here: the tasks that pack need not wait seconds for it.

    lengths = [list(map(len, scored.pair.parts)) for scored in pairs]
    parts = [part for scored in pairs for part in scored.pair.parts]
    scores = [scored.ref_logps for scored in pairs if scored.ref_logps is not None]
    return Microbatch(
        tokens=torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64),
        lengths=lengths,
        num_tokens=torch.tensor([length for _, *answers in lengths for length in answers], dtype=torch.int64),
        ref_logps=torch.from_numpy(np.concatenate(scores)) if scores else None,
        weights=_where_any([scored.pair.weight for scored in pairs], 1.0),
        margins=_where_any([scored.pair.margin for scored in pairs], 0.0),
    )


def rank_batches(
    pairs: Sequence[ScoredPair], step: int, epoch: int, num_ranks: int, costs: Costs, reference_wait_s: float = 0.0
) -> list[dict[str, Any]]:
    """A global batch as one row of `RANK_BATCH_SCHEMA` per rank.

    Args:
        pairs: The global batch in plan order.
        step: The optimizer step it feeds, counted from 1.
        epoch: Counted from 0.
        num_ranks: World size.
        costs: To balance the ranks by.
        reference_wait_s: What making the batch has waited for scores.
    """
    lengths = [list(map(len, scored.pair.parts)) for scored in pairs]
    whole = {
        "step": step,
        "epoch": epoch,
        "num_ranks": num_ranks,
        "reference_wait_s": reference_wait_s,
        "pair_ids": b"".join(scored.pair.pair_id for scored in pairs),
        "num_parts": np.array(list(map(len, lengths)), np.int32).tobytes(),
        "part_tokens": np.array(list(itertools.chain(*lengths)), np.int32).tobytes(),
    }
    rows = []
    for rank, share in enumerate(spread([costs.of(each) for each in lengths], num_ranks)):
        own = [pairs[index] for index in share]
        parts = [part for scored in own for part in scored.pair.parts]
        scores = [scored.ref_logps for scored in own if scored.ref_logps is not None]
        rows.append(
            {
                **whole,
                "rank": rank,
                "tokens": np.concatenate(parts) if parts else np.zeros(0, np.int32),
                "ref_logps": np.concatenate(scores) if len(scores) == len(own) and scores else None,
                "weights": [scored.pair.weight for scored in own] if any(p.pair.weight != 1 for p in own) else None,
                "margins": [scored.pair.margin for scored in own] if any(p.pair.margin != 0 for p in own) else None,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `rank_batches` as an Arrow table."""
    return pa.table({name: [row[name] for row in rows] for name in RANK_BATCH_SCHEMA.names}, schema=RANK_BATCH_SCHEMA)


def row_of(table: pa.Table) -> dict[str, Any]:
    """The one row of a table of `RANK_BATCH_SCHEMA`; tokens and scores as arrays."""
    arrays = ("tokens", "ref_logps")
    row = {name: table[name][0].as_py() for name in table.column_names if name not in arrays}
    for name in arrays:
        values = table[name][0].values
        row[name] = None if values is None else values.to_numpy()
    return row


def global_batch(row: dict[str, Any], tokens_per_microbatch: int, costs: Costs) -> GlobalBatch:
    """One rank's part of a global batch, from a row of `RANK_BATCH_SCHEMA`, in microbatches within a budget.

    Args:
        row: The rank's.
        tokens_per_microbatch: The budget.
        costs: Those that the row was made with: who has which pairs follows from them.
    """
    ids = row["pair_ids"]
    pair_ids = [ids[start : start + ID_BYTES] for start in range(0, len(ids), ID_BYTES)]
    part_tokens = iter(np.frombuffer(row["part_tokens"], np.int32).tolist())
    lengths = [list(itertools.islice(part_tokens, num)) for num in np.frombuffer(row["num_parts"], np.int32).tolist()]
    shares = spread([costs.of(each) for each in lengths], row["num_ranks"])
    own, token, score = shares[row["rank"]], 0, 0
    tokens = np.asarray(row["tokens"], dtype=np.int32)
    assert len(tokens) == sum(sum(lengths[index]) for index in own), "the row was made with other costs"
    scores = None if row["ref_logps"] is None else np.asarray(row["ref_logps"], dtype=np.float32)
    weights, margins = (row[name] or [neutral] * len(own) for name, neutral in (("weights", 1.0), ("margins", 0.0)))
    pairs = []
    for index, weight, margin in zip(own, weights, margins, strict=True):
        bounds = token + np.cumsum(lengths[index])
        prompt, *answers = np.split(tokens[token : bounds[-1]], bounds[:-1] - token)
        ref_logps = None if scores is None else scores[score : score + len(answers)]
        pairs.append(ScoredPair(TokenizedPair(pair_ids[index], prompt, tuple(answers), weight, margin), ref_logps))
        token, score = int(bounds[-1]), score + len(answers)
    of_ranks = [[lengths[index] for index in share] for share in shares]
    grouped = microbatches(of_ranks, row["rank"], tokens_per_microbatch, costs)
    groups = [[pairs[index] for index in group] for group in grouped]
    return GlobalBatch(
        step=row["step"],
        epoch=row["epoch"],
        num_pairs=len(pair_ids),
        pair_ids=pair_ids,
        microbatches=[microbatch(group) for group in groups],
        microbatch_pair_ids=[[scored.pair.pair_id for scored in group] for group in groups],
        reference_wait_s=row["reference_wait_s"],
    )


def _where_any(values: Sequence[float], neutral: float) -> torch.Tensor | None:
    import torch

    return torch.tensor(values, dtype=torch.float32) if any(value != neutral for value in values) else None
