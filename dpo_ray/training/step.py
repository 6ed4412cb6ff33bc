"""Microbatches -> one optimizer update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dpo_ray.config import ObjectiveConfig
from dpo_ray.errors import ConfigError
from dpo_ray.model.forward import answer_scores, empty_pass
from dpo_ray.model.shard import clip_grad_norm, set_gradient_sync
from dpo_ray.objective.losses import AnswerStats, LossSpec, loss_named, under_divergence, wpo_weights
from dpo_ray.objective.rewards import METRIC_SUMS, metric_sums
from dpo_ray.types import GlobalBatch, Microbatch, TrainState


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss, or a mixture of losses, with its hyperparameters filled in.

    Attributes:
        loss: Answers -> Shape (P,).
        couples_pairs: Whether it must see all pairs of a global batch at once.
        beta: For the implicit rewards.
        ld_alpha: What a token counts that stands where another answer of its pair has ended.
        mean_reward: See `AnswerStats`.
    """

    loss: Callable[[AnswerStats], torch.Tensor]
    couples_pairs: bool
    beta: float
    ld_alpha: float = 1.0
    mean_reward: float = 0.0

    def at(self, state: TrainState) -> Objective:
        """The same, with what it goes by of the steps before."""
        return replace(self, mean_reward=state.mean_reward)


