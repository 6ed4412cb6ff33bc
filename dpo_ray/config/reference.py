"""The section of the reference model."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dpo_ray.config.base import Dtype, Resources, Section, Uri, checked_labels, checked_range, refuse_set, two_columns


class ReplicaRange(Section):
    """How many replicas of the reference there may be."""

    min: PositiveInt = Field(description="kept while there is work")
    max: PositiveInt = Field(description="more are not asked for")


class ReferenceConfig(Section):
    """The reference model, an inference-only service beside the trainer."""

    path: Uri | None = Field(None, description="transformers directory of the reference; model.path when null")
    dtype: Dtype | None = Field(None, description="dtype of the scoring; model.compute_dtype when null")
    place: Literal["actors", "adapter_off", "store_only", "none"] = Field(
        "actors",
        description="actors: what has no scores is scored beside training; adapter_off: by the policy without its "
        "adapter, between steps; store_only: refuse to start where scores are missing; none: no reference at all, for "
        "objectives that need none",
    )
    columns: list[str] | None = Field(
        None,
        description="columns of the data that bring the reference's scores, the sum over an answer's tokens, best "
        "answer first, e.g. [ref_chosen_logps, ref_rejected_logps]: only a sample is scored, to check them",
    )
    sync_steps: PositiveInt | None = Field(
        None,
        description="TR-DPO: after every so many steps the reference becomes a mixture of itself and the policy, and "
        "what the next steps need is scored anew; null: it stays as it is",
    )
    mixup_alpha: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the policy in that mixture; 1: a copy of the policy"
    )
    replicas: PositiveInt | ReplicaRange = Field(
        1,
        description="copies of the reference while chunks remain to be scored; {min: 1, max: 8} follows the trainer's "
        "need",
    )
    devices_per_replica: PositiveInt = Field(
        1, description="actors over which the weights of one replica are sharded, for a model larger than one device"
    )
    cpus_per_replica: PositiveFloat = Field(1.0, description="CPUs of one replica")
    gpus_per_replica: float = Field(
        0.0,
        ge=0.0,
        description="GPUs of one replica, as many as its devices, or 0; to be set where scaling.gpus_per_worker is 1",
    )
    resources_per_replica: Resources = Field({}, description="custom Ray resources, e.g. {reference: 1}")
    label_selector: dict[str, str] = Field(
        {}, description="labels that a replica's nodes must have, e.g. {ray.io/accelerator-type: A10G}"
    )
    tokens_per_microbatch: PositiveInt = Field(8192, description="tokens that a device scores in one forward pass")

    @field_validator("replicas", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        return checked_range("reference.replicas", value)

    @field_validator("columns")
    @classmethod
    def _one_for_each_answer(cls, columns: list[str] | None) -> list[str] | None:
        return two_columns("reference.columns", columns, "[ref_chosen_logps, ref_rejected_logps]")

    @field_validator("label_selector")
    @classmethod
    def _labels_are_plain(cls, labels: dict[str, str]) -> dict[str, str]:
        return checked_labels("reference.label_selector", labels)

    @model_validator(mode="after")
    def _moves_or_not(self) -> ReferenceConfig:
        if self.sync_steps is None:
            if self.mixup_alpha != 1.0:
                raise ValueError(
                    f"reference.mixup_alpha is {self.mixup_alpha:g}, which does nothing without reference.sync_steps: "
                    "set it too, e.g. to 512, or leave reference.mixup_alpha out"
                )
            return self
        standing = {"place": self.place != "actors", "columns": bool(self.columns), "path": self.path is not None}
        for key in (key for key, is_set in standing.items() if is_set):
            raise ValueError(
                f"reference.sync_steps is {self.sync_steps}, but reference.{key} {getattr(self, key)}: a reference "
                f"that follows the policy begins as it, and is scored as it moves; leave reference.{key} out, or "
                "reference.sync_steps"
            )
        return self

    @model_validator(mode="after")
    def _none_has_no_options(self) -> ReferenceConfig:
        if self.place == "none":
            refuse_set(self, "reference", "does nothing with reference.place: none:", but="place")
        return self

    @model_validator(mode="after")
    def _devices_agree(self) -> ReferenceConfig:
        if self.least_replicas > self.most_replicas:
            raise ValueError(f"reference.replicas: min is {self.least_replicas}, more than max ({self.most_replicas})")
        if self.devices_per_replica > 1 and self.gpus_per_replica not in (0, self.devices_per_replica):
            raise ValueError(
                f"reference.gpus_per_replica is {self.gpus_per_replica:g}, but reference.devices_per_replica "
                f"{self.devices_per_replica}: a replica on GPUs needs one for each of its devices; set both alike"
            )
        if self.devices_per_replica == 1 and self.gpus_per_replica > 1:
            raise ValueError(
                f"reference.gpus_per_replica is {self.gpus_per_replica:g}: one device uses one GPU; set "
                f"reference.devices_per_replica: {math.ceil(self.gpus_per_replica)} too, to shard the model over them"
            )
        return self

    @property
    def least_replicas(self) -> int:
        """Replicas kept while there is work."""
        return self.replicas.min if isinstance(self.replicas, ReplicaRange) else self.replicas

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be."""
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas
