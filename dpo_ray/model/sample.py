"""Answers of a model to prompts, and what a judge says of them: the model's part of `pairs` and `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedTokenizerBase

from dpo_ray.errors import ConfigError, first_line
from dpo_ray.model.files import load_tokenizer, localize
from dpo_ray.model.forward import with_token_scores
from dpo_ray.model.load import DTYPES, load_pretrained

Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """An answer.

    Attributes:
        text: Without special tokens.
        prompt: Token ids of the prompt that it answers.
        tokens: Its own, with the end of the turn where it has come to one.
        ended: Whether it has.
    """

    text: str
    prompt: np.ndarray
    tokens: np.ndarray
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Template:
    """How turns become text.

    Attributes:
        tokenizer: Whose template it is.
        kwargs: What that is given besides turns; None: turns are joined as they stand.
    """

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any] | None

    def text(self, turns: Turns, ask: bool) -> str:
        """The turns' text; with `ask` it ends where an answer begins."""
        if self.kwargs is None:
            return "".join(turn["content"] for turn in turns)
        made = self.tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=ask, **self.kwargs
        )
        return str(made)


class Sampler:
    """A causal language model that answers."""

    def __init__(
        self, path: str, template: Template, dtype: str, device: torch.device, options: Mapping[str, Any]
    ) -> None:
        """Loads the model.

        Args:
            path: transformers directory.
            template: For prompts.
            dtype: Of the weights.
            device: Where it computes.
            options: Of transformers' `GenerationConfig`.
        """
        model = load_pretrained(path, dtype, "sdpa").to(device).eval()
        self.model = with_token_scores(model.requires_grad_(False), device)
        self._template, tokenizer = template, template.tokenizer
        own: Any = model.generation_config
        ends = own.eos_token_id if own is not None else None
        # A base model's own is not that of the template's turns.
        self._ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        # What it says besides, such as a penalty for repetitions, would fill what is not given below.
        self.model.generation_config = GenerationConfig()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = min(self._ends)
        self._generation = GenerationConfig(
            do_sample=True, top_k=0, eos_token_id=sorted(self._ends), pad_token_id=tokenizer.pad_token_id, **options
        )

    def answers(self, prompts: Sequence[Turns], seed: int) -> list[list[Sampled]]:
        """Answers that have come to an end and differ, per prompt; the same for the same seed and prompts.

        Args:
            prompts: Answered together.
            seed: Of PyTorch's generators.
        """
        found = [dict[str, Sampled]() for _ in prompts]
        for of_prompt, sampled in zip(found, self.sampled(prompts, seed), strict=True):
            for each in sampled:
                if each.ended and each.text.strip():
                    of_prompt.setdefault(each.text, each)
        return [list(of_prompt.values()) for of_prompt in found]

    @torch.inference_mode()
    def sampled(self, prompts: Sequence[Turns], seed: int) -> list[list[Sampled]]:
        """All answers, as they were drawn, per prompt; the same for the same seed and prompts.

        Args:
            prompts: Answered together.
            seed: Of PyTorch's generators.
        """
        torch.manual_seed(seed)
        texts, tokenizer = [self._template.text(turns, ask=True) for turns in prompts], self._template.tokenizer
        own = self._template.kwargs is None  # A template writes its special tokens itself.
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=own)
        inputs = inputs.to(self.model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        made: Any = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self._generation)
        each = made[:, ids.shape[1] :].view(len(prompts), -1, made.shape[1] - ids.shape[1]).cpu().numpy()
        asked = [row[kept.bool()].cpu().numpy() for row, kept in zip(ids, mask, strict=True)]
        return [[self._answer(prompt, row) for row in rows] for prompt, rows in zip(asked, each, strict=True)]

    def _answer(self, prompt: np.ndarray, row: np.ndarray) -> Sampled:
        ends = np.flatnonzero(np.isin(row, list(self._ends)))
        tokens = row[: ends[0] + 1] if len(ends) else row
        text = str(self._template.tokenizer.decode(tokens, skip_special_tokens=True))
        return Sampled(text, prompt.astype(np.int32), tokens.astype(np.int32), bool(len(ends)))


class RewardModel:
    """A sequence classification model with one output."""

    def __init__(self, path: str, dtype: str, device: torch.device) -> None:
        """Loads it, and its own tokenizer.

        Raises:
            ConfigError: It cannot be loaded, or has more than one output.
        """
        tokenizer = load_tokenizer(path)
        # Without a template of its own it reads prompt and answer one after the other.
        self._template = Template(tokenizer, None if tokenizer.chat_template is None else {})
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                localize(path), dtype=DTYPES[dtype], use_safetensors=True
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ConfigError(f"{path}: cannot load a sequence classification model: {first_line(error)}") from None
        if model.config.num_labels != 1:
            raise ConfigError(
                f"{path}: a reward model has one output, this model has {model.config.num_labels}: name another one as "
                "the judge"
            )
        self._path, self._positions = path, _positions(model)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = tokenizer.eos_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
        self._model = model.to(device).eval()

    @torch.inference_mode()
    def scores(self, prompt: Turns, answers: Sequence[Sampled]) -> list[float]:
        """The reward of each answer.

        Raises:
            ConfigError: The model has no positions for so many tokens.
        """
        turns = [[*prompt, {"role": "assistant", "content": answer.text}] for answer in answers]
        texts = [self._template.text(each, ask=False) for each in turns]
        own = self._template.kwargs is None
        inputs = self._template.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=own)
        size = inputs["input_ids"].shape[1]
        if self._positions is not None and size > self._positions:
            raise ConfigError(
                f"{self._path}: this judge has positions for {self._positions} tokens, a prompt and its answer have "
                f"{size}: name a judge for longer texts, or let answers and prompts be shorter"
            )
        inputs = inputs.to(self._model.device)
        logits = self._model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return [float(score) for score in logits[:, 0]]


def _positions(model: torch.nn.Module) -> int | None:
    """How many positions a model has that looks each up in a table, as BERT does; None for others."""
    tables = [
        each.num_embeddings - (0 if each.padding_idx is None else each.padding_idx + 1)
        for name, each in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(each, torch.nn.Embedding)
    ]
    return min(tables, default=None)
