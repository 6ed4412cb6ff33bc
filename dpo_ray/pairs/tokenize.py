"""PreferencePair -> TokenizedPair: chat template, completion boundary, end of turn, truncation, content id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError

from dpo_ray.errors import ConfigError, RowError
from dpo_ray.pairs.formats import ASSISTANT_MARKER, transcript
from dpo_ray.types import Message, PreferencePair, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_ID_BYTES = 16


class PairTokenizer:
    """Turns pairs into tokens. Picklable; calls are pure, so that the same pair always gets the same tokens.

    Text:
        - `tokenizer`: the prompt's text is the chat template rendered with its generation prompt, the full text the
          template rendered of prompt and answer; the answer's text is what the full text adds to the prompt's.
        - `none`: prompt and answer verbatim; of an hh-rlhf dialogue the transcript, whose prompt ends with
          "\\n\\nAssistant:" and whose answer begins with the space that follows. A list of turns has no such reading.

    Tokens:
        - A template writes its own special tokens, the tokenizer adds none. With `none` the prompt gets the BOS that
          the tokenizer itself would add, and nothing else. Special tokens written out in a text are read as such.
        - The prompt's tokens are those of its text alone. The answer's are the rest of the full text's where these
          begin with exactly the prompt's (so that a sentencepiece-like tokenizer invents no space in front of the
          answer), else those of the answer's text alone. No token is lost, none counted twice.
        - The end of the turn is trained: unless the answer's text, but for whitespace, ends with a special token,
          the tokenizer's EOS is appended.
        - Prompt and answer together are cut at the answer's end to `max_length` tokens (TRL's `keep_start`); an
          answer that is cut has no end of turn. Each answer keeps at least one token, else the row is refused.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: Literal["tokenizer", "none"], max_length: int
    ) -> None:
        """Checks that the tokenizer can do what is asked.

        Args:
            tokenizer: The policy's tokenizer.
            chat_template: `tokenizer` for the tokenizer's own template, `none` for text as it stands.
            max_length: Limit of prompt + answer in tokens, for each answer by itself.

        Raises:
            ConfigError: The tokenizer has no chat template where one is asked for, or no EOS token.
        """
        if chat_template == "tokenizer":
            _require_chat_template(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so that the end of an answer could not be "
                "trained: set its eos_token and save it anew"
            )
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._max_length = max_length
        self._eos = [int(tokenizer.eos_token_id)]
        self._bos = _bos_added_by(tokenizer) if chat_template == "none" else []
        self._special_tokens = _special_tokens(tokenizer)

    def __call__(self, pair: PreferencePair) -> TokenizedPair:
        """Tokenizes one pair.

        Args:
            pair: Prompt and answers, best first.

        Returns:
            The tokens, answers in the same order, and their content id.

        Raises:
            RowError: The pair cannot be rendered, its prompt has no tokens, or the prompt leaves no room for an answer.
        """
        prompt_text, answer_texts = self._render(pair)
        prompt, *fulls = self._encode([prompt_text, *(prompt_text + text for text in answer_texts)])
        answers = [self._answer_tokens(prompt, full, text) for full, text in zip(fulls, answer_texts, strict=True)]
        prompt = self._bos + prompt
        if not prompt:
            raise RowError("the prompt has no tokens, so that nothing predicts an answer's first one: write a prompt")
        room = self._max_length - len(prompt)
        if room < 1:
            raise RowError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in {self._max_length}: "
                "raise data.max_length, or shorten the prompt"
            )
        prompt_array = np.asarray(prompt, dtype=np.int32)
        answer_arrays = tuple(np.asarray(answer[:room], dtype=np.int32) for answer in answers)
        return TokenizedPair(pair_id(prompt_array, answer_arrays), prompt_array, answer_arrays)

    def _render(self, pair: PreferencePair) -> tuple[str, list[str]]:
        if self._chat_template == "tokenizer":
            prompt_text = self._apply_template(pair.prompt, add_generation_prompt=True)
            fulls = [self._apply_template(pair.prompt + answer) for answer in pair.answers]
            return prompt_text, [_continuation(prompt_text, full) for full in fulls]
        if pair.layout == "text":
            return pair.prompt[0].content, [answer[0].content for answer in pair.answers]
        if pair.layout == "dialogue":
            label = ASSISTANT_MARKER.rstrip(" ")
            return transcript(pair.prompt) + label, [transcript(answer)[len(label) :] for answer in pair.answers]
        raise RowError(
            "a prompt that is a list of turns has no reading without a chat template: "
            "set data.chat_template: tokenizer, or write prompt and answers as strings"
        )

    def _apply_template(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        turns = [message._asdict() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise RowError(f"the chat template refuses turns with the roles {roles}: {error}") from error
        return str(text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Each option is named because a tokenizer's own settings would otherwise decide, and could cut or pad.
        encoding = self._tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            split_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[list[int]] = encoding["input_ids"]
        return ids

    def _answer_tokens(self, prompt: list[int], full: list[int], answer_text: str) -> list[int]:
        tokens = full[len(prompt) :] if full[: len(prompt)] == prompt else self._encode([answer_text])[0]
        return tokens if answer_text.rstrip().endswith(self._special_tokens) else tokens + self._eos


def pair_id(prompt: np.ndarray, answers: Sequence[np.ndarray]) -> bytes:
    """Digests a pair's token content: the same on every machine, and another one for any other pair.

    Args:
        prompt: Shape (prompt tokens,), integer.
        answers: Each of shape (answer tokens,), integer, best first.

    Returns:
        The first 16 bytes of SHA-256 over int32 little-endian numbers: how many answers, then of the prompt and of
        each answer the length and the tokens.
    """
    digest = hashlib.sha256(np.asarray(len(answers), dtype="<i4").tobytes())
    for tokens in (prompt, *answers):
        digest.update(np.asarray(len(tokens), dtype="<i4").tobytes())
        digest.update(np.asarray(tokens, dtype="<i4").tobytes())
    return digest.digest()[:PAIR_ID_BYTES]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digests everything of a tokenizer that changes the tokens of a pair.

    Args:
        tokenizer: Any tokenizer; one without a Rust backend is taken by its class name and vocabulary.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    content: dict[str, Any] = {
        "chat_template": tokenizer.chat_template,
        "special_tokens_map": tokenizer.special_tokens_map,
        "special_tokens": _special_tokens(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content |= {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        # Truncation and padding are state of the last call, which PairTokenizer overrides: not part of the content.
        serialized = json.loads(backend.to_str())
        content["backend"] = {key: value for key, value in serialized.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"data.chat_template is 'tokenizer', but the tokenizer {tokenizer.name_or_path!r} has no (default) chat "
            "template: set `data.chat_template: none`, or give the tokenizer a template"
        ) from error


def _bos_added_by(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Probed with a letter: where BOS and EOS are one token, an empty text would not tell which of them was added.
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [int(bos)] if bos is not None and with_special[0] == bos else []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    # An end of turn such as <end_of_turn> is often not among the named special tokens, only marked as special.
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(text for text in added | set(tokenizer.all_special_tokens) if text.strip()))


def _continuation(prompt_text: str, full_text: str) -> str:
    if full_text.startswith(prompt_text):
        return full_text[len(prompt_text) :]
    shared = next(
        (i for i, (left, right) in enumerate(zip(prompt_text, full_text, strict=False)) if left != right),
        len(full_text),
    )
    raise RowError(
        "the chat template rewrites earlier turns when the answer follows: at character "
        f"{shared}, {prompt_text[shared : shared + 30]!r} becomes {full_text[shared : shared + 30]!r}; "
        "give the tokenizer a template that only appends, or set data.chat_template: none"
    )
