"""Microbatches -> one optimizer update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dpo_ray.model.forward import answer_logps, empty_pass
from dpo_ray.model.shard import clip_grad_norm, set_gradient_sync
from dpo_ray.objective.losses import AnswerStats
from dpo_ray.objective.rewards import METRIC_SUMS, metric_sums
from dpo_ray.types import GlobalBatch, Microbatch

Loss = Callable[[AnswerStats], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one pass over a global batch measured, over all ranks, still on the device.

    Attributes:
        sums: Shape (M,), float64: the sums named in `METRIC_SUMS`.
        num_tokens: Unique tokens of the global batch.
        reference_gap: Largest |policy - reference| per token over all answers, nats; 0 without a reference.
        grad_norm: Before clipping; None in evaluation.
    """

    sums: torch.Tensor
    num_tokens: torch.Tensor
    reference_gap: torch.Tensor
    grad_norm: torch.Tensor | None


def train_step(
    model: nn.Module, optimizer: Optimizer, batch: GlobalBatch, loss: Loss, beta: float, max_grad_norm: float | None
) -> StepResult:
    """One optimizer update: the mean loss over the global batch's pairs, whatever ranks and microbatches they are in.

    Collective: all ranks.
    """
    local = _Local(next(model.parameters()).device)
    for index, microbatch in enumerate(batch.microbatches):
        set_gradient_sync(model, index == len(batch.microbatches) - 1)
        if not microbatch.lengths:
            empty_pass(model).backward()
            continue
        stats = _answer_stats(model, microbatch)
        losses = loss(stats)
        (losses.sum() / batch.num_pairs).backward()
        local.add(stats, losses, beta, microbatch)
    grad_norm = clip_grad_norm(model, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return local.reduced(grad_norm)


@torch.no_grad()
def eval_step(model: nn.Module, batch: GlobalBatch, loss: Loss, beta: float) -> StepResult:
    """The same sums without gradients.

    Collective: all ranks.
    """
    local = _Local(next(model.parameters()).device)
    for microbatch in batch.microbatches:
        if not microbatch.lengths:
            empty_pass(model)
            continue
        stats = _answer_stats(model, microbatch)
        local.add(stats, loss(stats), beta, microbatch)
    return local.reduced(None)


class _Local:
    """This rank's sums, reduced over ranks in two collectives per step."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(METRIC_SUMS) + 1, dtype=torch.float64, device=device)
        self.gap = torch.zeros((), device=device)

    def add(self, stats: AnswerStats, losses: torch.Tensor, beta: float, microbatch: Microbatch) -> None:
        with torch.no_grad():
            self.sums[:-1] += metric_sums(stats, losses, beta)
            self.sums[-1] += len(microbatch.tokens)
            if stats.ref_logps is not None:
                gap = (stats.policy_logps - stats.ref_logps).abs() / stats.num_tokens
                self.gap = torch.maximum(self.gap, gap.max())

    def reduced(self, grad_norm: torch.Tensor | None) -> StepResult:
        dist.all_reduce(self.sums)
        dist.all_reduce(self.gap, op=dist.ReduceOp.MAX)
        return StepResult(self.sums[:-1], self.sums[-1], self.gap, grad_norm)


def _answer_stats(model: nn.Module, microbatch: Microbatch) -> AnswerStats:
    policy_logps = answer_logps(model, microbatch)
    device = policy_logps.device
    return AnswerStats(
        policy_logps=policy_logps,
        ref_logps=None if microbatch.ref_logps is None else microbatch.ref_logps.to(device),
        num_tokens=microbatch.num_tokens.to(device),
        pair_index=microbatch.pair_index.to(device),
        answer_index=microbatch.answer_index.to(device),
    )
