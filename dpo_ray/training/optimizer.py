"""Optimizers and the learning rate, both without state of their own beyond the optimizer's tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from optimi import AdamW as KahanAdamW
from torch import nn
from torch.optim import AdamW, Optimizer, RMSprop
from transformers import get_scheduler

from dpo_ray.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimizer over all parameters that are not frozen; weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match config.name:
        case "adamw":
            return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        case "rmsprop":
            return RMSprop(groups, lr=config.learning_rate, eps=config.eps)
        case "adamw_kahan":
            # Kahan summation keeps in a second bfloat16 what rounding an update into the weight would lose.
            return KahanAdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, kahan_sum=True)


def learning_rate_at(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer steps done, as transformers' schedules have it.

    The first update of a run with warm-up has learning rate 0, as in transformers' Trainer.
    """
    dummy = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_scheduler(config.schedule, dummy, config.warmup_steps, total_steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
