"""Sections of the loop, its workers and what it survives."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dpo_ray.config.base import Resources, Section, checked_labels, checked_range, refuse_set

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    """The update."""

    name: Literal["adamw", "rmsprop", "adamw_kahan", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw, rmsprop (the DPO paper's), adamw_kahan (keeps small updates in bfloat16 weights), "
        "adamw_8bit (moments in 8 bits, but those of embeddings and of rows that are no multiple of 256 numbers; needs "
        "the extra bitsandbytes), or muon (for the blocks' matrices, with updates as large as adamw's, which has the "
        "rest)",
    )
    learning_rate: PositiveFloat = Field(1e-6, description="peak learning rate")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "linear", description="schedule of transformers after the warm-up"
    )
    warmup_steps: int | float = Field(
        0, description="steps of linear warm-up; below 1 the share of all steps, rounded up, e.g. 0.1"
    )
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay of matrices (L2 for rmsprop)")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's averaging constants")
    eps: PositiveFloat = Field(1e-8, description="AdamW's and RMSprop's epsilon")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="clip the gradient's global norm; null: do not")

    @field_validator("warmup_steps", mode="before")
    @classmethod
    def _steps_or_a_share(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if not number or value > 1 and value != int(value):
            raise ValueError(f"optimizer.warmup_steps is {value!r}: write a number of steps, or a share such as 0.1")
        return int(value) if value >= 1 else value or 0

    @model_validator(mode="after")
    def _betas_are_adams(self) -> OptimizerConfig:
        if self.name == "rmsprop":
            refuse_set(self, "optimizer", "does nothing with optimizer.name: rmsprop, which has none:", ["betas"])
        return self

    @model_validator(mode="after")
    def _warmup_needs_a_schedule(self) -> OptimizerConfig:
        if self.warmup_steps and self.schedule == "constant":
            raise ValueError(
                "optimizer.warmup_steps does nothing with schedule: constant; use schedule: constant_with_warmup"
            )
        return self


class TrainConfig(Section):
    """The loop."""

    global_batch_pairs: PositiveInt = Field(64, description="pairs per optimizer step, whatever the number of workers")
    tokens_per_microbatch: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="tokens (prompt once) of one forward and backward pass on one worker; auto: as many as the GPU's "
        "memory holds, measured once (2048 on a CPU). Running out of memory leads to fewer, not to a crash",
    )
    epochs: PositiveInt = Field(1, description="passes over the pairs")
    max_steps: PositiveInt | None = Field(None, description="stop after this many optimizer steps")
    eval_every_steps: PositiveInt | None = Field(
        None, description="evaluate on the held-out pairs this often, and at the end"
    )
    eval_place: Literal["workers", "actors"] = Field(
        "workers",
        description="workers: training stops for it; actors: training goes on, and what is like a replica of the "
        "reference (reference.devices_per_replica, ...) evaluates a checkpoint of that step",
    )
    checkpoint_every_steps: PositiveInt = Field(50, description="checkpoint this often, and at the end")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_best: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"] | None = Field(
        None, description="also keep a checkpoint of the evaluation with the best value of this metric"
    )
    ledger: Literal["digest", "full"] = Field("digest", description="per step a digest of the pair ids, or all of them")

    @model_validator(mode="after")
    def _place_needs_evaluations(self) -> TrainConfig:
        if self.eval_place == "actors" and not self.eval_every_steps:
            raise ValueError(
                "train.eval_place is actors, but nothing is ever evaluated: set train.eval_every_steps, or leave "
                "train.eval_place out"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> TrainConfig:
        if self.keep_best and not self.eval_every_steps:
            raise ValueError(
                f"train.keep_best is {self.keep_best}, but nothing is ever evaluated: set train.eval_every_steps"
            )
        return self


class WorkerRange(Section):
    """How many workers an elastic run may have."""

    min: PositiveInt = Field(description="fewer are waited for")
    max: PositiveInt = Field(description="more are not asked for")


class ScalingConfig(Section):
    """The policy's workers."""

    workers: PositiveInt | WorkerRange = Field(
        1,
        description="policy workers, over which the weights are sharded; {min: 2, max: 8} takes what there is, shrinks "
        "when nodes go, and grows when they come, at the exact next global batch",
    )
    cpus_per_worker: PositiveFloat = Field(
        1.0, description="CPUs of one worker; also its compute threads without a GPU"
    )
    gpus_per_worker: Literal[0, 1] = Field(0, description="GPUs of one worker")
    shard_over: Literal["all", "node"] | PositiveInt = Field(
        "all",
        description="workers that share one copy of the weights: all; node: those of a node, which then gather weights "
        "within it and sum gradients beyond it; or so many; where they cannot be divided so, all",
    )
    resources_per_worker: Resources = Field({}, description="custom Ray resources, e.g. {policy: 1}")
    label_selector: dict[str, str] = Field(
        {}, description="labels that a worker's node must have, e.g. {ray.io/accelerator-type: H100}"
    )
    grow_after_s: PositiveFloat = Field(
        30.0, description="an elastic run grows when there has been room for more workers this long"
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        return checked_range("scaling.workers", value)

    @field_validator("shard_over", mode="before")
    @classmethod
    def _word_or_number(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not number and value not in ("all", "node"):
            raise ValueError(f"scaling.shard_over is {value!r}: write all, node, or a number of workers such as 8")
        return value

    @field_validator("label_selector")
    @classmethod
    def _labels_are_plain(cls, labels: dict[str, str]) -> dict[str, str]:
        return checked_labels("scaling.label_selector", labels)

    @model_validator(mode="after")
    def _range_in_order(self) -> ScalingConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"scaling.workers: min is {self.min_workers}, more than max ({self.max_workers})")
        return self

    @model_validator(mode="after")
    def _grows_where_it_may(self) -> ScalingConfig:
        if self.min_workers == self.max_workers:
            why = f"does nothing with scaling.workers: {self.max_workers}: write {{min: ..., max: ...}} there, or"
            refuse_set(self, "scaling", why, ["grow_after_s"])
        return self

    @model_validator(mode="after")
    def _makes_groups(self) -> ScalingConfig:
        size, least, most = self.shard_over, self.min_workers, self.max_workers
        if isinstance(size, int) and most // size * size < max(least, 2 * size):
            workers = f"{most}" if least == most else f"{least} to {most}"
            raise ValueError(
                f"scaling.shard_over is {size}, but scaling.workers ({workers}) is never several groups of {size}: "
                "write a smaller number that divides the workers, node, or all"
            )
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that may train."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_workers(self) -> int:
        """The most workers that may train."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    def group_of(self, nodes: Sequence[Hashable]) -> int:
        """How many workers share a copy of the weights, one after the other: all where groups would not be alike.

        Args:
            nodes: Where each worker is, in the order of their ranks.
        """
        size = len(nodes)
        if self.shard_over == "node":
            on_each = [len(list(own)) for _, own in itertools.groupby(nodes)]
            # Of equal size, and no node twice.
            size = on_each[0] if len(set(on_each)) == 1 and len(on_each) == len(set(nodes)) else size
        elif self.shard_over != "all" and size % self.shard_over == 0:
            size = self.shard_over
        return size


class RecoveryConfig(Section):
    """What a run survives by itself. Limits count failures since the last new checkpoint; -1: no limit."""

    max_worker_failures: int = Field(3, ge=-1, description="exceptions and deaths of worker processes")
    max_node_failures: int = Field(20, ge=-1, description="nodes that died with workers on them")
    max_hangs: int = Field(3, ge=-1, description="worker groups that stood still")
    max_storage_failures: int = Field(20, ge=-1, description="outages longer than the storage was waited for")
    max_ray_failures: int = Field(5, ge=-1, description="groups that Ray could not start, or whose controller died")
    max_reference_failures: int = Field(
        20,
        ge=-1,
        description="replicas lost since the last chunk scored, or checkpoint evaluated, or over the same one; and how "
        "often each actor of `pairs` and `evaluate` is started again",
    )
    hang_timeout_s: PositiveFloat = Field(
        900.0, description="a group stands still when no step, evaluation or load ends in this time on some worker"
    )


class ChecksConfig(Section):
    """Checks that stop a run that would be wrong."""

    first_step: bool = Field(
        True, description="refuse to go on when the policy does not start as the reference's scores say"
    )


TRACKER_NAMES = ("tensorboard", "wandb", "mlflow")


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    trackers: list[str] = Field(
        ["tensorboard"],
        description="tensorboard, wandb, mlflow; credentials come from their own environment variables; or module:name "
        "of a Tracker of your own",
    )
    project: str = Field("dpo_ray", description="W&B project, MLflow experiment")

    @field_validator("trackers")
    @classmethod
    def _trackers_are_known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in TRACKER_NAMES and ":" not in name:
                raise ValueError(
                    f"tracking.trackers names {name!r}: write {', '.join(TRACKER_NAMES)}, or module:name of a Tracker "
                    "of your own"
                )
        return names

    @model_validator(mode="after")
    def _project_is_somebodys(self) -> TrackingConfig:
        if not {"wandb", "mlflow"} & set(self.trackers) and not self.own:
            why = f"does nothing with tracking.trackers: {self.trackers}: add wandb or mlflow there, or"
            refuse_set(self, "tracking", why, ["project"])
        return self

    @property
    def own(self) -> list[str]:
        """Trackers of the user's own, as `module:name`."""
        return [name for name in self.trackers if ":" in name]
