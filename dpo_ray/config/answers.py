"""Sections of the commands that sample and judge answers."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dpo_ray.config.base import Section, Uri, refuse_set


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
    gpus_per_actor: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="GPU of one of them, or a share of one; as scaling.gpus_per_worker where it is left out",
    )


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
    gpus_per_actor: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="GPU of one of them, or a share of one; as scaling.gpus_per_worker where it is left out",
    )
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
        if self.judge != "endpoint":
            why = f"does nothing with evaluation.judge: {self.judge}; set evaluation.judge: endpoint, or"
            own = ["key_variable", "reply_tokens", "max_requests", "max_tokens", "timeout_s"]
            refuse_set(self, "evaluation", why, own)
        if self.judge == "none":
            why = "does nothing with evaluation.judge: none, since nothing is ranked: name a judge, or"
            refuse_set(self, "evaluation", why, ["prior_std"])
        if not self.prompts:
            why = "does nothing with evaluation.prompts: 0, since nothing is answered: raise that, or"
            refuse_set(self, "evaluation", why, ["max_new_tokens", "temperature", "top_p", "prompts_per_part"])
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
