"""Sections of what is minimised."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dpo_ray.config.base import Section, refuse_set
from dpo_ray.objective.losses import LOSSES, PARAMETERS, check_parameters, loss_named


class ObjectiveConfig(Section):
    """The loss."""

    loss: str | dict[str, PositiveFloat] = Field(
        "sigmoid",
        description="one of: " + ", ".join(LOSSES) + "; or a mixture with weights, e.g. {sigmoid: 1.0, sft: 0.2}; or "
        "module:name of a LossSpec of your own",
    )
    beta: PositiveFloat = Field(
        0.1,
        description="strength of the pull towards the reference; cpo, simpo: factor of the log-probabilities, orpo: "
        "weight of the odds ratio",
    )
    label_smoothing: float = Field(0.0, ge=0.0, description="assumed share of flipped labels")
    nll_weight: float = Field(0.0, ge=0.0, description="cpo: weight of the chosen answer's likelihood, 1 in its paper")
    target_margin: float = Field(0.0, ge=0.0, description="simpo: gamma, the margin to reach, 0.3 to 3 in its paper")
    ld_alpha: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="LD-DPO: what a token counts that stands beyond the length of its pair's shortest answer",
    )
    weighting: Literal["wpo"] | None = Field(
        None, description="wpo: a pair weighs as likely as the policy would have given both answers itself"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="what holds the policy to the reference: reverse_kl (DPO), forward_kl, js, alpha"
    )
    f_alpha: float | None = Field(
        None, gt=0.0, lt=1.0, description="f_divergence alpha: between forward_kl (0) and reverse_kl (1), such as 0.5"
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _known_losses(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, dict) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"objective.loss is {value!r}: write the name of a loss, or names with weights such as "
                "{sigmoid: 1.0, sft: 0.2}"
            )
        for name in names:
            try:
                loss_named(name)
            except ValueError as error:
                raise ValueError(f"objective.loss is {error}") from None
        for name, share in value.items() if isinstance(value, dict) else ():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
                raise ValueError(f"objective.loss gives {name} the weight {share!r}: write a number above 0, e.g. 0.2")
        return value

    @model_validator(mode="after")
    def _options_fit(self) -> ObjectiveConfig:
        check_parameters(self.shares, self.model_dump(include=set(PARAMETERS)))
        specs = {name: loss_named(name) for name in self.shares}
        fixed = [name for name, spec in specs.items() if spec.needs_reference and not spec.any_divergence]
        if self.f_divergence != "reverse_kl" and (fixed or not any(spec.any_divergence for spec in specs.values())):
            others = ", ".join(name for name, spec in LOSSES.items() if spec.any_divergence)
            raise ValueError(
                f"objective.f_divergence is {self.f_divergence}, but {', '.join(fixed or specs)} is for reverse_kl "
                f"alone: leave it out, or choose one of {others}"
            )
        if self.f_divergence == "alpha" and self.f_alpha is None:
            raise ValueError("objective.f_divergence is alpha, but f_alpha is null: set it in (0, 1), such as 0.5")
        if self.f_divergence != "alpha" and self.f_alpha is not None:
            raise ValueError(
                f"objective.f_alpha is {self.f_alpha}, but f_divergence: {self.f_divergence} does not use it: leave it "
                "out, or use f_divergence: alpha"
            )
        free = [name for name, spec in specs.items() if not spec.needs_reference]
        if self.ld_alpha != 1.0 and free:
            raise ValueError(
                f"objective.ld_alpha is {self.ld_alpha:g}, but {', '.join(free)} has no log-ratios to a reference, "
                "which it is about: leave it out, or use another loss"
            )
        whole = [name for name, spec in specs.items() if spec.couples_pairs or spec.of_rankings]
        if self.weighting and whole:
            raise ValueError(
                f"objective.weighting is {self.weighting}, but {', '.join(whole)} has no loss of two answers alone "
                "that a weight of theirs could go with: leave it out, or use another loss"
            )
        return self

    @property
    def name(self) -> str:
        """The losses, for people."""
        return " + ".join(self.shares)

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each loss, by name."""
        return self.loss if isinstance(self.loss, dict) else {self.loss: 1.0}

    @property
    def needs_reference(self) -> bool:
        """Whether some loss uses reference scores."""
        return any(loss_named(name).needs_reference for name in self.shares)

    @property
    def chosen_only(self) -> bool:
        """Whether nothing is known or asked of rejected answers: the reference's scores are of all answers."""
        return not self.needs_reference and all(loss_named(name).chosen_only for name in self.shares)


class SftConfig(Section):
    """A start by the likelihood of the chosen answers, before DPO: where they are not the model's own."""

    epochs: PositiveInt | None = Field(
        None, description="passes over the pairs; null: none, and DPO starts from model.path as it is"
    )
    max_steps: PositiveInt | None = Field(None, description="stop after this many of its optimizer steps")
    learning_rate: PositiveFloat = Field(1e-5, description="its peak learning rate")

    @model_validator(mode="after")
    def _nothing_without_epochs(self) -> SftConfig:
        if self.epochs is None:
            refuse_set(self, "sft", "does nothing without sft.epochs: set that, e.g. to 1, or", but="epochs")
        return self
