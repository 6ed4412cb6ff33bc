"""The configuration: one YAML file, read into frozen pydantic models that refuse unknown keys.

Every field's description is the comment that `dpo-ray config --template` prints.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from dpo_ray.errors import ConfigError
from dpo_ray.objective.losses import LOSSES, PARAMETERS, check_parameters, loss_named
from dpo_ray.pairs.formats import FORMATS, Role
from dpo_ray.redaction import secret_in

Dtype = Literal["float32", "bfloat16"]


# Arguments of transformers' apply_chat_template that a template does not see, or that the data decide.
_NOT_THE_TEMPLATES = {
    *("conversation", "messages", "chat_template", "tools", "documents", "tokenizer_kwargs", "tokenize", "padding"),
    *("add_generation_prompt", "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}


def _absolute(uri: str) -> str:
    # Tasks and actors have working directories of their own.
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


Uri = Annotated[str, AfterValidator(_absolute)]
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# A label's value, its name, and the name's prefix, as Ray and Kubernetes have them.
_LABEL = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?")


def _checked_range(key: str, value: Any) -> Any:
    """A number or a range, else one message in place of pydantic's for each of the two."""
    number = isinstance(value, int) and not isinstance(value, bool) and value != 0
    if number or isinstance(value, Section) or isinstance(value, dict) and set(value) == {"min", "max"}:
        return value
    raise ValueError(f"{key} is {value!r}: write a number of 1 or more, or {{min: 2, max: 8}}")


