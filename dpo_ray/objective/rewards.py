"""Implicit rewards, and metrics as sums that ranks and microbatches add up."""

from __future__ import annotations

import torch

from dpo_ray.objective.losses import AnswerStats

# The means, in the order of `METRIC_SUMS`, by the count that they are divided by.
_PER_PAIR = ("loss", "logps/chosen", "logps/rejected")
_PER_REWARDED_PAIR = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

METRIC_SUMS: tuple[str, ...] = (*_PER_PAIR, "num_pairs", *_PER_REWARDED_PAIR, "num_rewarded_pairs")


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
    """The sums behind the metrics, on the device of the answers: nothing here waits for it.

    Add them over microbatches and ranks, then call `finish_metrics`. Without reference scores the rewards' sums and
    their count are 0.

    Args:
        stats: The answers, two per pair.
        losses: Shape (P,).
        beta: Strength of the pull towards the reference.

    Returns:
        Shape (M,), float64: the sums named in `METRIC_SUMS`.
    """
    chosen_logps, rejected_logps = stats.pairwise(stats.policy_logps)
    ones = torch.ones_like(losses)
    columns = [losses, chosen_logps, rejected_logps, ones]
    if stats.ref_logps is None:
        columns += [torch.zeros_like(losses)] * (len(METRIC_SUMS) - len(columns))
    else:
        chosen, rejected = stats.pairwise(implicit_rewards(stats, beta))
        columns += [chosen, rejected, chosen - rejected, chosen > rejected, ones]
    return torch.stack([column.double() for column in columns]).sum(dim=1)


def finish_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Means over all pairs that were summed, under TRL's names.

    `rewards/*` are there only for answers with reference scores. `rewards/accuracies` counts a tie as wrong, so that
    it is 0 while the policy is the reference. `logps/*` are sums over an answer's tokens.

    Args:
        sums: Shape (M,), float64, as `METRIC_SUMS`.

    Returns:
        One float per metric.

    Raises:
        ValueError: No pair was summed.
    """
    values = dict(zip(METRIC_SUMS, sums.tolist(), strict=True))
    num_pairs, num_rewarded_pairs = values["num_pairs"], values["num_rewarded_pairs"]
    if not num_pairs:
        raise ValueError("metrics of no pairs: metric_sums was never added to these sums")
    metrics = {name: values[name] / num_pairs for name in _PER_PAIR}
    if num_rewarded_pairs:
        metrics |= {name: values[name] / num_rewarded_pairs for name in _PER_REWARDED_PAIR}
    return metrics
