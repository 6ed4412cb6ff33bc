"""Sections of the policy's model."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dpo_ray.config.base import Dtype, Section, Uri, refuse_set


class ModelConfig(Section):
    """The policy, and its start."""

    path: Uri = Field(description="transformers directory of the policy's start: a local path or s3://bucket/prefix")
    tokenizer: Uri | None = Field(None, description="directory of the tokenizer; the model's own when null")
    weights_dtype: Dtype = Field(
        "float32", description="dtype of the trained weights; bfloat16 needs optimizer.name: adamw_kahan"
    )
    compute_dtype: Dtype = Field("bfloat16", description="dtype of forward and backward")
    attention: Literal["packed", "sdpa", "eager"] = Field(
        "packed",
        description="packed: pairs side by side without padding, each prompt once; sdpa, eager: transformers' own, "
        "each answer in a padded row",
    )
    gradient_checkpointing: bool | Literal["offload"] = Field(
        False,
        description="compute activations again in backward: less memory, more time; offload: what remains of them "
        "waits in the memory of the host",
    )
    cpu_offload: bool = Field(
        False,
        description="FSDP's: the shards of weights, gradients and optimizer state stay in the host's memory, where the "
        "update runs; for models that would not fit",
    )
    freeze: list[str] = Field(
        [],
        description="weights that are not trained, by regular expressions that occur in their names, e.g. "
        "[embed_tokens, '^model.layers.[0-7][.]']",
    )
    compile: bool = Field(
        False,
        description="compile what is between attention and matrix products (torch.compile); slow first steps",
    )

    @field_validator("freeze")
    @classmethod
    def _are_expressions(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"model.freeze: {pattern!r} is no regular expression: {error}") from None
        return patterns


class AdapterConfig(Section):
    """A LoRA adapter, trained in place of the policy's weights."""

    rank: PositiveInt | None = Field(None, description="rank of a LoRA adapter; null: all weights are trained")
    alpha: PositiveFloat = Field(16.0, description="the adapter's product is scaled by alpha / rank")
    rslora: bool = Field(False, description="scale it by alpha / sqrt(rank) instead (arXiv:2312.03732)")
    dora: bool = Field(
        False, description="DoRA (arXiv:2402.09353): the norm of the weights to each output is trained by itself"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="layers that get one, as peft understands it: all-linear (but the output layer), names, or a "
        "regular expression",
    )
    merge: bool = Field(
        True,
        description="export the model with the adapter merged into it; false: the adapter alone, as peft writes it",
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: QLoRA, the frozen linear layers in 4 bits, whole on each worker; needs the extra "
        "bitsandbytes, and reference.place: adapter_off where there is a reference",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _text_or_names(cls, value: Any) -> Any:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"adapter.target_modules is {value!r}: write all-linear, names such as [q_proj, v_proj], or a regular "
                "expression"
            )
        return value

    @model_validator(mode="after")
    def _nothing_without_a_rank(self) -> AdapterConfig:
        if self.rank is None:
            refuse_set(self, "adapter", "does nothing without adapter.rank: set that, e.g. to 16, or", but="rank")
        return self
