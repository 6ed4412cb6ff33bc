"""What may differ between a run that was interrupted and the one that goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dpo_ray.config.base import leaves
from dpo_ray.config.run import Config

# What may differ when a run goes on: nothing here changes which pairs a step sees or what is computed from them.
MAY_CHANGE = (
    "storage_path",
    "scaling",
    "recovery",
    "checks",
    "tracking",
    "pairs",
    "evaluation",
    "adapter.merge",
    "reference.place",
    "reference.replicas",
    "reference.devices_per_replica",
    "reference.cpus_per_replica",
    "reference.gpus_per_replica",
    "reference.resources_per_replica",
    "reference.label_selector",
    "reference.tokens_per_microbatch",
    "data.max_reject_fraction",
    "data.label_selector",
    "model.attention",
    "model.gradient_checkpointing",
    "model.cpu_offload",
    "model.compile",
    "train.tokens_per_microbatch",
    "train.eval_every_steps",
    "train.eval_place",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.ledger",
    "train.max_steps",
    "train.epochs",
)


def changed_keys(old: Mapping[str, Any], new: Config) -> list[str]:
    """Keys that differ between a run's stored configuration and a new one, and may not while it goes on.

    Args:
        old: The stored configuration, as plain data.
        new: The configuration given now.

    Returns:
        Lines such as `optimizer.learning_rate: 1e-06 -> 1e-05`.
    """
    with contextlib.suppress(ValidationError):  # A key that has gone since will be told of.
        # A key that has come since has had its default so far.
        old = Config.model_validate(old).model_dump(mode="json")
    before, after = dict(leaves(dict(old))), dict(leaves(new.model_dump(mode="json")))
    different = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    frozen = [key for key in different if not any(key == may or key.startswith(may + ".") for may in MAY_CHANGE)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in frozen]
