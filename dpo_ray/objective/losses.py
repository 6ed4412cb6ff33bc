"""The losses, and how to add one.

1. Write a pure function here. It takes an `AnswerStats` and, keyword-only, the hyperparameters it uses, and returns
   one loss per pair, Shape (P,), not reduced: the train loop divides the sum by the pairs of the global batch.
2. Add its entry to `LOSSES`: the paper, the interval of each hyperparameter, and whether it needs reference scores
   or all pairs of the global batch at once. Configuration, train loop and metrics go by that entry.
3. Write its closed form, loss and gradient, in `tests/unit/objective/test_losses.py`, which fails for an entry
   without one.

Notation: A answers, P pairs; h = log pi(y|x) - log pi_ref(y|x) of a whole answer, z = beta (h_chosen - h_rejected),
sigma the logistic function, eps the label smoothing, |y| the tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class AnswerStats:
    """What a loss may know of the answers, stored pair by pair, best first.

    Attributes:
        policy_logps: Shape (A,), summed completion log-probabilities, nats, with gradient.
        ref_logps: Shape (A,), the same of the reference; None where there is none.
        num_tokens: Shape (A,), int64, completion tokens.
        pair_index: Shape (A,), int64: the pair that an answer belongs to.
        answer_index: Shape (A,), int64: 0 for the best answer of its pair (chosen), then 1, 2, ...
        entropy: Shape (A,), of the policy, summed over the answer's tokens, nats, without gradient; for metrics.
        mean_logits: Shape (A,), the policy's mean logit, summed over the answer's tokens, without gradient; likewise.
    """

    policy_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    num_tokens: torch.Tensor
    pair_index: torch.Tensor
    answer_index: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None

    def log_ratios(self) -> torch.Tensor:
        """h = policy - reference, Shape (A,), nats.

        Raises:
            ValueError: There are no reference scores.
        """
        if self.ref_logps is None:
            raise ValueError("this needs reference scores, and the answers carry none")
        return self.policy_logps - self.ref_logps

    def pairwise(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one value per answer as chosen and rejected.

        The layout is checked without waiting for the device: a wrong one is a ValueError on CPU, elsewhere an
        assertion on the device, which ends the process at the next synchronization.

        Args:
            values: Shape (A,).

        Returns:
            Chosen and rejected, each of Shape (P,).

        Raises:
            ValueError: Some pair has not exactly two answers, or they are not stored pair by pair, chosen first.
        """
        message = "pairwise needs exactly two answers per pair, stored pair by pair, chosen first"
        if len(self.answer_index) % 2 or values.shape != self.answer_index.shape:
            raise ValueError(f"{message}; got {len(self.answer_index)} answers, values of shape {tuple(values.shape)}")
        answer, pair = self.answer_index.view(-1, 2), self.pair_index.view(-1, 2)
        ordered = (answer[:, 0] == 0).all() & (answer[:, 1] == 1).all() & (pair[:, 0] == pair[:, 1]).all()
        ordered &= (pair[1:, 0] > pair[:-1, 0]).all()
        if ordered.device.type != "cpu":
            torch._assert_async(ordered, message)
        elif not ordered:
            raise ValueError(f"{message}; pairs {self.pair_index.tolist()}, answers {self.answer_index.tolist()}")
        by_pair = values.view(-1, 2)
        return by_pair[:, 0], by_pair[:, 1]


