"""The policy against the reference on held-out pairs, from the scores of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo_ray.config import Config
from dpo_ray.evaluation.statistics import (
    Calibration,
    Estimate,
    calibration,
    groups_of,
    mean_estimate,
    quartiles,
    share_estimate,
)
from dpo_ray.objective.losses import AnswerStats
from dpo_ray.objective.rewards import implicit_rewards
from dpo_ray.pairs.pack import answer_sums
from dpo_ray.pairs.store import Chunk, PairStore, read_ahead, read_chunk, score_gaps
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.training.step import objective_of
from dpo_ray.types import TokenizedPair

ACCURACY, MARGIN, LOSS = "rewards/accuracies", "rewards/margins", "loss"
# What is shown of each group.
GROUP_METRICS = (ACCURACY, MARGIN, LOSS)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What the held-out pairs say.

    Attributes:
        pairs: How many there are.
        metrics: Means over pairs, under the names of `metrics.jsonl`; `logps/chosen_change` and the like are the
            policy's less the reference's. Of a pair with several rejected answers their mean counts.
        groups: The same of some pairs: by what they are grouped, and the group.
        calibration: Of the implicit preference probability.
    """

    pairs: int
    metrics: dict[str, Estimate]
    groups: dict[str, dict[str, dict[str, Estimate]]]
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class _Values:
    """Of each pair of a chunk, Shape (P,) each: its id, metrics by name, and what pairs are grouped by."""

    pair_ids: list[bytes]
    metrics: dict[str, np.ndarray]
    chosen_tokens: np.ndarray
    more_tokens: np.ndarray
    held_out_set: np.ndarray
    score_gap: np.ndarray


def evaluate_pairs(
    config: Config,
    pairs: PairStore,
    policy: ReferenceStore,
    reference: ReferenceStore,
    progress: Callable[[int, int], None] = lambda done, total: None,
    columns: Mapping[str, Mapping[bytes, str | float | None]] | None = None,
) -> HeldOut:
    """Compares the scores of two models on the held-out pairs.

    Args:
        config: The run: its objective, and `seed` for the resampling.
        pairs: The pair store.
        policy: The policy's scores, of every held-out chunk.
        reference: The reference's.
        progress: Told how many of the chunks are read.
        columns: By which pairs are grouped too: of each the value of every held-out pair, by its id.

    Raises:
        ValueError: A column has too many values.
        FileNotFoundError: Some have no scores.
        ReferenceMismatchError: Scores are damaged, or of other pairs.
    """
    loss = _loss(config)

    def read(chunk: Chunk) -> _Values:
        its_pairs = read_chunk(pairs.uri, chunk)
        ids = [pair.pair_id for pair in its_pairs]
        scored = [_sums(config, its_pairs, store.get(chunk, ids)) for store in (policy, reference)]
        gaps = score_gaps(pairs.uri, chunk, ids) if pairs.counts["with_scores"] else np.full(len(ids), np.nan)
        return _values(config, its_pairs, scored, loss, chunk.source, gaps)

    found = list[_Values]()
    for done, each in enumerate(read_ahead(read, pairs.eval), start=1):
        found.append(each)
        progress(done, len(pairs.eval))
    metrics = {name: np.concatenate([each.metrics[name] for each in found]) for name in found[0].metrics}
    groups = {
        "tokens of the chosen answer": quartiles(np.concatenate([each.chosen_tokens for each in found])),
        "tokens that the chosen answer has more": quartiles(np.concatenate([each.more_tokens for each in found])),
    }
    numbers = np.concatenate([each.held_out_set for each in found])
    if config.data.eval_sets != ("",):
        groups["set"] = {name: np.flatnonzero(numbers == at) for at, name in enumerate(config.data.eval_sets)}
    gaps = np.concatenate([each.score_gap for each in found])
    if np.isfinite(gaps).all():
        groups["gap of scores"] = quartiles(gaps, unit="")
    ids = [pair_id for each in found for pair_id in each.pair_ids]
    for column, value_of in (columns or {}).items():
        groups[f"column {column}"] = groups_of([value_of[pair_id] for pair_id in ids])
    return HeldOut(
        pairs=len(numbers),
        metrics=_estimates(metrics, config.seed),
        groups={
            by: {
                name: _estimates(
                    {each: metrics[each][places] for each in GROUP_METRICS if each in metrics}, config.seed
                )
                for name, places in each_group.items()
                if len(places)
            }
            for by, each_group in groups.items()
        },
        calibration=calibration(metrics[MARGIN]),
    )


