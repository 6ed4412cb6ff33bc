"""READ THIS FIRST: the training loop.

Every rank runs `train`. It knows nothing of Ray: batches, rank and the place to start from come in a `WorkerContext`.
"""

from __future__ import annotations

import math
import time
from functools import partial

import torch
from torch import nn

from dpo_ray.config import Config
from dpo_ray.errors import FirstStepError, NonFiniteLossError
from dpo_ray.model.export import export
from dpo_ray.model.shard import sharded_policy
from dpo_ray.objective.losses import LOSSES
from dpo_ray.objective.rewards import finish_metrics
from dpo_ray.training import checkpoint
from dpo_ray.training.optimizer import build_optimizer, learning_rate_at
from dpo_ray.training.record import Recorder
from dpo_ray.training.step import Loss, StepResult, eval_step, train_step
from dpo_ray.types import GlobalBatch, TrainState, WorkerContext

# Largest |policy - reference| per token that numerics alone explain at the first step, in nats.
FIRST_STEP_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}


def train(config: Config, context: WorkerContext) -> None:
    """Trains from the attempt's position to the end, and exports the model.

    Raises:
        FirstStepError: At the run's first step the policy does not score the answers as the reference did.
        NonFiniteLossError: A global batch gave a loss that is not finite.

    Collective: all ranks.
    """
    m = config.model
    model = sharded_policy(
        m.path, m.weights_dtype, m.compute_dtype, m.attention, m.gradient_checkpointing, context.device
    )
    optimizer = build_optimizer(model, config.optimizer)
    learning_rate = learning_rate_at(config.optimizer, context.total_steps)
    loss = _loss(config)
    attempt, state = context.attempt, TrainState()
    if attempt.checkpoint is not None:
        state = checkpoint.load(config.run_uri, attempt.checkpoint, model, optimizer)
    recorder = None
    if context.rank == 0:
        recorder = Recorder(
            config.run_uri, state.step, attempt.attempt, context.world_size, config.train.ledger, context.publish
        )

    finished = time.perf_counter()
    for batch in context.batches:
        assert batch.step == state.step + 1, f"the stream gave step {batch.step} after {state.step}"
        waited = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        result = train_step(model, optimizer, batch, loss, config.objective.beta, config.optimizer.max_grad_norm)
        state.step, state.num_tokens = batch.step, state.num_tokens + int(result.num_tokens)
        line = _line(config, state, batch, result, learning_rate(batch.step - 1), context.steps_per_epoch)
        if state.step == 1 and config.checks.first_step:
            _check_first_step(config, float(result.reference_gap))
        now = time.perf_counter()
        if recorder is not None:
            recorder.step({**line, **_speed(batch, result, waited - finished, now - finished)}, batch.pair_ids)
        finished = now
        last = state.step == context.total_steps
        if _due(state.step, config.train.eval_every_steps, last):
            line = evaluate(model, context, loss, config.objective.beta, state.step)
            if recorder is not None:
                recorder.line(line)
        if _due(state.step, config.train.checkpoint_every_steps, last):
            if recorder is not None:
                recorder.flush()  # Before the commit: a checkpoint promises the lines up to its step.
            checkpoint.save(config.run_uri, model, optimizer, state, attempt.attempt, config.train.keep_checkpoints)
    export(model, config, state.step, context.rank)


def evaluate(model: nn.Module, context: WorkerContext, loss: Loss, beta: float, step: int) -> dict[str, float]:
    """Metrics on the held-out pairs, named with the prefix `eval_`.

    Collective: all ranks.
    """
    started = time.perf_counter()
    sums = [eval_step(model, batch, loss, beta).sums for batch in context.eval_batches()]
    metrics = {f"eval_{name}": value for name, value in finish_metrics(torch.stack(sums).sum(0)).items()}
    return {"step": step, **metrics, "eval_perf/seconds": time.perf_counter() - started}


def _loss(config: Config) -> Loss:
    spec = LOSSES[config.objective.loss]
    values = config.objective.model_dump()
    return partial(spec.fn, **{name: values[name] for name in sorted(spec.parameters)})


def _due(step: int, every: int | None, last: bool) -> bool:
    return every is not None and (step % every == 0 or last)


def _line(
    config: Config, state: TrainState, batch: GlobalBatch, result: StepResult, rate: float, steps_per_epoch: int
) -> dict[str, float]:
    """One line of metrics.jsonl, without speed.

    Raises:
        NonFiniteLossError: The loss or the gradient is not finite.
    """
    metrics = finish_metrics(result.sums)
    grad_norm = float(result.grad_norm) if result.grad_norm is not None else 0.0
    if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
        raise NonFiniteLossError(
            f"step {batch.step}: loss {metrics['loss']}, gradient norm {grad_norm}; nothing of this step was kept. "
            f"Lower optimizer.learning_rate (now {rate:g}) or look at the pairs of this batch: "
            + ", ".join(pair_id.hex() for pair_id in batch.pair_ids)
        )
    return {
        "step": state.step,
        "epoch": state.step / steps_per_epoch,
        **metrics,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "num_tokens": state.num_tokens,
    }


def _speed(batch: GlobalBatch, result: StepResult, data_wait_s: float, step_s: float) -> dict[str, float]:
    """Throughput between two optimizer steps: data wait, evaluation and checkpoint included."""
    return {
        "perf/step_s": step_s,
        "perf/data_wait_s": data_wait_s,
        "perf/pairs_per_s": batch.num_pairs / step_s,
        "perf/tokens_per_s": int(result.num_tokens) / step_s,
    }


def _check_first_step(config: Config, gap: float) -> None:
    tolerance = FIRST_STEP_TOLERANCE[
        "bfloat16" if "bfloat16" in (config.model.compute_dtype, config.reference_dtype) else "float32"
    ]
    if gap > tolerance:
        raise FirstStepError(
            f"first step: policy and reference differ by {gap:.3g} nats per token for some answer; numerics explain "
            f"{tolerance:g}. The reference is not the policy's start ({config.reference_path} against "
            f"{config.model.path}), or its scores are stale. Mend reference.path, or, where the difference is meant, "
            "set checks.first_step: false"
        )
