"""Microbatches -> one optimizer update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dpo_ray.config import ObjectiveConfig
from dpo_ray.model.forward import answer_scores, empty_pass
from dpo_ray.model.shard import clip_grad_norm, set_gradient_sync
from dpo_ray.objective.losses import LOSSES, AnswerStats, under_divergence
from dpo_ray.objective.rewards import METRIC_SUMS, metric_sums
from dpo_ray.types import GlobalBatch, Microbatch


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with its hyperparameters filled in.

    Attributes:
        loss: Answers -> Shape (P,).
        couples_pairs: Whether it must see all pairs of a global batch at once.
        beta: For the implicit rewards.
    """

    loss: Callable[[AnswerStats], torch.Tensor]
    couples_pairs: bool
    beta: float


def objective_of(config: ObjectiveConfig) -> Objective:
    """The configured loss."""
    spec, values = LOSSES[config.loss], config.model_dump()
    loss = partial(spec.fn, **{name: values[name] for name in sorted(spec.parameters)})
    divergence = config.f_divergence, config.f_alpha
    return Objective(lambda stats: loss(under_divergence(stats, *divergence)), spec.couples_pairs, config.beta)


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
    """

    sums: torch.Tensor
    num_tokens: torch.Tensor
    reference_gap: torch.Tensor
    grad_norm: torch.Tensor | None
    losses: list[torch.Tensor]
    leaving: torch.Tensor


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
    local = _Local(cast(Any, model).runs_on, leaving)
    joint = _joint_losses(model, batch, objective) if objective.couples_pairs else None
    for index, microbatch in enumerate(batch.microbatches):
        set_gradient_sync(model, reduce_each or index == len(batch.microbatches) - 1)
        if not microbatch.lengths:
            empty_pass(model).backward()
            continue
        stats = _answer_stats(model, microbatch)
        if joint is None:
            losses = objective.loss(stats)
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
        stats = _answer_stats(model, microbatch)
        local.add(stats, objective.loss(stats) if joint is None else joint[index][0], objective.beta, microbatch)
    return local.reduced(None)


class _Local:
    """This rank's sums, reduced over ranks in one collective per step."""

    def __init__(self, device: torch.device, leaving: bool = False) -> None:
        self.sums = torch.zeros(len(METRIC_SUMS) + 2, dtype=torch.float64, device=device)
        self.sums[-1] = leaving
        self.gap = torch.zeros((), device=device)
        self.losses = list[torch.Tensor]()

    def add(self, stats: AnswerStats, losses: torch.Tensor, beta: float, microbatch: Microbatch) -> None:
        self.losses.append(losses.detach())
        with torch.no_grad():
            self.sums[:-2] += metric_sums(stats, losses, beta)
            self.sums[-2] += len(microbatch.tokens)
            if stats.ref_logps is not None:
                gap = (stats.policy_logps - stats.ref_logps).abs() / stats.num_tokens
                self.gap = torch.maximum(self.gap, gap.max())

    def reduced(self, grad_norm: torch.Tensor | None) -> StepResult:
        dist.all_reduce(self.sums)
        return StepResult(self.sums[:-2], self.sums[-2], self.gap, grad_norm, self.losses, self.sums[-1])


def _answer_stats(model: nn.Module, microbatch: Microbatch) -> AnswerStats:
    scores = answer_scores(model, microbatch)
    device = scores.logps.device
    return AnswerStats(
        policy_logps=scores.logps,
        ref_logps=None if microbatch.ref_logps is None else microbatch.ref_logps.to(device),
        num_tokens=microbatch.num_tokens.to(device),
        pair_index=microbatch.pair_index.to(device),
        answer_index=microbatch.answer_index.to(device),
        entropy=scores.entropy,
        mean_logits=scores.mean_logits,
    )


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
    own: dict[bytes, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = {}
    with torch.no_grad():
        for microbatch, pair_ids in zip(batch.microbatches, batch.microbatch_pair_ids, strict=True):
            if not microbatch.lengths:
                empty_pass(model)
                continue
            stats = _answer_stats(model, microbatch)
            for index, pair_id in enumerate(pair_ids):
                mine = stats.pair_index == index
                ref_logps = None if stats.ref_logps is None else stats.ref_logps[mine].cpu()
                own[pair_id] = stats.policy_logps[mine].cpu(), ref_logps, stats.num_tokens[mine].cpu()
    gathered: list[dict[bytes, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]]
    gathered = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    everyones = {pair_id: values for rank in gathered for pair_id, values in rank.items()}
    policy, ref, num_tokens = zip(*(everyones[pair_id] for pair_id in batch.pair_ids), strict=True)
    sizes = [len(values) for values in policy]
    stats = AnswerStats(
        policy_logps=torch.cat(policy).requires_grad_(),
        ref_logps=None if ref[0] is None else torch.cat(ref),
        num_tokens=torch.cat(num_tokens),
        pair_index=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        answer_index=torch.cat([torch.arange(size) for size in sizes]),
    )
    with torch.enable_grad():
        losses = objective.loss(stats)
        (gradient,) = torch.autograd.grad(losses.sum(), stats.policy_logps)
    of_pair = dict(zip(batch.pair_ids, zip(losses.detach(), gradient.split(sizes), strict=True), strict=True))
    device = cast(Any, model).runs_on
    found = []
    for pair_ids in batch.microbatch_pair_ids:
        parts = [of_pair[pair_id] for pair_id in pair_ids] or [(torch.zeros(()), torch.zeros(0))]
        found.append((torch.stack([part[0] for part in parts]).to(device), torch.cat([p[1] for p in parts]).to(device)))
    return found
