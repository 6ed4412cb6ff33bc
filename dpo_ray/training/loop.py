"""READ THIS FIRST: the training loop.

Every rank runs `train`. It knows nothing of Ray: batches, rank and the place to start from come in a `WorkerContext`.
"""

from __future__ import annotations

from contextlib import nullcontext

from dpo_ray.config import Config
from dpo_ray.model.export import export
from dpo_ray.model.shard import sharded_policy
from dpo_ray.training.budget import Budget
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.evaluate import evaluate
from dpo_ray.training.evaluations import is_due
from dpo_ray.training.metrics import Stopwatch, check_first_step, count_pairs, step_line
from dpo_ray.training.moving import MovingReference
from dpo_ray.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from dpo_ray.training.own_reference import with_own_reference
from dpo_ray.training.record import Recorder
from dpo_ray.training.step import objective_of, train_step
from dpo_ray.types import WAITING, TrainState, WorkerContext


def train(config: Config, context: WorkerContext) -> None:
    """Trains from the attempt's position to the end, and exports the model; or, when asked to leave, up to there.

    Raises:
        FirstStepError: At the run's first step the policy does not score the answers as the reference did.
        NonFiniteLossError: A global batch gave a loss that is not finite.
        OutOfMemoryError: The next attempt will have smaller microbatches.
        CheckpointError: The attempt's checkpoint is damaged: the next attempt will use the one before.

    Collective: all ranks.
    """
    with Recorder(config, context) if context.rank == 0 else nullcontext() as recorder:
        _train(config, context, recorder)


def _train(config: Config, context: WorkerContext, recorder: Recorder | None) -> None:
    doing, attempt, total_steps = context.control.doing, context.attempt, context.total_steps
    doing("loading the model")
    model = sharded_policy(config.model, context.device, config.adapter, config.seed, context.group)
    budget = Budget(config, context)
    tokens_per_microbatch = budget.settle(model)
    optimizer = build_optimizer(model, config.optimizer, config.model.compute_dtype)
    learning_rate = learning_rate_at(config.optimizer, total_steps)
    objective = objective_of(config.objective)
    keep, keep_best = config.train.keep_checkpoints, config.train.keep_best
    reference = MovingReference(model, config.reference, attempt.attempt)
    with Checkpointer(
        config.run_uri, model, optimizer, attempt.attempt, keep, keep_best, reference.tensors, recorder
    ) as checkpoints:
        doing("loading the checkpoint")
        state = checkpoints.load(attempt.checkpoint) if attempt.checkpoint else TrainState()
        context = with_own_reference(config, context, model, tokens_per_microbatch, budget)
        watch = Stopwatch(model, config, context)
        doing(WAITING)
        watch.asked()
        for batch in context.batches(tokens_per_microbatch):
            watch.got()
            assert batch.step == state.step + 1, f"the stream gave step {batch.step} after {state.step}"
            doing(f"step {batch.step}")
            rate = learning_rate(state.step)
            set_learning_rate(optimizer, rate)
            clip, leave = config.optimizer.max_grad_norm, context.control.leaving()
            with budget.watched(batch):
                result = train_step(model, optimizer, batch, objective.at(state), clip, leave, budget.reduce_each)
            state.step, state.num_tokens = batch.step, state.num_tokens + int(result.num_tokens)
            line = step_line(context, state, batch, result, rate)
            count_pairs(state, batch, line)
            if state.step == 1 and config.checks.first_step:
                check_first_step(config, result)
            speed = watch.step(batch, result)
            if recorder is not None:
                recorder.step({**line, **speed}, batch.pair_ids)
            last, someone_leaves = state.step == total_steps, bool(result.leaving)
            evaluation_due, best = is_due(config.train, state.step, total_steps), False
            by_actors = evaluation_due and config.train.eval_place == "actors"  # They read a checkpoint.
            if evaluation_due and not by_actors:
                with budget.watched():
                    line = evaluate(model, context, objective.at(state), state.step, tokens_per_microbatch)
                best = checkpoints.take_best(state, line)
                if recorder is not None:
                    recorder.line(line)
            moved = reference.follow(state)
            scheduled = state.step % config.train.checkpoint_every_steps == 0
            if scheduled or last or someone_leaves or best or by_actors or moved:
                doing(f"checkpoint of step {state.step}")
                checkpoints.save(state, wait=moved)  # Whoever scores for the next steps reads it.
            if someone_leaves and not last:
                break
            doing(WAITING)
            watch.asked()
        doing("the last checkpoint")
    if state.step >= total_steps:  # More, where a run was given less to do than it had done.
        doing("export")
        export(model, config, state.step, context.rank, context.fence)
