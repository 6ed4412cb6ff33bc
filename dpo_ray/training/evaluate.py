"""Metrics on the held-out pairs, without gradients."""

from __future__ import annotations

import time

import torch
from torch import nn

from dpo_ray.objective.rewards import finish_metrics
from dpo_ray.training.step import Objective, eval_step
from dpo_ray.types import WAITING, HeldOutPairs


def evaluate(model: nn.Module, context: HeldOutPairs, objective: Objective, step: int, tokens: int) -> dict[str, float]:
    """One pass over the held-out pairs, in microbatches of `tokens`.

    Metrics are named with the prefix `eval_`, those of a set that has a name with `eval_NAME_` besides.

    Collective: all ranks.
    """
    started = time.perf_counter()
    every, metrics, doing = list[torch.Tensor](), dict[str, float](), context.control.doing
    doing(WAITING)
    for name in context.eval_sets:
        sums = list[torch.Tensor]()
        for number, batch in enumerate(context.eval_batches(name, step, tokens), start=1):
            doing(f"batch {number} of the evaluation{name and f' of {name}'} after step {step}")
            sums.append(eval_step(model, batch, objective).sums)
            doing(WAITING)
        if name:
            metrics |= _named(f"eval_{name}_", sums)
        every += sums
    metrics = _named("eval_", every) | metrics
    return {"step": step, **metrics, "eval_perf/seconds": time.perf_counter() - started}


def _named(prefix: str, sums: list[torch.Tensor]) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in finish_metrics(torch.stack(sums).sum(0)).items()}