def _checked_labels(key: str, labels: dict[str, str]) -> dict[str, str]:
    """Labels by their one value each, or one message.

    Raises:
        ValueError: Ray would take a value for an operator, or refuse a name.
    """
    for name, value in labels.items():
        if not _LABEL.fullmatch(value):
            raise ValueError(
                f"{key}.{name} is {value!r}: write the one value that the label must have, of letters, digits, -, _ "
                "and .; Ray's operators, such as !x and in(x, y), are not taken"
            )
        if not all(_LABEL.fullmatch(part) for part in name.split("/", 1)):
            raise ValueError(
                f"{key}: {name!r} cannot be the name of a label: write names such as pool or ray.io/accelerator-type"
            )
    return labels


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _refuse_set(section: Section, but: str, prefix: str, why: str) -> None:
    """Refuses whatever is set in a section, but for one key.

    Raises:
        ValueError: Something is.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name != but and value != field.default:
            raise ValueError(f"{prefix}.{name} is {value!r}, which {why} leave {prefix}.{name} out")


def _two_columns(key: str, columns: list[str] | None, example: str) -> list[str] | None:
    if columns is not None and (len(columns) != 2 or len(set(columns)) != 2):
        raise ValueError(
            f"{key} is {columns}: name two columns, of the chosen answer's and of the rejected one's score, e.g. "
            f"{example}"
        )
    return columns


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
            _refuse_set(self, "rank", "adapter", "does nothing without adapter.rank: set that, e.g. to 16, or")
        return self


class DataConfig(Section):
    """Preference pairs."""

    train: list[Uri] | dict[Uri, PositiveFloat] = Field(
        description="files, folders or globs, local or of any fsspec URI: .jsonl, .jsonl.gz, .jsonl.zst, .parquet; or "
        "a mixture, e.g. {a.jsonl: 1.0, b/: 0.5, c/: 2.0}: how often an epoch takes each one's pairs, half of them "
        "being another half in the next epoch",
    )
    eval: list[Uri] | dict[str, list[Uri]] = Field(
        [],
        description="held-out pairs, in the same forms; or several sets by name, e.g. {helpful: [a.jsonl], safe: "
        "[b/]}, which have metrics of their own besides those of all together",
    )
    eval_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the training pairs held out, chosen by content id, instead of eval"
    )
    format: str = Field(
        "auto",
        description="auto: recognised from the columns; or one of: "
        + ", ".join(FORMATS)
        + "; or module:name of a Format of your own",
    )
    columns: dict[Role, str | None] = Field(
        {}, description="columns with other names, e.g. {prompt: question, chosen: good}; null: leave the column out"
    )
    weight_column: str | None = Field(None, description="column of numbers, 0 or more: what each pair's loss counts")
    margin_column: str | None = Field(
        None,
        description="column of numbers: by how much a pair's chosen answer is to be better, in units of the reward "
        "(ODPO's offset)",
    )
    ranking: Literal["all", "best_worst"] = Field(
        "all", description="of rows with a list of answers: use all of them, or only the best and the worst"
    )
    score_columns: list[str] | None = Field(
        None,
        description="columns of the scores that a reward model or a judge gave the answers of a pair, best answer "
        "first, e.g. [score_chosen, score_rejected]: a pair is used where they differ by more than min_score_gap",
    )
    min_score_gap: float = Field(
        0.0,
        ge=0.0,
        description="of answers with scores: one is used where its score is lower, by more than this, than that of the "
        "one before; a row without two such answers is left out as tied",
    )
    chat_template: Literal["tokenizer", "none"] = Field(
        "tokenizer", description="render conversations with the tokenizer's template, or take text as it is"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what the template is given besides turns, e.g. {enable_thinking: false}"
    )
    max_length: PositiveInt = Field(
        1024, description="tokens of prompt + answer: the answer is cut to fit; a prompt that long is rejected"
    )
    max_prompt_length: PositiveInt | None = Field(
        None, description="cut longer prompts to this many tokens; null: a prompt is never cut"
    )
    max_completion_length: PositiveInt | None = Field(
        None, description="cut longer answers to this many tokens; null: only max_length cuts them"
    )
    prompt_truncation_side: Literal["left", "right"] = Field(
        "left", description="the side that a prompt loses when it is cut; a BOS token stays"
    )
    completion_truncation_side: Literal["left", "right"] = Field(
        "right", description="the side that an answer loses when it is cut"
    )
    chunk_pairs: PositiveInt = Field(
        1024, description="about how many pairs a chunk holds: the unit of reading and of reference scoring"
    )
    label_selector: dict[str, str] = Field(
        {}, description="labels that nodes must have where `prepare` reads and tokenizes, e.g. {pool: data}"
    )
    max_reject_fraction: float = Field(
        0.01, ge=0.0, le=1.0, description="stop when more than this share of the rows cannot become a pair"
    )

    @field_validator("train", mode="before")
    @classmethod
    def _files_or_mixture(cls, value: Any) -> Any:
        if not value or not isinstance(value, list | dict) or not all(isinstance(name, str) for name in value):
            raise ValueError(
                f"data.train is {value!r}: write a list of files, or files with weights such as "
                "{a.jsonl: 1.0, b.jsonl: 0.5}"
            )
        for name, weight in value.items() if isinstance(value, dict) else ():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"data.train gives {name} the weight {weight!r}: write a number above 0, e.g. 0.5")
        if len(set(map(_absolute, value))) < len(value):
            raise ValueError(f"data.train names a place twice: {', '.join(value)}; name it once")
        return value

    @field_validator("eval", mode="before")
    @classmethod
    def _files_or_sets(cls, value: Any) -> Any:
        sets = value if isinstance(value, dict) else {"all": value}
        for name, files in sets.items():
            if not isinstance(name, str) or not _SET_NAME.fullmatch(name):
                raise ValueError(
                    f"data.eval: {name!r} cannot be the name of a set: write letters, digits, _ and -, for it becomes "
                    "part of the names of metrics"
                )
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise ValueError(
                    f"data.eval is {value!r}: write a list of files, or such lists by name, e.g. "
                    "{helpful: [a.jsonl], safe: [b.jsonl]}"
                )
            if isinstance(value, dict) and not files:
                raise ValueError(f"data.eval: the set {name} has no files: name some, or leave it out")
        return value

    @property
    def eval_sets(self) -> tuple[str, ...]:
        """The names of the held-out sets, in order; of the only one, where it has none, the empty text."""
        return tuple(sorted(self.eval)) if isinstance(self.eval, dict) else ("",)

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Every entry of `train` and `eval`, with the part of the pair store that it goes to (see `chunk_name`)."""
        train = [("train", entry) for entry in self.train]
        if isinstance(self.train, dict):
            train = [(f"train.{number}", entry) for number, entry in enumerate(sorted(self.train))]
        if isinstance(self.eval, dict):
            parts = [(f"eval.{number}", self.eval[name]) for number, name in enumerate(sorted(self.eval))]
        else:
            parts = [("eval", self.eval)]
        return (*train, *((part, entry) for part, entries in parts for entry in entries))

    @field_validator("score_columns")
    @classmethod
    def _one_for_each_answer(cls, columns: list[str] | None) -> list[str] | None:
        return _two_columns("data.score_columns", columns, "[score_chosen, score_rejected]")

    @model_validator(mode="after")
    def _kwargs_reach_a_template(self) -> DataConfig:
        if self.chat_template_kwargs and self.chat_template == "none":
            raise ValueError(
                f"data.chat_template_kwargs is {self.chat_template_kwargs}, but data.chat_template: none uses no "
                "template: leave one of them out"
            )
        try:
            json.dumps(self.chat_template_kwargs)
        except TypeError as error:
            raise ValueError(
                f"data.chat_template_kwargs is {self.chat_template_kwargs}: {error}; write texts, numbers, lists and "
                "mappings, a date in quotes"
            ) from None
        for name in _NOT_THE_TEMPLATES & self.chat_template_kwargs.keys():
            raise ValueError(
                f"data.chat_template_kwargs: {name} is not the template's but decides how it is used, which dpo_ray "
                "does: leave it out"
            )
        return self

    @field_validator("label_selector")
    @classmethod
    def _labels_are_plain(cls, labels: dict[str, str]) -> dict[str, str]:
        return _checked_labels("data.label_selector", labels)

    @model_validator(mode="after")
    def _one_held_out_source(self) -> DataConfig:
        if self.eval and self.eval_fraction:
            raise ValueError("data.eval and data.eval_fraction are both set: keep one of them")
        return self


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
    gpus_per_replica: float = Field(0.0, ge=0.0, description="GPUs of one replica, as many as its devices, or 0")
    resources_per_replica: dict[str, float] = Field({}, description="custom Ray resources, e.g. {reference: 1}")
    label_selector: dict[str, str] = Field(
        {}, description="labels that a replica's nodes must have, e.g. {ray.io/accelerator-type: A10G}"
    )
    tokens_per_microbatch: PositiveInt = Field(8192, description="tokens that a device scores in one forward pass")

    @field_validator("replicas", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        return _checked_range("reference.replicas", value)

    @field_validator("columns")
    @classmethod
    def _one_for_each_answer(cls, columns: list[str] | None) -> list[str] | None:
        return _two_columns("reference.columns", columns, "[ref_chosen_logps, ref_rejected_logps]")

    @field_validator("label_selector")
    @classmethod
    def _labels_are_plain(cls, labels: dict[str, str]) -> dict[str, str]:
        return _checked_labels("reference.label_selector", labels)

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
            _refuse_set(self, "place", "reference", "does nothing with reference.place: none:")
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
            _refuse_set(self, "epochs", "sft", "does nothing without sft.epochs: set that, e.g. to 1, or")
        return self


class PairsConfig(Section):
    """`dpo-ray pairs`: pairs of the model's own answers, ranked by a judge."""

    prompts: list[Uri] = Field(
        [], description="files of prompts, a column prompt of texts or turns, named as data.train"
    )
    answers: int = Field(4, ge=2, description="answers sampled for each prompt")
    max_new_tokens: PositiveInt = Field(256, description="longer answers have not come to an end and are left out")
    temperature: PositiveFloat = Field(1.0, description="of the sampling")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="share of the probability that tokens are drawn from")
    label: Literal["reward_model", "log_ratio"] = Field(
        "reward_model",
        description="reward_model: the judge is a sequence classification model with one output; log_ratio: another "
        "language model, and an answer's score log pi_model - log pi_judge",
    )
    judge: Uri | None = Field(None, description="transformers directory of the judge")
    choose: Literal["all", "best_worst", "bradley_terry"] = Field(
        "all",
        description="all: rankings with scores; best_worst: these two; bradley_terry: two at random, of which one wins "
        "with probability sigma(difference of scores)",
    )
    prompts_per_part: PositiveInt = Field(64, description="prompts of a part, which is made as a whole or not at all")
    actors: PositiveInt = Field(1, description="copies of model and judge")
    cpus_per_actor: PositiveFloat = Field(1.0, description="CPUs of one of them")
    gpus_per_actor: float = Field(0.0, ge=0.0, le=1.0, description="GPU of one of them, or a share of one")


