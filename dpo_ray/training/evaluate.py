"""Metrics on the held-out pairs, without gradients."""

from __future__ import annotations

import time

import torch
from torch import nn

from dpo_ray.objective.rewards import finish_metrics
from dpo_ray.training.step import Objective, eval_step
from dpo_ray.types import WAITING, WorkerContext


def evaluate(
    model: nn.Module, context: WorkerContext, objective: Objective, step: int, tokens: int
) -> dict[str, float]:
    """One pass over the held-out pairs, in microbatches of `tokens`; metrics are named with the prefix `eval_`.

    Collective: all ranks.
    """
    started = time.perf_counter()
    sums, doing = [], context.control.doing
    doing(WAITING)
    for number, batch in enumerate(context.eval_batches(step, tokens), start=1):
        doing(f"batch {number} of the evaluation after step {step}")
        sums.append(eval_step(model, batch, objective).sums)
        doing(WAITING)
    metrics = {f"eval_{name}": value for name, value in finish_metrics(torch.stack(sums).sum(0)).items()}
    return {"step": step, **metrics, "eval_perf/seconds": time.perf_counter() - started}
