"""Implicit rewards, and metrics as sums that ranks and microbatches add up."""

from __future__ import annotations

import torch

from dpo_ray.objective.losses import AnswerStats

# The means, each by the count that its sum is divided by.
_COUNTS = {
    "loss": "num_pairs",
    "logps/chosen": "num_pairs",
    "logps/rejected": "num_compared_pairs",
    "rewards/chosen": "num_rewarded_pairs",
    "rewards/rejected": "num_rewarded_pairs",
    "rewards/margins": "num_rewarded_pairs",
    "rewards/accuracies": "num_rewarded_pairs",
    "logits/chosen": "num_chosen_tokens",
    "logits/rejected": "num_rejected_tokens",
    "entropy": "num_completion_tokens",
}

METRIC_SUMS: tuple[str, ...] = (*_COUNTS, *dict.fromkeys(_COUNTS.values()))


def implicit_rewards(stats: AnswerStats, beta: float) -> torch.Tensor:
    """The reward that the policy is optimal for, up to a term of the prompt: beta (log pi - log pi_ref).

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference.

    Returns:
        Shape (A,), the dtype of the log-probabilities.

    Raises:
        ValueError: There are no reference scores.

    Source: arXiv 2305.18290 eq. 5, without beta log Z(x).
    """
    return beta * stats.log_ratios()


@torch.no_grad()
def metric_sums(stats: AnswerStats, losses: torch.Tensor, beta: float) -> torch.Tensor:
    """The sums behind the metrics, on the device of the answers; nothing here waits for it where each pair has two.

    Add them over microbatches and ranks, then call `finish_metrics`. What the answers do not say (scores of a
    reference, the policy's entropy and logits, rejected answers) has sum and count 0. Where a pair has several rejected
    answers, their mean counts, and for `rewards/accuracies` the mean over its comparisons.

    Args:
        stats: The answers.
        losses: Shape (P,).
        beta: Strength of the pull towards the reference.

    Returns:
        Shape (M,), float64: the sums named in `METRIC_SUMS`.
    """
    chosen, rejected = stats.pairwise(stats.policy_logps.double())
    sums = {"loss": losses.double().sum(), "num_pairs": _count(len(losses), losses)}
    sums["logps/chosen"] = stats.by_pair(chosen).sum()
    if not stats.of_chosen:
        sums |= {"logps/rejected": stats.by_pair(rejected).sum(), "num_compared_pairs": sums["num_pairs"]}
    if stats.ref_logps is not None:
        chosen, rejected = stats.pairwise(implicit_rewards(stats, beta).double())
        sums |= {"rewards/chosen": stats.by_pair(chosen).sum(), "rewards/rejected": stats.by_pair(rejected).sum()}
        sums["rewards/margins"] = sums["rewards/chosen"] - sums["rewards/rejected"]
        sums["rewards/accuracies"] = stats.by_pair((chosen > rejected).double()).sum()
        sums["num_rewarded_pairs"] = sums["num_pairs"]
    if stats.entropy is not None and stats.mean_logits is not None:
        (num_chosen, num_rejected), (chosen, rejected) = (
            _apart(stats, stats.num_tokens),
            _apart(stats, stats.mean_logits),
        )
        sums |= {"num_chosen_tokens": num_chosen, "num_rejected_tokens": num_rejected}
        sums |= {"num_completion_tokens": num_chosen + num_rejected, "entropy": stats.entropy.double().sum()}
        sums |= {"logits/chosen": chosen, "logits/rejected": rejected}
    nothing = _count(0, losses)
    return torch.stack([sums.get(name, nothing) for name in METRIC_SUMS])


def _count(number: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((), number, dtype=torch.float64, device=like.device)


def _apart(stats: AnswerStats, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over all chosen and over all rejected answers."""
    values = values.double()
    chosen, rejected = stats.pairwise(values)
    return stats.by_pair(chosen).sum(), rejected.sum()


def finish_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Means over all pairs that were summed, under TRL's names.

    `rewards/*` are there only for answers with reference scores. `rewards/accuracies` counts a tie as wrong, so that
    it is 0 while the policy is the reference. `logps/*` are sums over an answer's tokens; `logits/*` (over the
    vocabulary) and `entropy` are means over completion tokens.

    Args:
        sums: Shape (M,), float64, as `METRIC_SUMS`.

    Returns:
        One float per metric.

    Raises:
        ValueError: No pair was summed.
    """
    values = dict(zip(METRIC_SUMS, sums.tolist(), strict=True))
    if not values["num_pairs"]:
        raise ValueError("metrics of no pairs: metric_sums was never added to these sums")
    return {name: values[name] / values[count] for name, count in _COUNTS.items() if values[count]}