class EvaluationConfig(Section):
    """`dpo-ray evaluate`: answers of the policy, the reference and others to held-out prompts, and who judges them."""

    group_columns: list[str] = Field(
        [],
        description="columns of the data, e.g. [category], by whose values held-out pairs are grouped too; numbers of "
        "many values in quartiles",
    )
    prompts: int = Field(64, ge=0, description="held-out prompts that each model answers; 0: no answers, pairs alone")
    models: list[Uri] = Field([], description="further models that answer: transformers directories")
    max_new_tokens: PositiveInt = Field(256, description="longer answers are cut")
    temperature: PositiveFloat = Field(1.0, description="of the sampling; the KL is estimated with 1 alone")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the probability that tokens are drawn from; likewise"
    )
    prompts_per_part: PositiveInt = Field(
        16, description="prompts of a part, which is answered as a whole or not at all"
    )
    actors: PositiveInt = Field(1, description="actors that answer, each with one model and, for the KL, the reference")
    cpus_per_actor: PositiveFloat = Field(1.0, description="CPUs of one of them")
    gpus_per_actor: float = Field(0.0, ge=0.0, le=1.0, description="GPU of one of them, or a share of one")
    judge: Literal["none", "reward_model", "endpoint"] = Field(
        "none",
        description="none: answers and lengths alone; reward_model: the higher score wins; endpoint: a model behind an "
        "OpenAI-compatible server, asked in both orders, whose disagreement is a tie",
    )
    reward_model: Uri | None = Field(
        None, description="transformers directory of a sequence classification model with one output"
    )
    endpoint: str | None = Field(None, description="the server, e.g. http://127.0.0.1:8000/v1")
    endpoint_model: str | None = Field(None, description="the model's name there")
    key_variable: str | None = Field(
        None, description="name of the environment variable with the server's key, which is never written anywhere"
    )
    reply_tokens: PositiveInt = Field(256, description="tokens of a reply of the judge, at most")
    max_requests: PositiveInt = Field(
        1000, description="requests of one command to the judge, at most, those not counted that failed"
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="no request is sent that might take the tokens of one command, as the server counts them, beyond "
        "this; null: no limit",
    )
    timeout_s: PositiveFloat = Field(120.0, description="a judge that is silent for so long is asked again")
    prior_std: PositiveFloat | None = Field(
        None,
        description="of a ranking: standard deviation of a normal prior of each model's strength, e.g. 1.0, which "
        "keeps it finite where a model always or never wins; null: plain maximum likelihood",
    )

    lm_eval: list[str] = Field(
        [],
        description="arguments of lm-evaluation-harness' command, which is run on all models, e.g. [--tasks, ifeval, "
        "--apply_chat_template]; not those of model, device, output and configuration; needs the extra lm-eval",
    )

    @property
    def samples_are_plain(self) -> bool:
        """Whether answers are drawn from a model's own distribution, as an estimate of its KL divergence needs them."""
        return self.temperature == 1.0 and self.top_p == 1.0

    @model_validator(mode="after")
    def _benchmarks_are_named(self) -> EvaluationConfig:
        given = {each.partition("=")[0] for each in self.lm_eval}
        if self.lm_eval and not given & {"--tasks", "-t"}:
            raise ValueError(
                f"evaluation.lm_eval is {self.lm_eval}, without --tasks: name some, as in [--tasks, ifeval]"
            )
        # argparse takes the beginning of a name for the name.
        own = ("--model", "-M", "--model_args", "-a", "--device", "--output_path", "-o", "--config", "-C")
        if taken := sorted(each for each in given if each[:1] == "-" and any(name.startswith(each) for name in own)):
            raise ValueError(f"evaluation.lm_eval has {taken[0]}, which dpo_ray gives itself: leave it out")
        return self

    @field_validator("key_variable")
    @classmethod
    def _variable_is_no_key(cls, name: str | None) -> str | None:
        # Who takes it for the key's own place is not shown what stands there, nor is it written down.
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                "evaluation.key_variable is not the name of an environment variable, which has capitals, digits and _ "
                "alone: write the name, e.g. JUDGE_API_KEY, and the key into that variable"
            )
        return name

    @model_validator(mode="after")
    def _judge_is_named(self) -> EvaluationConfig:
        needed = {"reward_model": ["reward_model"], "endpoint": ["endpoint", "endpoint_model"]}
        for judge, keys in needed.items():
            for key in keys:
                value = getattr(self, key)
                if judge == self.judge and value is None:
                    raise ValueError(f"evaluation.judge is {judge}, but evaluation.{key} is null: name it")
                if judge != self.judge and value is not None:
                    raise ValueError(
                        f"evaluation.{key} is {value!r}, which does nothing with evaluation.judge: {self.judge}; leave "
                        f"it out, or set evaluation.judge: {judge}"
                    )
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"evaluation.models names a model twice: {', '.join(self.models)}; name it once")
        if len(set(self.group_columns)) < len(self.group_columns):
            raise ValueError(
                f"evaluation.group_columns names a column twice: {', '.join(self.group_columns)}; name it once"
            )
        if self.judge != "none" and not self.prompts:
            raise ValueError(
                f"evaluation.judge is {self.judge}, but evaluation.prompts is 0: there is nothing to judge"
            )
        if self.endpoint is not None and not re.match(r"https?://[^@]+$", self.endpoint):
            raise ValueError(
                "evaluation.endpoint is not a plain http(s) URL: write e.g. http://127.0.0.1:8000/v1, and a key into "
                "the environment variable that evaluation.key_variable names"
            )
        return self


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
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay of matrices (L2 for rmsprop)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging constants")
    eps: PositiveFloat = Field(1e-8, description="AdamW's and RMSprop's epsilon")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="clip the gradient's global norm; null: do not")

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
    resources_per_worker: dict[str, float] = Field({}, description="custom Ray resources, e.g. {policy: 1}")
    label_selector: dict[str, str] = Field(
        {}, description="labels that a worker's node must have, e.g. {ray.io/accelerator-type: H100}"
    )
    grow_after_s: PositiveFloat = Field(
        30.0, description="an elastic run grows when there has been room for more workers this long"
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        return _checked_range("scaling.workers", value)

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
        return _checked_labels("scaling.label_selector", labels)

    @model_validator(mode="after")
    def _range_in_order(self) -> ScalingConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"scaling.workers: min is {self.min_workers}, more than max ({self.max_workers})")
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
        description="replicas lost since the last chunk scored, or checkpoint evaluated, or over the same one",
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

    @property
    def own(self) -> list[str]:
        """Trackers of the user's own, as `module:name`."""
        return [name for name in self.trackers if ":" in name]


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

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if self.train.global_batch_pairs < self.scaling.max_workers:
            raise ValueError(
                f"train.global_batch_pairs is {self.train.global_batch_pairs}, fewer than scaling.workers "
                f"({self.scaling.max_workers}): some workers would have no pair; raise the batch or lower the workers"
            )
        if self.model.weights_dtype == "bfloat16" and self.optimizer.name != "adamw_kahan":
            raise ValueError(
                f"model.weights_dtype: bfloat16 with optimizer.name: {self.optimizer.name} would lose the training: at "
                "DPO's learning rates nearly every update is smaller than half a bfloat16 step and rounds to nothing; "
                "use optimizer.name: adamw_kahan, or model.weights_dtype: float32 (compute can stay in bfloat16)"
            )
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
        if self.model.weights_dtype == "bfloat16" and self.model.compute_dtype == "float32":
            raise ValueError("model.weights_dtype: bfloat16 needs model.compute_dtype: bfloat16")
        if self.train.eval_every_steps and not (self.data.eval or self.data.eval_fraction):
            raise ValueError(
                "train.eval_every_steps is set, but nothing is held out: set data.eval or data.eval_fraction"
            )
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
        if self.train.keep_best and self.train.keep_best != "eval_loss" and not self.needs_reference:
            raise ValueError(
                f"train.keep_best is {self.train.keep_best}, but objective.loss: {self.objective.name} has no "
                "reference and so no rewards: use keep_best: eval_loss"
            )
        if self.sft.epochs and self.objective.chosen_only:
            raise ValueError(
                f"sft.epochs is {self.sft.epochs}, but objective.loss: {self.objective.name} is such a start already: "
                "leave one of them out"
            )
        self._check_margins()
        self._check_start()
        if self.reference.sync_steps and "bco_pair" in self.objective.shares:
            raise ValueError(
                f"reference.sync_steps is {self.reference.sync_steps}, but objective.loss: {self.objective.name} holds "
                "rewards against the mean of all rewards before, which those against another reference have no part "
                "in: leave one of them out"
            )
        if self.reference.place == "none" and self.train.eval_place == "actors":
            raise ValueError(
                "train.eval_place is actors, but with reference.place: none nothing says what they are to have "
                "(reference.gpus_per_replica, ...): leave reference.place out, or use train.eval_place: workers"
            )
        if self.reference.sync_steps and self.train.eval_place == "actors":
            raise ValueError(
                f"train.eval_place is actors, but with reference.sync_steps: {self.reference.sync_steps} the reference "
                "moves on while they evaluate, and nobody scores held-out pairs with the one before: use "
                "train.eval_place: workers"
            )
        if self.reference.sync_steps and self.adapter.rank is not None:
            raise ValueError(
                f"reference.sync_steps is {self.reference.sync_steps}, but adapter.rank {self.adapter.rank}: a mixture "
                "of two adapters' matrices is not the mixture of the two models; leave one of them out"
            )
        if self.adapter.quantize and self.needs_reference and self.reference.place != "adapter_off":
            raise ValueError(
                f"adapter.quantize is {self.adapter.quantize}, but reference.place: {self.reference.place} has scores "
                "of weights that are not quantized, and those are not the policy's start: set reference.place: "
                "adapter_off"
            )
        if self.reference.place == "adapter_off":
            self._check_own_reference()
        return self

    def _check_start(self) -> None:
        if self.sft.epochs is None:
            return
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
        if not self.needs_reference:
            raise ValueError(
                f"reference.place is adapter_off, but objective.loss: {self.objective.name} has no reference: leave it "
                "out"
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
        path, tokenizer = f"{self.start().run_uri}/export", self.model.tokenizer or self.model.path
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


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides.

    Args:
        path: A local YAML file.
        overrides: Each `section.key=value`, the value in YAML.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not describe a run.
    """
    try:
        with open(path, encoding="utf-8") as file:
            raw = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections; `dpo-ray config --template` prints one")
    apply_overrides(raw, overrides or [])
    return parse_config(raw, source=path)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets keys of a mapping.

    Args:
        raw: Sections; changed in place.
        overrides: Each `section.key=value`, the value in YAML.

    Raises:
        ConfigError: One is not written so.
    """
    for override in overrides:
        _apply_override(raw, override)


def parse_config(raw: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validates a mapping.

    Raises:
        ConfigError: One message with all that is wrong, each with its key, value and the way to mend it.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "\n".join(lines)) from None


def _refuse_secrets(raw: Mapping[str, Any]) -> None:
    """Refuses what would stand in the run's folder, in logs and at trackers; what it was is not said here either.

    Raises:
        ConfigError: A URI has a secret in it, or something a secret of the environment.
    """
    for key, value in _leaves(raw):
        for text in (key, *(value if isinstance(value, list) else [value])):
            if isinstance(text, str) and (secret := secret_in(text)):
                # A mixture has its URIs as keys.
                place = re.sub(r"[.][^.]*://.*", "", key)
                raise ConfigError(
                    f"{place}: {secret}, which would be written down with the configuration; leave it out, and give "
                    "credentials by the environment of all nodes "
                    "(AWS_ACCESS_KEY_ID, ...), by roles, or by fsspec's configuration files"
                )


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write section.key=value")
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    # YAML 1.1 reads 1e-6 as a string; people write learning rates so.
    if isinstance(node[last], str):
        try:
            node[last] = float(node[last])
        except ValueError:
            return


def _explain(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = list(_section_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"{key} is required"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key} is {problem['input']!r}: {problem['msg']}"


def _section_at(location: list[str]) -> type[Section]:
    section: type[Section] = Config
    for part in location:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return section


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
    before, after = dict(_leaves(dict(old))), dict(_leaves(new.model_dump(mode="json")))
    different = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    frozen = [key for key in different if not any(key == may or key.startswith(may + ".") for may in MAY_CHANGE)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in frozen]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def template() -> str:
    """A commented configuration to start from: required keys to fill in, every other key with its default."""
    lines = ["# A dpo-ray run: fill in what is marked as required, then: dpo-ray train THIS_FILE"]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += ["", f"# {(field.annotation.__doc__ or '').strip()}", f"{name}:"]
            for key, inner in field.annotation.model_fields.items():
                lines += [f"  # {_describe(inner)}", f"  {key}: {_default(key, inner)}"]
        else:
            lines += [f"# {_describe(field)}", f"{name}: {_default(name, field)}"]
    return "\n".join(lines) + "\n"


_EXAMPLES = {
    "name": "my-run",
    "storage_path": "s3://bucket/dpo",
    "path": "path/of/the/model",
    "train": '["pairs/*.jsonl.gz"]',
}


def _describe(field: FieldInfo) -> str:
    return f"{field.description or ''}{' (required)' if field.is_required() else ''}"


def _default(key: str, field: FieldInfo) -> str:
    if field.is_required():
        return _EXAMPLES[key]
    value = field.default
    return json.dumps(list(value) if isinstance(value, tuple) else value)
