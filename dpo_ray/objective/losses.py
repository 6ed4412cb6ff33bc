"""The losses, and how to add one.

1. Write a pure function here. It takes an `AnswerStats` and, keyword-only, the hyperparameters it uses, and returns
   one loss per comparison, Shape (C,), not reduced: the train loop divides the sum by the pairs of the global batch.
2. Add its entry to `LOSSES`: the paper, the interval of each hyperparameter, and whether it needs reference scores
   or all pairs of the global batch at once, or allows other divergences. Configuration, train loop and metrics go by
   that entry. A new hyperparameter is a field of `ObjectiveConfig` too, its neutral value stands in `PARAMETERS`.
   Without a change to this package: an entry in a module of your own, as `objective.loss: module:name`.
3. Write its closed form, loss and gradient, in `tests/unit/objective/test_losses.py`, which fails for an entry
   without one.

A pair is a prompt with its answers, best first: chosen, and one or more rejected ones. It has as many comparisons,
of the chosen answer with each of the others; its loss is their mean. Losses of whole rankings return Shape (P,).

Notation: A answers, P pairs, C comparisons; h = log pi(y|x) - log pi_ref(y|x) of a whole answer,
z = beta (h_chosen - h_rejected), sigma the logistic function, eps the label smoothing, |y| the tokens of an answer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dpo_ray.extensions import imported


@dataclass(frozen=True, slots=True)
class AnswerStats:
    """What a loss may know of the answers, stored pair by pair, best first.

    Attributes:
        policy_logps: Shape (A,), summed completion log-probabilities, nats, with gradient.
        ref_logps: Shape (A,), the same of the reference; None where there is none.
        num_tokens: Shape (A,), int64, completion tokens.
        num_answers: Of each pair, on the host; 2 or more, or 1 where the loss is of chosen answers alone.
        margins: Shape (P,), by how much a pair's chosen answer is to be better, in units of the reward; None: by 0.
        mean_reward: Of all answers trained on before, a pair's chosen and rejected ones weighing the same.
        entropy: Shape (A,), of the policy, summed over the answer's tokens, nats, without gradient; for metrics.
        mean_logits: Shape (A,), the policy's mean logit, summed over the answer's tokens, without gradient; likewise.
        alignment: Shape (A,), log p - log sum_v p_v^2 of the policy, summed over the answer's tokens, without
            gradient; for `wpo_weights`.
    """

    policy_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    num_tokens: torch.Tensor
    num_answers: Sequence[int]
    margins: torch.Tensor | None = None
    mean_reward: float = 0.0
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    alignment: torch.Tensor | None = None

    def log_ratios(self) -> torch.Tensor:
        """h = policy - reference, Shape (A,), nats.

        Raises:
            ValueError: There are no reference scores.
        """
        if self.ref_logps is None:
            raise ValueError("this needs reference scores, and the answers carry none")
        return self.policy_logps - self.ref_logps

    def pairwise(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One value per answer as those of each comparison's chosen and rejected answer.

        Args:
            values: Shape (A,).

        Returns:
            Shape (C,) each; views, where each pair has two answers. Else the host sends indices to the device. Where
            each pair has its chosen answer alone, C is P, and there is no value of a rejected one.

        Raises:
            ValueError: `values` does not fit the answers.
        """
        if values.shape != (sum(self.num_answers),):
            raise ValueError(f"values of shape {tuple(values.shape)} for {sum(self.num_answers)} answers")
        if self._twos:
            by_pair = values.view(-1, 2)
            return by_pair[:, 0], by_pair[:, 1]
        if self.of_chosen:
            return values, values[:0]
        chosen, rejected, start = list[int](), list[int](), 0
        for num in self.num_answers:
            chosen += [start] * (num - 1)
            rejected += range(start + 1, start + num)
            start += num
        return values[torch.tensor(chosen, device=values.device)], values[torch.tensor(rejected, device=values.device)]

    def by_pair(self, of_comparisons: torch.Tensor) -> torch.Tensor:
        """The mean over each pair's comparisons.

        Args:
            of_comparisons: Shape (C,).

        Returns:
            Shape (P,).
        """
        if self._twos or self.of_chosen:
            return of_comparisons
        return torch.stack([part.mean() for part in of_comparisons.split([num - 1 for num in self.num_answers])])

    def of_comparisons(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """The value of its pair for each comparison.

        Args:
            of_pairs: Shape (P,).

        Returns:
            Shape (C,).
        """
        if self._twos or self.of_chosen:
            return of_pairs
        counts = torch.tensor([num - 1 for num in self.num_answers], device=of_pairs.device)
        return of_pairs.repeat_interleave(counts, output_size=sum(self.num_answers) - len(self.num_answers))

    @property
    def of_chosen(self) -> bool:
        """Whether each pair has its chosen answer alone."""
        return all(num == 1 for num in self.num_answers)

    @property
    def _twos(self) -> bool:
        return all(num == 2 for num in self.num_answers)


def under_divergence(stats: AnswerStats, f_divergence: str, f_alpha: float | None = None) -> AnswerStats:
    """The answers for a loss whose policy is held to the reference by another divergence than reverse KL.

    f-DPO has s = f'(pi / pi_ref) where DPO has h:

        reverse_kl  s = h
        forward_kl  s = 1 - exp(-h)
        js          s = log 2 + log sigma(h)
        alpha       s = (exp((alpha - 1) h) - 1) / (alpha - 1): forward_kl at 0, reverse_kl towards 1

    Only for losses that go by differences of log-ratios (`LossSpec.any_divergence`): what f adds to both answers of a
    prompt cancels in them alone. exp's argument ends at 80, which float32 can still hold; further out s has no slope.

    Args:
        stats: The answers, with reference scores.
        f_divergence: reverse_kl, forward_kl, js, or alpha.
        f_alpha: alpha, in (0, 1), as in TRL; the paper's is 1 - alpha. Only for alpha.

    Returns:
        Answers whose log-ratios, Shape (A,), are s.

    Raises:
        ValueError: There are no reference scores.

    Source: arXiv 2309.16240 (f-DPO).
    """
    if f_divergence == "reverse_kl":
        return stats
    h = stats.log_ratios()
    if f_divergence == "js":
        scores = math.log(2) + F.logsigmoid(h)
    else:
        power = 1.0 if f_alpha is None else 1 - f_alpha
        scores = -torch.expm1((-power * h).clamp(max=80)) / power
    return replace(stats, policy_logps=scores, ref_logps=torch.zeros_like(h))


def wpo_weights(stats: AnswerStats) -> torch.Tensor:
    """WPO: how likely the policy would have given a comparison's two answers itself, w_chosen w_rejected.

    w(y) = exp(1 / |y| sum_t [log p_t(y_t) - log sum_v p_t(v)^2]), with weights aligned to what sampling would give.

    Args:
        stats: The answers, with `alignment`.

    Returns:
        Shape (C,), without gradient.

    Source: arXiv 2406.11827 eq. 2.
    """
    assert stats.alignment is not None
    chosen, rejected = stats.pairwise(torch.exp(stats.alignment.detach() / stats.num_tokens))
    return chosen * rejected


def sigmoid(stats: AnswerStats, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """DPO, with label smoothing cDPO: -(1 - eps) log sigma(z) - eps log sigma(-z).

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: eps, the assumed share of flipped labels, in [0, 0.5).

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2305.18290 eq. 7; smoothing: https://ericmitchell.ai/cdpo.pdf; margins: arXiv 2402.10571 (ODPO).
    """
    return _smoothed_logistic(_above_margin(stats, beta), label_smoothing)


def sigmoid_norm(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """Length-normalized DPO: -log sigma(beta (h_chosen / |y_chosen| - h_rejected / |y_rejected|)).

    Margins are per token and so much smaller than DPO's: beta is larger, 5 in the paper.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, per token; > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2411.15124 (Tulu 3), the length-normalized DPO loss.
    """
    chosen, rejected = stats.pairwise(stats.log_ratios() / stats.num_tokens)
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """IPO on per-token averages: (h_chosen / |y_chosen| - h_rejected / |y_rejected| - 1 / (2 beta))^2.

    The paper's log-ratios are of whole answers. As in TRL they are averages per token here, so that long answers do
    not outweigh short ones; beta is the paper's tau.

    Args:
        stats: The answers, with reference scores.
        beta: The target margin is 1 / (2 beta) nats per token; > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2310.12036 eq. 17.
    """
    chosen, rejected = stats.pairwise(stats.log_ratios() / stats.num_tokens)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """Hinge loss on the margin, from SLiC: max(0, 1 - z).

    Args:
        stats: The answers, with reference scores.
        beta: The loss is zero from a margin of 1 / beta nats on; > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2309.06657 (RSO), the hinge-norm loss.
    """
    return torch.relu(1 - _above_margin(stats, beta))


def robust(stats: AnswerStats, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Robust DPO: [-(1 - eps) log sigma(z) + eps log sigma(-z)] / (1 - 2 eps).

    Its mean over labels flipped with probability eps is the loss of the true labels. It is not bounded below.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: eps, the probability of a flipped label, in [0, 0.5).

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2403.00409, the unbiased estimator of the DPO loss.
    """
    z = _above_margin(stats, beta)
    kept, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(stats: AnswerStats, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """EXO: KL of (sigma(z), sigma(-z)), the policy's preference, from the labels' (1 - eps, eps).

    sigma(z) [log sigma(z) - log(1 - eps)] + sigma(-z) [log sigma(-z) - log eps]. Hard labels would make it infinite.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: eps, in (0, 0.5); the paper's is 0.001.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2402.00856 eq. 16, for two answers.
    """
    z = beta * _margins(stats)
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


def nca_pair(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """NCA: -log sigma(beta h_chosen) - 1/2 log sigma(-beta h_chosen) - 1/2 log sigma(-beta h_rejected).

    Unlike DPO it holds the chosen answer's own log-ratio, not only the difference of the two.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2402.05369, the NCA loss for pairwise preferences.
    """
    chosen, rejected = stats.pairwise(beta * stats.log_ratios())
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """BCO on pairs: -log sigma(r_chosen - delta) - log sigma(delta - r_rejected), r = beta h.

    delta is the mean reward of all answers trained on before this step, which a run carries along in its checkpoints;
    it begins at 0. The paper's, as TRL's once, takes in the batch itself too. TRL 1.16 has no delta any more.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2404.04656, the BCO loss with reward shift, on pairs.
    """
    chosen, rejected = stats.pairwise(beta * stats.log_ratios())
    return -F.logsigmoid(chosen - stats.mean_reward) - F.logsigmoid(stats.mean_reward - rejected)


def sppo_hard(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """SPPO with hard labels: (h_chosen - 1 / (2 beta))^2 + (h_rejected + 1 / (2 beta))^2.

    The paper's winning probabilities are 1 for the chosen answer and 0 for the rejected one; beta is 1 / eta.

    Args:
        stats: The answers, with reference scores.
        beta: The log-ratios' targets are +-1 / (2 beta) nats; > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2405.00675 eq. 4.7.
    """
    chosen, rejected = stats.pairwise(stats.log_ratios())
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """APO-zero: 1 - sigma(beta h_chosen) + sigma(beta h_rejected).

    For chosen answers that are better than the policy's own: their probability is to rise, the rejected one's to fall.
    As in TRL, 1 is added to the paper's loss, which makes it positive and changes no gradient.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Shape (C,), in (0, 2), the dtype of the log-probabilities.

    Source: arXiv 2408.06266 eq. 7.
    """
    chosen, rejected = stats.pairwise(beta * stats.log_ratios())
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """APO-down: sigma(beta h_chosen) + 1 - sigma(z).

    For chosen answers that are worse than the policy's own: both probabilities are to fall, the rejected one's more.
    As in TRL, 1 is added to the paper's loss, which makes it positive and changes no gradient.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Shape (C,), in (0, 2), the dtype of the log-probabilities.

    Source: arXiv 2408.06266 eq. 8.
    """
    chosen, rejected = stats.pairwise(beta * stats.log_ratios())
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """DiscoPOP: -(1 - m) log sigma(z) + m exp(-z) with m = sigma(z / 0.05).

    The discovered mixture of a logistic and an exponential loss. It is not convex: a z far below 0 has the slope of
    DPO, with a local minimum just below 0. The temperature of m is the paper's.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2406.08414 eq. 5 (log-ratio modulated loss).
    """
    z, tau = beta * _margins(stats), 0.05
    m = torch.sigmoid(z / tau)
    # Below -40 m is 0 in any dtype, and exp(-z) may be infinite.
    return -(1 - m) * F.logsigmoid(z) + m * torch.exp(-z.clamp(min=-40))


def aot(stats: AnswerStats, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """AOT, paired: the distribution of the policy's margins is to lie above that of the reference's.

    d is a pair's log pi(y_chosen|x) - log pi(y_rejected|x) less the reference's margin of the same rank in the global
    batch, whichever pair has it; the loss is -(1 - eps) log sigma(beta d) - eps log sigma(-beta d). TRL sorts each
    process's microbatch alone; here all pairs of the step are sorted, however many workers and microbatches.

    Args:
        stats: All answers of a global batch, with reference scores.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        Shape (C,), each pair's at its own place, the dtype of the log-probabilities.

    Source: arXiv 2406.05882, AOT paired with the logistic loss; smoothing as in TRL.
    """
    chosen, rejected = stats.pairwise(stats.policy_logps)
    margins = chosen - rejected
    reference = margins - _margins(stats)
    return _smoothed_logistic(beta * (margins - _of_same_rank(reference, margins)), label_smoothing)


def aot_unpaired(stats: AnswerStats, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """AOT, unpaired: the distribution of chosen log-ratios is to lie above that of rejected ones.

    d is a pair's h_chosen less the h_rejected of the same rank in the global batch, whichever pair has it; the loss is
    -(1 - eps) log sigma(beta d) - eps log sigma(-beta d). Sorted over the global batch, see `aot`.

    Args:
        stats: All answers of a global batch, with reference scores.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        Shape (C,), at the place of the chosen answer's pair, the dtype of the log-probabilities.

    Source: arXiv 2406.05882, AOT unpaired with the logistic loss; smoothing as in TRL.
    """
    chosen, rejected = stats.pairwise(stats.log_ratios())
    return _smoothed_logistic(beta * (chosen - _of_same_rank(rejected, chosen)), label_smoothing)


def softmax(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """The chosen answer's choice among all of its prompt: -log [exp(beta h_0) / sum_k exp(beta h_k)].

    The first factor of `plackett_luce`; sigmoid to the last bit, where there are two answers.

    Args:
        stats: The answers, with reference scores.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Shape (P,), the dtype of the log-probabilities.

    Source: arXiv 2406.09215 (softmax-DPO).
    """
    return _ranking_losses(stats, beta, depth=1)


def plackett_luce(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """DPO on a whole ranking of K answers: -sum_k log [exp(beta h_k) / sum_{j >= k} exp(beta h_j)], k = 0 .. K - 2.

    sigmoid to the last bit, where there are two answers.

    Args:
        stats: The answers, best first, with reference scores.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Shape (P,), the dtype of the log-probabilities.

    Source: arXiv 2305.18290 appendix A.3, the DPO objective under the Plackett-Luce model.
    """
    return _ranking_losses(stats, beta, depth=None)


def sft(stats: AnswerStats) -> torch.Tensor:
    """Mean negative log-likelihood per token of the chosen answer: -log pi(y_chosen|x) / |y_chosen|.

    Prepares a reference where there is none. Each pair weighs the same, however long its answer.

    Args:
        stats: The answers; reference scores are not used.

    Returns:
        Shape (C,), nats per token, the dtype of the log-probabilities.

    Source: arXiv 2305.18290 section 4, "DPO outline".
    """
    chosen, _ = stats.pairwise(stats.policy_logps / stats.num_tokens)
    return -chosen


def cpo(stats: AnswerStats, *, beta: float, nll_weight: float) -> torch.Tensor:
    """CPO: -log sigma(beta (log pi(y_chosen|x) - log pi(y_rejected|x))) + w (-log pi(y_chosen|x) / |y_chosen|).

    DPO whose reference says the same of all answers, held by the likelihood of the chosen one. That is per token here,
    as in TRL, where the paper's is of the whole answer.

    Args:
        stats: The answers; reference scores are not used.
        beta: Factor of the log-probabilities, > 0.
        nll_weight: w, > 0; 1 in the paper.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2401.08417, the preference loss and the likelihood term added to it.
    """
    chosen, rejected = stats.pairwise(beta * stats.policy_logps)
    return -F.logsigmoid(chosen - rejected) + nll_weight * sft(stats)


def simpo(stats: AnswerStats, *, beta: float, target_margin: float) -> torch.Tensor:
    """SimPO: -log sigma(beta (log pi(y_chosen|x) / |y_chosen| - log pi(y_rejected|x) / |y_rejected|) - gamma).

    Args:
        stats: The answers; reference scores are not used.
        beta: Factor of the log-probabilities per token, > 0; 2 to 10 in the paper.
        target_margin: gamma, > 0; 0.3 to 3 in the paper.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2405.14734 eq. 6.
    """
    chosen, rejected = stats.pairwise(stats.policy_logps / stats.num_tokens)
    return -F.logsigmoid(beta * (chosen - rejected) - target_margin)


def orpo(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """ORPO: -log p_chosen - beta log sigma(log odds(p_chosen) - log odds(p_rejected)), odds(p) = p / (1 - p).

    p is pi(y|x)^(1 / |y|), the geometric mean of an answer's token probabilities: the first term is `sft`.

    Args:
        stats: The answers; reference scores are not used.
        beta: Weight of the odds ratio, the paper's lambda; > 0.

    Returns:
        Shape (C,), the dtype of the log-probabilities.

    Source: arXiv 2403.07691 eq. 6 and 7.
    """
    # The odds of certain tokens are infinite.
    log_p = (stats.policy_logps / stats.num_tokens).clamp(max=-torch.finfo(stats.policy_logps.dtype).eps)
    chosen, rejected = stats.pairwise(log_p - torch.log(-torch.expm1(log_p)))
    return sft(stats) - beta * F.logsigmoid(chosen - rejected)


def _margins(stats: AnswerStats) -> torch.Tensor:
    """h_chosen - h_rejected, Shape (C,), nats."""
    chosen, rejected = stats.pairwise(stats.log_ratios())
    return chosen - rejected


def _above_margin(stats: AnswerStats, beta: float) -> torch.Tensor:
    """z less the pair's own margin, where it has one: Shape (C,)."""
    z = beta * _margins(stats)
    return z if stats.margins is None else z - stats.of_comparisons(stats.margins)


def _ranking_losses(stats: AnswerStats, beta: float, depth: int | None) -> torch.Tensor:
    """-log of the probability that each of the first `depth` answers is chosen among itself and those below it.

    Summed over them: Shape (P,). The probability of a choice is sigma(-log sum_j exp(beta (h_j - h_k))).
    """
    h = stats.log_ratios()
    best, other, row, column, choices = list[int](), list[int](), list[int](), list[int](), list[int]()
    start = num_rows = 0
    for num in stats.num_answers:
        choices.append(num - 1 if depth is None else min(depth, num - 1))
        for k in range(start, start + choices[-1]):
            below = range(k + 1, start + num)
            best += [k] * len(below)
            other += below
            row += [num_rows] * len(below)
            column += range(len(below))
            num_rows += 1
        start += num
    at = [torch.tensor(indices, device=h.device) for indices in (best, other, row, column)]
    gaps = h.new_full((num_rows, max(column) + 1), -math.inf).index_put((at[2], at[3]), beta * (h[at[1]] - h[at[0]]))
    of_choices = -F.logsigmoid(-gaps.logsumexp(dim=1))
    return of_choices if num_rows == len(choices) else torch.stack([part.sum() for part in of_choices.split(choices)])


def _smoothed_logistic(z: torch.Tensor, eps: float) -> torch.Tensor:
    """-(1 - eps) log sigma(z) - eps log sigma(-z), Shape as z."""
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def _of_same_rank(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values` in the order of `like`: the smallest where `like` is smallest, and so on; Shape (C,)."""
    ranks = like.detach().argsort(stable=True).argsort()
    return torch.sort(values, stable=True).values[ranks]


class Interval(NamedTuple):
    """Where a hyperparameter may lie; the upper end never belongs to it."""

    low: float
    high: float
    includes_low: bool

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        return (self.low <= value if self.includes_low else self.low < value) and value < self.high

    def __str__(self) -> str:
        return f"{'[' if self.includes_low else '('}{self.low:g}, {self.high:g})"


POSITIVE = Interval(0.0, math.inf, includes_low=False)
LABEL_SMOOTHING = Interval(0.0, 0.5, includes_low=True)
SOFT_LABELS = Interval(0.0, 0.5, includes_low=False)

# The hyperparameters. One that no loss uses must be at its value here, if there is one: nothing that is set goes unused
# in silence.
PARAMETERS: dict[str, float | None] = {"beta": None, "label_smoothing": 0.0, "nll_weight": 0.0, "target_margin": 0.0}


@dataclass(frozen=True, slots=True)
class LossSpec:
    """One entry of `LOSSES`.

    Attributes:
        fn: The loss; takes the hyperparameters in `parameters` as keywords and returns Shape (C,).
        paper: Where it comes from.
        bounds: The interval of each hyperparameter that `fn` uses.
        needs_reference: Whether it reads `ref_logps`.
        couples_pairs: Whether a pair's loss depends on other pairs, so that `fn` must see the whole global batch at
            once; else it may be called on any part of it.
        any_divergence: Whether it goes by differences of a pair's log-ratios, so that they may be those of
            `under_divergence`.
        of_rankings: Whether `fn` returns Shape (P,), and not Shape (C,).
        takes_margins: Whether it uses the pairs' own margins.
        chosen_only: Whether it looks at chosen answers alone, so that the others need not be computed.
    """

    fn: Callable[..., torch.Tensor]
    paper: str
    bounds: Mapping[str, Interval] = field(default_factory=dict)
    needs_reference: bool = True
    couples_pairs: bool = False
    any_divergence: bool = False
    of_rankings: bool = False
    takes_margins: bool = False
    chosen_only: bool = False

    def of_pairs(
        self, stats: AnswerStats, parameters: Mapping[str, float], weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of each pair, Shape (P,).

        Args:
            stats: The answers.
            parameters: `fn`'s keywords.
            weights: Of comparisons, Shape (C,); not for losses of rankings.
        """
        losses = self.fn(stats, **parameters)
        num = len(stats.num_answers)
        expected = num if self.of_rankings or stats.of_chosen else sum(stats.num_answers) - num
        if losses.shape != (expected,):
            raise ValueError(f"{self.fn.__name__} gives shape {tuple(losses.shape)}, its entry promises ({expected},)")
        if self.of_rankings:
            return losses
        return stats.by_pair(losses if weights is None else losses * weights)

    @property
    def parameters(self) -> frozenset[str]:
        """The hyperparameters that `fn` uses."""
        return frozenset(self.bounds)


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        sigmoid,
        "arXiv 2305.18290",
        {"beta": POSITIVE, "label_smoothing": LABEL_SMOOTHING},
        any_divergence=True,
        takes_margins=True,
    ),
    "sigmoid_norm": LossSpec(sigmoid_norm, "arXiv 2411.15124", {"beta": POSITIVE}, any_divergence=True),
    "ipo": LossSpec(ipo, "arXiv 2310.12036", {"beta": POSITIVE}, any_divergence=True),
    "hinge": LossSpec(hinge, "arXiv 2309.06657", {"beta": POSITIVE}, any_divergence=True, takes_margins=True),
    "robust": LossSpec(
        robust,
        "arXiv 2403.00409",
        {"beta": POSITIVE, "label_smoothing": LABEL_SMOOTHING},
        any_divergence=True,
        takes_margins=True,
    ),
    "exo_pair": LossSpec(
        exo_pair, "arXiv 2402.00856", {"beta": POSITIVE, "label_smoothing": SOFT_LABELS}, any_divergence=True
    ),
    "nca_pair": LossSpec(nca_pair, "arXiv 2402.05369", {"beta": POSITIVE}),
    "bco_pair": LossSpec(bco_pair, "arXiv 2404.04656", {"beta": POSITIVE}),
    "sppo_hard": LossSpec(sppo_hard, "arXiv 2405.00675", {"beta": POSITIVE}),
    "apo_zero": LossSpec(apo_zero, "arXiv 2408.06266", {"beta": POSITIVE}),
    "apo_down": LossSpec(apo_down, "arXiv 2408.06266", {"beta": POSITIVE}),
    "discopop": LossSpec(discopop, "arXiv 2406.08414", {"beta": POSITIVE}, any_divergence=True),
    "aot": LossSpec(
        aot, "arXiv 2406.05882", {"beta": POSITIVE, "label_smoothing": LABEL_SMOOTHING}, couples_pairs=True
    ),
    "aot_unpaired": LossSpec(
        aot_unpaired, "arXiv 2406.05882", {"beta": POSITIVE, "label_smoothing": LABEL_SMOOTHING}, couples_pairs=True
    ),
    "softmax": LossSpec(softmax, "arXiv 2406.09215", {"beta": POSITIVE}, any_divergence=True, of_rankings=True),
    "plackett_luce": LossSpec(
        plackett_luce, "arXiv 2305.18290", {"beta": POSITIVE}, any_divergence=True, of_rankings=True
    ),
    "sft": LossSpec(sft, "arXiv 2305.18290", needs_reference=False, chosen_only=True),
    "cpo": LossSpec(cpo, "arXiv 2401.08417", {"beta": POSITIVE, "nll_weight": POSITIVE}, needs_reference=False),
    "simpo": LossSpec(simpo, "arXiv 2405.14734", {"beta": POSITIVE, "target_margin": POSITIVE}, needs_reference=False),
    "orpo": LossSpec(orpo, "arXiv 2403.07691", {"beta": POSITIVE}, needs_reference=False),
}


# What others call the same.
_CALLED_OTHERWISE = {"dpo": "sigmoid", "rpo": "{sigmoid: 1.0, sft: 1.0}", "kto_pair": "bco_pair", "nll": "sft"}


def loss_named(name: str) -> LossSpec:
    """An entry of `LOSSES`, or a `LossSpec` of one's own as `module:name`.

    Raises:
        ValueError: There is no such entry; or it cannot be imported, is no `LossSpec`, or has other hyperparameters
            than those of `PARAMETERS`.
    """
    if ":" not in name:
        if name not in LOSSES:
            near = (
                [_CALLED_OTHERWISE[name]] if name in _CALLED_OTHERWISE else difflib.get_close_matches(name, LOSSES, n=1)
            )
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r}, known are {', '.join(LOSSES)}, or module:name of your own{hint}")
        return LOSSES[name]
    spec = imported(name, LossSpec)
    if unknown := spec.parameters - PARAMETERS.keys():
        raise ValueError(f"{name!r} has the hyperparameters {sorted(unknown)}: known are {', '.join(PARAMETERS)}")
    return spec


def check_parameters(names: Iterable[str], values: Mapping[str, float]) -> None:
    """Refuses hyperparameters that are out of a loss's range, or that all losses would ignore.

    Args:
        names: The losses.
        values: Hyperparameters by name, used or not.

    Raises:
        ValueError: One lies outside an interval, or is set although no loss uses it.
    """
    specs = {name: loss_named(name) for name in names}
    for key, value in values.items():
        using = {name: spec.bounds[key] for name, spec in specs.items() if key in spec.bounds}
        for name, interval in using.items():
            if value not in interval:
                raise ValueError(f"objective.{key} is {value!r}, but {name} needs it in {interval}: set it, too")
        neutral = PARAMETERS[key]
        if not using and neutral is not None and value != neutral:
            users = ", ".join(sorted(name for name, spec in LOSSES.items() if key in spec.bounds))
            raise ValueError(
                f"objective.{key} is {value!r}, but {' + '.join(specs)} does not use it: set it to {neutral:g}, or "
                f"choose one of {users}"
            )
