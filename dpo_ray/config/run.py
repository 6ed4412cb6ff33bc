"""A whole run: its sections, and what they ask of each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from dpo_ray.config.answers import EvaluationConfig, PairsConfig
from dpo_ray.config.base import Dtype, Section, Uri, leaves
from dpo_ray.config.data import DataConfig
from dpo_ray.config.model import AdapterConfig, ModelConfig
from dpo_ray.config.objective import ObjectiveConfig, SftConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.config.training import (
    ChecksConfig,
    OptimizerConfig,
    RecoveryConfig,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)
from dpo_ray.errors import ConfigError
from dpo_ray.objective.losses import LOSSES, loss_named
from dpo_ray.redaction import secret_in

_OF_A_REPLICA = {
    *("devices_per_replica", "cpus_per_replica", "gpus_per_replica", "resources_per_replica", "label_selector"),
    "tokens_per_microbatch",
}


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run, and of its folder")
    storage_path: Uri = Field(
        description="where runs and stores live: a path that all nodes share, or s3://bucket/prefix"
    )
    seed: int = Field(
        0, ge=0, description="decides the order of the pairs, an adapter's start, sampled answers and resampling"
    )
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sft: SftConfig = SftConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    checks: ChecksConfig = ChecksConfig()
    tracking: TrackingConfig = TrackingConfig()
    pairs: PairsConfig = PairsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, raw: Any) -> Any:
        # Before anything else, whose message might show what is written.
        if isinstance(raw, Mapping):
            _refuse_secrets(raw)
        return raw

    @model_validator(mode="before")
    @classmethod
    def _actors_have_what_workers_have(cls, raw: Any) -> Any:
        # In plain sight: a run's configuration says what was resolved.
        gpus = raw["scaling"].get("gpus_per_worker") if isinstance(raw, Mapping) and _is_section(raw, "scaling") else 0
        for name in ("pairs", "evaluation") if gpus == 1 else ():
            if _is_section(raw, name) or name not in raw:
                raw = {**raw, name: {"gpus_per_actor": 1.0, **raw.get(name, {})}}
        return raw

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if self.train.global_batch_pairs < self.scaling.max_workers:
            raise ValueError(
                f"train.global_batch_pairs is {self.train.global_batch_pairs}, fewer than scaling.workers "
                f"({self.scaling.max_workers}): some workers would have no pair; raise the batch or lower the workers"
            )
        self._check_policy()
        self._check_reference()
        self._check_moving_reference()
        self._check_margins()
        self._check_start()
        self._check_evaluations()
        return self

    def _check_policy(self) -> None:
        if self.model.weights_dtype == "bfloat16" and self.optimizer.name != "adamw_kahan":
            raise ValueError(
                f"model.weights_dtype: bfloat16 with optimizer.name: {self.optimizer.name} would lose the training: at "
                "DPO's learning rates nearly every update is smaller than half a bfloat16 step and rounds to nothing; "
                "use optimizer.name: adamw_kahan, or model.weights_dtype: float32 (compute can stay in bfloat16)"
            )
        if self.model.weights_dtype == "bfloat16" and self.model.compute_dtype == "float32":
            raise ValueError("model.weights_dtype: bfloat16 needs model.compute_dtype: bfloat16")
        if self.model.freeze and self.adapter.rank is not None:
            raise ValueError(
                f"model.freeze is {self.model.freeze}, but with adapter.rank {self.adapter.rank} all of the model's "
                "own weights are frozen: leave one of them out"
            )
        if self.model.compile and self.model.gradient_checkpointing:
            raise ValueError(
                "model.compile: true does nothing with model.gradient_checkpointing, which runs blocks uncompiled; use "
                "one of them"
            )
        if not self.scaling.gpus_per_worker:
            needless = "does nothing without scaling.gpus_per_worker: 1, since all is in the host's memory already; use"
            if self.model.gradient_checkpointing == "offload":
                raise ValueError(f"model.gradient_checkpointing: offload {needless} true")
            if self.model.cpu_offload:
                raise ValueError(f"model.cpu_offload: true {needless} false")
        if self.model.cpu_offload and self.optimizer.name == "muon":
            raise ValueError(
                "optimizer.name is muon, but with model.cpu_offload: true its products of whole matrices would run on "
                "the CPU, longer than all else of a step: leave one of them out"
            )

    def _check_reference(self) -> None:
        if self.reference.place == "none" and self.needs_reference:
            without = ", ".join(name for name, loss in LOSSES.items() if not loss.needs_reference)
            raise ValueError(
                f"reference.place is none, but objective.loss: {self.objective.name} needs a reference: use "
                f"reference.place: actors, or an objective without one: {without}"
            )
        if self.reference.place not in ("actors", "none") and not self.needs_reference:
            raise ValueError(
                f"reference.place is {self.reference.place}, but objective.loss: {self.objective.name} has no "
                "reference: leave it out, or use none"
            )
        unsaid = "gpus_per_replica" not in self.reference.model_fields_set
        if self.scaling.gpus_per_worker and self.needs_reference and self.reference.place == "actors" and unsaid:
            raise ValueError(
                "scaling.gpus_per_worker is 1, and reference.gpus_per_replica is not set: set it to 1, for a GPU "
                "beyond those of the workers, or to 0, for CPUs. Where the workers take all GPUs, run `dpo-ray "
                "reference` first, which then has them, and `dpo-ray train` when it is done"
            )
        if self.reference.columns and self.needs_token_scores:
            raise ValueError(
                f"objective.ld_alpha is {self.objective.ld_alpha:g}, which needs the reference's scores of each token; "
                "reference.columns brings sums over answers: leave one of them out"
            )
        for key in ("columns", "sync_steps"):
            if getattr(self.reference, key) and not self.needs_reference:
                raise ValueError(
                    f"reference.{key} is set, but objective.loss: {self.objective.name} has no reference: leave it out"
                )
        if self.adapter.quantize and self.needs_reference and self.reference.place != "adapter_off":
            raise ValueError(
                f"adapter.quantize is {self.adapter.quantize}, but reference.place: {self.reference.place} has scores "
                "of weights that are not quantized, and those are not the policy's start: set reference.place: "
                "adapter_off"
            )
        if self.reference.place == "adapter_off":
            self._check_own_reference()

    def _check_moving_reference(self) -> None:
        if self.reference.sync_steps is None:
            return
        if "bco_pair" in self.objective.shares:
            raise ValueError(
                f"reference.sync_steps is {self.reference.sync_steps}, but objective.loss: {self.objective.name} holds "
                "rewards against the mean of all rewards before, which those against another reference have no part "
                "in: leave one of them out"
            )
        if self.train.eval_place == "actors":
            raise ValueError(
                f"train.eval_place is actors, but with reference.sync_steps: {self.reference.sync_steps} the reference "
                "moves on while they evaluate, and nobody scores held-out pairs with the one before: use "
                "train.eval_place: workers"
            )
        if self.adapter.rank is not None:
            raise ValueError(
                f"reference.sync_steps is {self.reference.sync_steps}, but adapter.rank {self.adapter.rank}: a mixture "
                "of two adapters' matrices is not the mixture of the two models; leave one of them out"
            )

    def _check_evaluations(self) -> None:
        if self.train.eval_every_steps and not (self.data.eval or self.data.eval_fraction):
            raise ValueError(
                "train.eval_every_steps is set, but nothing is held out: set data.eval or data.eval_fraction"
            )
        if self.train.keep_best and self.train.keep_best != "eval_loss" and not self.needs_reference:
            raise ValueError(
                f"train.keep_best is {self.train.keep_best}, but objective.loss: {self.objective.name} has no "
                "reference and so no rewards: use keep_best: eval_loss"
            )
        if self.reference.place == "none" and self.train.eval_place == "actors":
            raise ValueError(
                "train.eval_place is actors, but with reference.place: none nothing says what they are to have "
                "(reference.gpus_per_replica, ...): leave reference.place out, or use train.eval_place: workers"
            )

    def _check_start(self) -> None:
        if self.sft.epochs is None:
            return
        if self.objective.chosen_only:
            raise ValueError(
                f"sft.epochs is {self.sft.epochs}, but objective.loss: {self.objective.name} is such a start already: "
                "leave one of them out"
            )
        for key in ("path", "columns"):
            value = getattr(self.reference, key)
            if value is not None and (self.checks.first_step or self.reference.place == "adapter_off"):
                raise ValueError(
                    f"reference.{key} is {value!r}, but with sft.epochs: {self.sft.epochs} the policy starts from a "
                    "model that this run makes, which is then the reference too: leave it out; or, for another "
                    "reference in actors, set checks.first_step: false"
                )

    def _check_margins(self) -> None:
        parts = {name: loss_named(name) for name in self.objective.shares}
        without = [name for name, loss in parts.items() if loss.needs_reference and not loss.takes_margins]
        unused = without or not any(loss.takes_margins for loss in parts.values())
        # A start by likelihood has the pairs of what follows.
        if self.data.margin_column and unused and parts.keys() != {"sft"}:
            takes = ", ".join(name for name, loss in LOSSES.items() if loss.takes_margins)
            raise ValueError(
                f"data.margin_column is {self.data.margin_column!r}, but objective.loss: {', '.join(without or parts)} "
                f"has no place for a margin: leave it out, or use {takes}"
            )

    def _check_own_reference(self) -> None:
        own, mend = self.reference, "leave it out, or set reference.place: actors"
        if self.adapter.rank is None:
            raise ValueError(
                "reference.place is adapter_off, but adapter.rank is null: the policy has no adapter, without which it "
                "would be the reference; set adapter.rank, or reference.place: actors"
            )
        if own.path not in (None, self.model.path):
            raise ValueError(
                f"reference.path is {own.path!r}, but with reference.place: adapter_off the reference is the policy's "
                f"start, {self.model.path}: {mend}"
            )
        if own.dtype not in (None, self.model.compute_dtype):
            raise ValueError(
                f"reference.dtype is {own.dtype}, but with reference.place: adapter_off the policy scores, in "
                f"model.compute_dtype: {self.model.compute_dtype}: {mend}"
            )
        if own.columns:
            raise ValueError(
                f"reference.columns is {own.columns}, but nobody checks a sample of them with reference.place: "
                f"adapter_off: {mend}"
            )

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is."""
        return self.model.tokenizer or self.model.path

    @property
    def reference_path(self) -> str:
        """Where the reference's weights are."""
        return self.reference.path or self.model.path

    @property
    def reference_dtype(self) -> Dtype:
        """The dtype that the reference scores in."""
        return self.reference.dtype or self.model.compute_dtype

    @property
    def needs_reference(self) -> bool:
        """Whether the objective uses reference scores at all."""
        return self.objective.needs_reference

    @property
    def needs_token_scores(self) -> bool:
        """Whether it needs those of each token, and not only their sums over answers."""
        return self.objective.ld_alpha != 1.0

    def start(self) -> Config:
        """The run that makes the start by likelihood."""
        changes: dict[str, Any] = {
            "name": f"{self.name}-sft",
            "objective": {"loss": "sft"},
            # Who evaluates beside training is like a replica of the reference.
            "reference": self.reference.model_dump(include=_OF_A_REPLICA),
            "sft": {},
            "optimizer": {**self.optimizer.model_dump(), "learning_rate": self.sft.learning_rate},
            "train": {**self.train.model_dump(), "epochs": self.sft.epochs, "max_steps": self.sft.max_steps},
        }
        if self.train.keep_best:
            changes["train"]["keep_best"] = "eval_loss"
        if self.adapter.rank is not None:
            changes["adapter"] = {**self.adapter.model_dump(), "merge": True}
        return Config.model_validate({**self.model_dump(), **changes})

    def after_start(self) -> Config:
        """The run that goes on from there: its model is the policy's start, and the reference where none is named."""
        path, tokenizer = f"{self.start().run_uri}/export", self.tokenizer_path
        model = {**self.model.model_dump(), "path": path, "tokenizer": tokenizer}
        return Config.model_validate({**self.model_dump(), "model": model})

    @property
    def own_code(self) -> list[str]:
        """Losses and formats of the user's own, as `module:name`: what decides the numbers."""
        return [name for name in (*self.objective.shares, self.data.format) if ":" in name]

    @property
    def run_uri(self) -> str:
        """The run directory."""
        return f"{self.storage_path.rstrip('/')}/{self.name}"

    @property
    def store_uri(self) -> str:
        """Where the stores live, beside the runs."""
        return f"{self.storage_path.rstrip('/')}/store"


def _is_section(raw: Mapping[str, Any], name: str) -> bool:
    return isinstance(raw.get(name), Mapping)


def _refuse_secrets(raw: Mapping[str, Any]) -> None:
    """Refuses what would stand in the run's folder, in logs and at trackers; what it was is not said here either.

    Raises:
        ConfigError: A URI has a secret in it, or something a secret of the environment.
    """
    for key, value in leaves(raw):
        for text in (key, *(value if isinstance(value, list) else [value])):
            if isinstance(text, str) and (secret := secret_in(text)):
                # A mixture has its URIs as keys.
                place = re.sub(r"[.][^.]*://.*", "", key)
                raise ConfigError(
                    f"{place}: {secret}, which would be written down with the configuration; leave it out, and give "
                    "credentials by the environment of all nodes "
                    "(AWS_ACCESS_KEY_ID, ...), by roles, or by fsspec's configuration files"
                )