def sigmoid(stats: AnswerStats, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """DPO, with label smoothing cDPO: -(1 - eps) log sigma(z) - eps log sigma(-z).

    Args:
        stats: The answers, two per pair, with reference scores.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: eps, the assumed share of flipped labels, in [0, 0.5).

    Returns:
        Shape (P,), the dtype of the log-probabilities.

    Source: arXiv 2305.18290 eq. 7; smoothing: https://ericmitchell.ai/cdpo.pdf.
    """
    z = beta * _margins(stats)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def ipo(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """IPO on per-token averages: (h_chosen / |y_chosen| - h_rejected / |y_rejected| - 1 / (2 beta))^2.

    The paper's log-ratios are of whole answers. As in TRL they are averages per token here, so that long answers do
    not outweigh short ones; beta is the paper's tau.

    Args:
        stats: The answers, two per pair, with reference scores.
        beta: The target margin is 1 / (2 beta) nats per token; > 0.

    Returns:
        Shape (P,), the dtype of the log-probabilities.

    Source: arXiv 2310.12036 eq. 17.
    """
    chosen, rejected = stats.pairwise(stats.log_ratios() / stats.num_tokens)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(stats: AnswerStats, *, beta: float) -> torch.Tensor:
    """Hinge loss on the margin, from SLiC: max(0, 1 - z).

    Args:
        stats: The answers, two per pair, with reference scores.
        beta: The loss is zero from a margin of 1 / beta nats on; > 0.

    Returns:
        Shape (P,), the dtype of the log-probabilities.

    Source: arXiv 2309.06657 (RSO), the hinge-norm loss.
    """
    return torch.relu(1 - beta * _margins(stats))


def robust(stats: AnswerStats, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Robust DPO: [-(1 - eps) log sigma(z) + eps log sigma(-z)] / (1 - 2 eps).

    Its mean over labels flipped with probability eps is the loss of the true labels. It is not bounded below.

    Args:
        stats: The answers, two per pair, with reference scores.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: eps, the probability of a flipped label, in [0, 0.5).

    Returns:
        Shape (P,), the dtype of the log-probabilities.

    Source: arXiv 2403.00409, the unbiased estimator of the DPO loss.
    """
    z = beta * _margins(stats)
    kept, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def sft(stats: AnswerStats) -> torch.Tensor:
    """Mean negative log-likelihood per token of the chosen answer: -log pi(y_chosen|x) / |y_chosen|.

    Prepares a reference where there is none. Each pair weighs the same, however long its answer.

    Args:
        stats: The answers, two per pair; reference scores are not used.

    Returns:
        Shape (P,), nats per token, the dtype of the log-probabilities.

    Source: arXiv 2305.18290 section 4, "DPO outline".
    """
    chosen, _ = stats.pairwise(stats.policy_logps / stats.num_tokens)
    return -chosen


def _margins(stats: AnswerStats) -> torch.Tensor:
    """h_chosen - h_rejected, Shape (P,), nats."""
    chosen, rejected = stats.pairwise(stats.log_ratios())
    return chosen - rejected


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


BETA = Interval(0.0, math.inf, includes_low=False)
LABEL_SMOOTHING = Interval(0.0, 0.5, includes_low=True)

# A hyperparameter that a loss does not use must be at this value: nothing that is set goes unused in silence.
_NEUTRAL = {"label_smoothing": 0.0}


@dataclass(frozen=True, slots=True)
class LossSpec:
    """One entry of `LOSSES`.

    Attributes:
        fn: The loss; takes the hyperparameters in `parameters` as keywords and returns Shape (P,).
        paper: Where it comes from.
        bounds: The interval of each hyperparameter that `fn` uses.
        needs_reference: Whether it reads `ref_logps`.
        couples_pairs: Whether a pair's loss depends on other pairs, so that `fn` must see the whole global batch at
            once; else it may be called on any part of it.
    """

    fn: Callable[..., torch.Tensor]
    paper: str
    bounds: Mapping[str, Interval] = field(default_factory=dict)
    needs_reference: bool = True
    couples_pairs: bool = False

    @property
    def parameters(self) -> frozenset[str]:
        """The hyperparameters that `fn` uses."""
        return frozenset(self.bounds)

    def check(self, **values: float) -> None:
        """Refuses hyperparameters that are out of range or that this loss would ignore.

        Args:
            **values: All hyperparameters by name, used by this loss or not.

        Raises:
            ValueError: One lies outside its interval, or is set although this loss does not use it.
        """
        for name, value in values.items():
            if name in self.bounds:
                if value not in self.bounds[name]:
                    raise ValueError(f"{name} is {value!r}, but {self.fn.__name__} needs it in {self.bounds[name]}")
            elif value != _NEUTRAL.get(name, value):
                users = ", ".join(sorted(loss for loss, spec in LOSSES.items() if name in spec.bounds))
                raise ValueError(
                    f"{name} is {value!r}, but {self.fn.__name__} does not use it: "
                    f"set it to {_NEUTRAL[name]:g}, or choose one of {users}"
                )


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(sigmoid, "arXiv 2305.18290", {"beta": BETA, "label_smoothing": LABEL_SMOOTHING}),
    "ipo": LossSpec(ipo, "arXiv 2310.12036", {"beta": BETA}),
    "hinge": LossSpec(hinge, "arXiv 2309.06657", {"beta": BETA}),
    "robust": LossSpec(robust, "arXiv 2403.00409", {"beta": BETA, "label_smoothing": LABEL_SMOOTHING}),
    "sft": LossSpec(sft, "arXiv 2305.18290", needs_reference=False),
}