def warnings_of(held_out: HeldOut) -> list[str]:
    """What its owner should know."""
    change = held_out.metrics["logps/chosen_change"]
    if change.high >= 0:
        return []
    return [
        f"the policy finds chosen answers less likely than the reference does, by {-change.value:.3g} nats each "
        f"({-change.high:.3g} to {-change.low:.3g}): margins may grow while answers get worse; look at sampled "
        "answers, and at a lower learning rate, fewer epochs, or objective.loss: {sigmoid: 1.0, sft: 1.0}"
    ]


def _loss(config: Config) -> Callable[[AnswerStats], torch.Tensor] | None:
    """The run's loss; None for one that needs more than the scores of a pair."""
    objective = objective_of(config.objective)
    if objective.couples_pairs or config.objective.weighting or "bco_pair" in config.objective.shares:
        return None
    return objective.loss


def _sums(config: Config, pairs: Sequence[TokenizedPair], scores: Sequence[np.ndarray]) -> torch.Tensor:
    """Log-probabilities of all answers, Shape (A,), float64."""
    if config.needs_token_scores:
        sizes = [[len(answer) for answer in pair.answers] for pair in pairs]
        scores = [
            answer_sums(each, answers, config.objective.ld_alpha) for each, answers in zip(scores, sizes, strict=True)
        ]
    return torch.from_numpy(np.concatenate(scores).astype(np.float64))


def _values(
    config: Config,
    pairs: Sequence[TokenizedPair],
    scored: Sequence[torch.Tensor],
    loss: Callable[[AnswerStats], torch.Tensor] | None,
    held_out_set: int,
    gaps: np.ndarray,
) -> _Values:
    policy, reference = scored
    sizes = [[len(answer) for answer in pair.answers] for pair in pairs]
    stats = AnswerStats(
        policy_logps=policy,
        ref_logps=reference,
        num_tokens=torch.tensor([size for each in sizes for size in each]),
        num_answers=[len(each) for each in sizes],
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float64),
    )

    def means(values: torch.Tensor) -> list[torch.Tensor]:
        return [stats.by_pair(each) for each in stats.pairwise(values)]

    rewards = implicit_rewards(stats, config.objective.beta)
    chosen, rejected = stats.pairwise(rewards)
    found = {
        ACCURACY: stats.by_pair((chosen > rejected).double()),
        MARGIN: stats.by_pair(chosen - rejected),
        **dict(zip(("rewards/chosen", "rewards/rejected"), means(rewards), strict=True)),
        **dict(zip(("logps/chosen", "logps/rejected"), means(policy), strict=True)),
        **dict(zip(("logps/chosen_change", "logps/rejected_change"), means(policy - reference), strict=True)),
    }
    if loss is not None:
        found[LOSS] = loss(stats) * torch.tensor([pair.weight for pair in pairs], dtype=torch.float64)
    more = [len(pair.answers[0]) - max(map(len, pair.answers[1:])) for pair in pairs]
    return _Values(
        [pair.pair_id for pair in pairs],
        {name: values.numpy() for name, values in found.items()},
        np.array([len(pair.answers[0]) for pair in pairs]),
        np.array(more),
        np.full(len(pairs), held_out_set),
        gaps,
    )


def _estimates(metrics: dict[str, np.ndarray], seed: int) -> dict[str, Estimate]:
    return {
        name: share_estimate(values) if name == ACCURACY else mean_estimate(values, seed)
        for name, values in metrics.items()
    }