def objective_of(config: ObjectiveConfig) -> Objective:
    """The configured loss.

    Raises:
        ConfigError: It is one of the user's own, and not here.
    """
    values, divergence = config.model_dump(), (config.f_divergence, config.f_alpha)
    parts = [
        (share, spec, {key: values[key] for key in spec.parameters})
        for spec, share in ((_here(name), share) for name, share in config.shares.items())
    ]

    def loss(stats: AnswerStats) -> torch.Tensor:
        held = under_divergence(stats, *divergence)
        weights = wpo_weights(stats) if config.weighting == "wpo" else None
        losses = [
            share * spec.of_pairs(held if spec.needs_reference else stats, parameters, weights)
            for share, spec, parameters in parts
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(dim=0)

    couples_pairs = any(spec.couples_pairs for _, spec, _ in parts)
    return Objective(loss, couples_pairs, config.beta, config.ld_alpha)


def _here(name: str) -> LossSpec:
    try:
        return loss_named(name)
    except ValueError as error:
        raise ConfigError(f"objective.loss is {error}") from None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one pass over a global batch measured, still on the device; over all ranks, where nothing else is said.

    Attributes:
        sums: Shape (M,), float64: the sums named in `METRIC_SUMS`.
        num_tokens: Unique tokens of the global batch.
        reference_gap: Largest |policy - reference| per token over this rank's answers, nats; 0 without a reference.
        grad_norm: Before clipping; None in evaluation.
        losses: This rank's, per microbatch with pairs: Shape (P,).
        leaving: How many ranks have been asked to leave: all ranks see the same number at the same step.
        rank_s: Shape (ranks,): what each rank's `BlockClock` read of the step before, which the device has ended.
    """

    sums: torch.Tensor
    num_tokens: torch.Tensor
    reference_gap: torch.Tensor
    grad_norm: torch.Tensor | None
    losses: list[torch.Tensor]
    leaving: torch.Tensor
    rank_s: torch.Tensor


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: GlobalBatch,
    objective: Objective,
    max_grad_norm: float | None,
    leaving: bool = False,
    reduce_each: bool = False,
) -> StepResult:
    """One optimizer update: the mean loss over the global batch's pairs, whatever ranks and microbatches they are in.

    Args:
        model: The sharded policy.
        optimizer: Its optimizer.
        batch: This rank's part of the global batch.
        objective: The loss.
        max_grad_norm: For clipping; None: do not.
        leaving: Whether this rank has been asked to leave.
        reduce_each: Whether gradients are summed over ranks after each microbatch, and not once after the last: more
            communication, but no rank holds the gradient of the whole model.

    Collective: all ranks.
    """
    local = _Local(cast(Any, model).runs_on, leaving, cast(Any, model).clock.read_s())
    joint = _joint_losses(model, batch, objective) if objective.couples_pairs else None
    for index, microbatch in enumerate(batch.microbatches):
        last = index == len(batch.microbatches) - 1
        set_gradient_sync(model, reduce_each or last, last)
        if not microbatch.lengths:
            empty_pass(model).backward()
            continue
        stats = _answer_stats(model, microbatch, objective)
        if joint is None:
            losses = _weighted(objective.loss(stats), microbatch)
            (losses.sum() / batch.num_pairs).backward()
        else:
            losses, gradient = joint[index]
            stats.policy_logps.backward(gradient / batch.num_pairs)
        local.add(stats, losses, objective.beta, microbatch)
    grad_norm = clip_grad_norm(model, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return local.reduced(grad_norm)


@torch.no_grad()
def eval_step(model: nn.Module, batch: GlobalBatch, objective: Objective) -> StepResult:
    """The same sums without gradients.

    Collective: all ranks.
    """
    local = _Local(cast(Any, model).runs_on)
    joint = _joint_losses(model, batch, objective) if objective.couples_pairs else None
    for index, microbatch in enumerate(batch.microbatches):
        if not microbatch.lengths:
            empty_pass(model)
            continue
        stats = _answer_stats(model, microbatch, objective)
        losses = _weighted(objective.loss(stats), microbatch) if joint is None else joint[index][0]
        local.add(stats, losses, objective.beta, microbatch)
    return local.reduced(None)


class _Local:
    """This rank's sums, reduced over ranks in one collective per step."""

    def __init__(self, device: torch.device, leaving: bool = False, took_s: float = 0.0) -> None:
        # The sums, tokens, ranks that leave, and a place for each rank's own seconds: one collective for all.
        self.everything = torch.zeros(len(METRIC_SUMS) + 2 + dist.get_world_size(), dtype=torch.float64, device=device)
        sizes = [len(METRIC_SUMS), 1, 1, dist.get_world_size()]
        self.sums, self.num_tokens, self.leaving, self.rank_s = self.everything.split(sizes)
        self.leaving += leaving
        self.rank_s[dist.get_rank()] = took_s
        self.gap = torch.zeros((), device=device)
        self.losses = list[torch.Tensor]()

    def add(self, stats: AnswerStats, losses: torch.Tensor, beta: float, microbatch: Microbatch) -> None:
        self.losses.append(losses.detach())
        with torch.no_grad():
            self.sums += metric_sums(stats, losses, beta)
            self.num_tokens += len(microbatch.tokens)
            if stats.ref_logps is not None:
                gap = (stats.policy_logps - stats.ref_logps).abs() / stats.num_tokens
                self.gap = torch.maximum(self.gap, gap.max())

    def reduced(self, grad_norm: torch.Tensor | None) -> StepResult:
        dist.all_reduce(self.everything)
        about = self.gap, grad_norm, self.losses
        return StepResult(self.sums, self.num_tokens[0], *about, self.leaving[0], self.rank_s)


def _answer_stats(model: nn.Module, microbatch: Microbatch, objective: Objective) -> AnswerStats:
    scores = answer_scores(model, microbatch, objective.ld_alpha)
    device = scores.logps.device
    return AnswerStats(
        policy_logps=scores.logps,
        ref_logps=None if microbatch.ref_logps is None else microbatch.ref_logps.to(device),
        num_tokens=microbatch.num_tokens.to(device),
        num_answers=[len(answers) for _, *answers in microbatch.lengths],
        margins=None if microbatch.margins is None else microbatch.margins.to(device),
        mean_reward=objective.mean_reward,
        entropy=scores.entropy,
        mean_logits=scores.mean_logits,
        alignment=scores.alignment,
    )


class _OfPair(NamedTuple):
    """What a loss sees of one pair, on the CPU: Shape (answers,) each, and two numbers."""

    policy_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    num_tokens: torch.Tensor
    weight: float
    margin: float


def _of_pairs(stats: AnswerStats, microbatch: Microbatch) -> list[_OfPair]:
    def each(values: torch.Tensor) -> list[torch.Tensor]:
        # Copies: a view is sent with all that it is a view of.
        return [part.clone() for part in values.cpu().split(list(stats.num_answers))]

    num = len(stats.num_answers)
    refs: Sequence[torch.Tensor | None] = [None] * num if stats.ref_logps is None else each(stats.ref_logps)
    weights = [1.0] * num if microbatch.weights is None else microbatch.weights.tolist()
    margins = [0.0] * num if microbatch.margins is None else microbatch.margins.tolist()
    parts = each(stats.policy_logps), refs, each(stats.num_tokens), weights, margins
    return [_OfPair(*values) for values in zip(*parts, strict=True)]


def _weighted(losses: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """The losses of a microbatch's pairs, each as much as it counts; Shape (P,)."""
    return losses if microbatch.weights is None else losses * microbatch.weights.to(losses.device)


def _joint_losses(
    model: nn.Module, batch: GlobalBatch, objective: Objective
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses of all pairs of a global batch at once, for objectives that couple them.

    A first pass without gradients gathers what the loss sees of every rank's answers, in plan order, so that the loss
    is the same on all ranks and world sizes; its gradient in the log-probabilities then feeds the backward passes.

    Returns:
        Per microbatch of this rank: losses, Shape (P,), and their gradient in the log-probabilities, Shape (A,).

    Collective: all ranks.
    """
    own: dict[bytes, _OfPair] = {}
    with torch.no_grad():
        for microbatch, pair_ids in zip(batch.microbatches, batch.microbatch_pair_ids, strict=True):
            if not microbatch.lengths:
                empty_pass(model)
                continue
            stats = _answer_stats(model, microbatch, objective)
            own |= dict(zip(pair_ids, _of_pairs(stats, microbatch), strict=True))
    gathered: list[dict[bytes, _OfPair]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    everyones = {pair_id: values for rank in gathered for pair_id, values in rank.items()}
    every = [everyones[pair_id] for pair_id in batch.pair_ids]
    refs = [each.ref_logps for each in every if each.ref_logps is not None]
    sizes = [len(each.policy_logps) for each in every]
    stats = AnswerStats(
        policy_logps=torch.cat([each.policy_logps for each in every]).requires_grad_(),
        ref_logps=torch.cat(refs) if refs else None,
        num_tokens=torch.cat([each.num_tokens for each in every]),
        num_answers=sizes,
        margins=torch.tensor([each.margin for each in every]),
        mean_reward=objective.mean_reward,
    )
    with torch.enable_grad():
        losses = objective.loss(stats) * torch.tensor([each.weight for each in every])
        (gradient,) = torch.autograd.grad(losses.sum(), stats.policy_logps)
    of_pair = dict(zip(batch.pair_ids, zip(losses.detach(), gradient.split(sizes), strict=True), strict=True))
    device = cast(Any, model).runs_on
    found = []
    for pair_ids in batch.microbatch_pair_ids:
        parts = [of_pair[pair_id] for pair_id in pair_ids] or [(torch.zeros(()), torch.zeros(0))]
        found.append((torch.stack([part[0] for part in parts]).to(device), torch.cat([p[1] for p in parts]).to(device)))
    return found
