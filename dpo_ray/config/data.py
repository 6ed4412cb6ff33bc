"""The section of the preference pairs."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dpo_ray.config.base import Section, Uri, absolute, checked_labels, refuse_set, two_columns
from dpo_ray.pairs.formats import FORMATS, Role

# Arguments of transformers' apply_chat_template that a template does not see, or that the data decide.
_NOT_THE_TEMPLATES = {
    *("conversation", "messages", "chat_template", "tools", "documents", "tokenizer_kwargs", "tokenize", "padding"),
    *("add_generation_prompt", "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}


_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class DataConfig(Section):
    """Preference pairs."""

    train: list[Uri] | dict[Uri, PositiveFloat] = Field(
        description="files, folders or globs, local or of any fsspec URI: .jsonl, .jsonl.gz, .jsonl.zst, .parquet; or "
        "a mixture, e.g. {a.jsonl: 1.0, b/: 0.5, c/: 2.0}: how often an epoch takes each one's pairs; 0.5 takes "
        "half of them, and the next epoch the other half",
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
        if len(set(map(absolute, value))) < len(value):
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
        return two_columns("data.score_columns", columns, "[score_chosen, score_rejected]")

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
        return checked_labels("data.label_selector", labels)

    @model_validator(mode="after")
    def _side_of_a_cut(self) -> DataConfig:
        if self.max_prompt_length is None:
            why = "does nothing without data.max_prompt_length, since no prompt is cut: set that, or"
            refuse_set(self, "data", why, ["prompt_truncation_side"])
        return self

    @model_validator(mode="after")
    def _one_held_out_source(self) -> DataConfig:
        if self.eval and self.eval_fraction:
            raise ValueError("data.eval and data.eval_fraction are both set: keep one of them")
        return self
