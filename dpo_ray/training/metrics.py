"""From sums over a global batch to a line of metrics.jsonl, and the checks that stop a run that would be wrong."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from dpo_ray.config import Config
from dpo_ray.errors import FirstStepError, NonFiniteLossError
from dpo_ray.model.adapter import num_weights
from dpo_ray.model.peak import peak_flops
from dpo_ray.objective.rewards import finish_metrics
from dpo_ray.training.step import StepResult
from dpo_ray.types import GlobalBatch, TrainState, WorkerContext

# Largest |policy - reference| per token that numerics alone explain at the first step, in nats.
FIRST_STEP_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
SUSPECTS_SHOWN = 8


def step_line(
    context: WorkerContext, state: TrainState, batch: GlobalBatch, result: StepResult, learning_rate: float
) -> dict[str, float]:
    """The metrics of one optimizer step, under TRL's names.

    Raises:
        NonFiniteLossError: The loss or the gradient is not finite.

    Collective: none, but all ranks where the loss is not finite.
    """
    metrics = finish_metrics(result.sums)
    grad_norm = float(result.grad_norm) if result.grad_norm is not None else 0.0
    if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
        raise NonFiniteLossError(
            f"step {batch.step}: loss {metrics['loss']}, gradient norm {grad_norm}; nothing of this step was kept. "
            f"Lower optimizer.learning_rate (now {learning_rate:g}), or look at {_suspects(context, batch, result)}.\n"
            "All pairs of this batch: " + ", ".join(pair_id.hex() for pair_id in batch.pair_ids)
        )
    return {
        "step": state.step,
        "epoch": state.step / context.steps_per_epoch,
        **metrics,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": state.num_tokens,
    }


def count_pairs(state: TrainState, batch: GlobalBatch, line: Mapping[str, float]) -> None:
    """Takes a step's pairs, and their rewards by its metrics, into the run's counts."""
    state.num_pairs += batch.num_pairs
    if "rewards/chosen" in line:
        mean = (line["rewards/chosen"] + line["rewards/rejected"]) / 2
        state.mean_reward += (mean - state.mean_reward) * batch.num_pairs / state.num_pairs


def _suspects(context: WorkerContext, batch: GlobalBatch, result: StepResult) -> str:
    """The pairs whose own loss is not finite, or, where it is for all, the batch's, with file and row."""
    mine = [
        pair_id
        for ids, losses in zip(filter(None, batch.microbatch_pair_ids), result.losses, strict=True)
        for pair_id, finite in zip(ids, losses.isfinite().tolist(), strict=True)
        if not finite
    ]
    everyones: list[list[bytes]] = [[] for _ in range(context.world_size)]
    dist.all_gather_object(everyones, mine)
    bad = {pair_id for ids in everyones for pair_id in ids}
    suspects = [pair_id for pair_id in batch.pair_ids if pair_id in bad] or batch.pair_ids
    sources = context.sources(batch.step)
    shown = ", ".join(f"{sources.get(pair_id, '?')} ({pair_id.hex()})" for pair_id in suspects[:SUSPECTS_SHOWN])
    more = f" and {len(suspects) - SUSPECTS_SHOWN} more" if len(suspects) > SUSPECTS_SHOWN else ""
    whose = "the pairs whose own loss is not finite" if bad else "the pairs of this batch"
    return f"{whose}: {shown}{more}"


class Stopwatch:
    """Where the time of a run goes, and what its devices make of it."""

    def __init__(self, model: nn.Module, config: Config, context: WorkerContext) -> None:
        """Starts.

        Args:
            model: The policy.
            config: Says in which dtype it computes.
            context: This rank's device, and how many there are.
        """
        # Forward, and backward by the gradient of the states and, where a weight is trained, of the weight.
        self._operations = sum((6 if each.requires_grad else 4) * num_weights(each) for each in model.parameters())
        dtype = getattr(torch, config.model.compute_dtype)
        self._peak_flops = peak_flops(context.device, dtype) * context.world_size
        self._ended = self._asked = self._got = time.perf_counter()

    def asked(self) -> None:
        """The next batch is asked for."""
        self._asked = time.perf_counter()

    def got(self) -> None:
        """It is here."""
        self._got = time.perf_counter()

    def step(self, batch: GlobalBatch, result: StepResult) -> dict[str, float]:
        """The step has ended.

        Its time runs from the end of the step before: waiting for data, evaluation and checkpoint in between included.

        Returns:
            Throughput, and the slowest rank. `perf/between_steps_s` is what evaluation and checkpoint after the step
            before took. `perf/mfu` counts 6 operations per parameter and different token, 4 where it is frozen.
        """
        before, self._ended = self._ended, time.perf_counter()
        step_s, num_tokens = self._ended - before, int(result.num_tokens)
        return {
            "perf/step_s": step_s,
            "perf/data_wait_s": self._got - self._asked,
            "perf/reference_wait_s": min(batch.reference_wait_s, self._got - self._asked),
            "perf/between_steps_s": self._asked - before,
            "perf/pairs_per_s": batch.num_pairs / step_s,
            "perf/tokens_per_s": num_tokens / step_s,
            "perf/mfu": self._operations * num_tokens / (step_s * self._peak_flops),
            **slowest(result.rank_s.tolist()),
        }


def slowest(rank_s: Sequence[float]) -> dict[str, float]:
    """The rank that computed longest, and how long by the median; nothing of one rank, or where nothing was measured.

    Of two ranks the median is the faster one.
    """
    median = statistics.median_low(rank_s)
    if len(rank_s) == 1 or median <= 0:
        return {}
    rank = max(range(len(rank_s)), key=lambda each: rank_s[each])
    return {"perf/slowest_rank": rank, "perf/rank_spread": rank_s[rank] / median}


def check_first_step(config: Config, result: StepResult) -> None:
    """Refuses a run whose policy does not start as the reference's scores say.

    Raises:
        FirstStepError: For some answer the two differ by more than numerics explain.

    Collective: all ranks.
    """
    dist.all_reduce(result.reference_gap, op=dist.ReduceOp.MAX)
    gap = float(result.reference_gap)
    dtypes = (config.model.compute_dtype, config.reference_dtype)
    # Of scores that users bring nobody knows the dtype.
    rough = "bfloat16" in dtypes or bool(config.reference.columns)
    tolerance = FIRST_STEP_TOLERANCE["bfloat16" if rough else "float32"]
    if gap > tolerance:
        raise FirstStepError(
            f"first step: policy and reference differ by {gap:.3g} nats per token for some answer; numerics explain "
            f"{tolerance:g}. The reference is not the policy's start ({config.reference_path} against "
            f"{config.model.path}), or its scores are stale. Mend reference.path, or, where the difference is meant, "
            "set checks.first_step: false"
        )
