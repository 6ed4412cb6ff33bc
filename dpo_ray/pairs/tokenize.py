"""PreferencePair -> TokenizedPair: chat template, completion boundary, end of turn, truncation, content id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dpo_ray.errors import ConfigError, RowError
from dpo_ray.pairs.render import Rendered, Renderer, or_reason, require_chat_template, turn_marks
from dpo_ray.pairs.specials import Encoder, special_texts
from dpo_ray.types import PreferencePair, TokenizedPair, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_ID_BYTES = 16

# Texts in front of an answer behind which a tokenizer may treat it as it would behind the prompt.
_LEADS = ("", "\n", "a")

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long prompts and answers may be, in tokens, and at which side they are cut.

    Attributes:
        max_length: Of prompt + answer, for each answer by itself; the answer is cut to fit.
        max_prompt_length: Of a prompt; None: it is never cut.
        max_completion_length: Of an answer; None: only `max_length` cuts it.
        prompt_truncation_side: What a cut prompt loses; a BOS at its start stays.
        completion_truncation_side: What a cut answer loses; at the right, its end of turn.

    Raises:
        ConfigError: A prompt of the greatest length leaves no room for an answer.
    """

    max_length: int
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    prompt_truncation_side: Side = "left"
    completion_truncation_side: Side = "right"

    def __post_init__(self) -> None:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ConfigError(
                f"data.max_prompt_length is {self.max_prompt_length} and data.max_length {self.max_length}: a prompt "
                "that long leaves no room for an answer; lower the first or raise the second"
            )


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A pair's tokens, and what happened on the way.

    Attributes:
        pair: The tokens.
        prompt_tokens_cut: Tokens that the prompt lost.
        answer_tokens_cut: Tokens that each answer lost.
        prompt_differs: Whether the template does not ask for an answer with this prompt.
    """

    pair: TokenizedPair
    prompt_tokens_cut: int
    answer_tokens_cut: tuple[int, ...]
    prompt_differs: bool


class _Encoded(NamedTuple):
    """The prompt's tokens, and for each answer those of its text behind the prompt's text from token `start` on."""

    prompt: list[int]
    start: int
    fulls: list[list[int]]


class PairTokenizer:
    """Turns pairs into tokens. Picklable; the same pair always gets the same tokens, whatever stands beside it.

    Text:
        - `tokenizer`: the full text is the chat template rendered of prompt and answer. The prompt's text is the
          template rendered with its generation prompt. Where a full text does not begin with that, the prompt's text
          is what the template writes before the answer's content, if both answers agree on it. The answer's text is
          what follows the prompt's, so that both together are always the template's rendering. A template that
          writes today's date makes other tokens tomorrow. A row is refused whose tools, tool calls or answers'
          reasoning the template leaves out.
        - `none`: prompt and answer verbatim; of an hh-rlhf dialogue the transcript, whose prompt ends with
          "\\n\\nAssistant:" and whose answer begins with the space that follows. A list of turns has no such reading,
          nor have tools.

    Tokens:
        - A template writes its own special tokens, the tokenizer adds none. With `none` the prompt gets the BOS that
          the tokenizer itself would add, and nothing else.
        - Special tokens, and the template's other turn marks, that a conversation spells out stay text: no content
          opens or ends a turn. With `none`, text that is no dialogue counts as rendered: they are read as such.
        - The prompt's tokens are those of its text alone. The answer's are the rest of the full text's where these
          begin with exactly the prompt's; else, where the tokenizer merges across the boundary or would invent a
          space, those of the answer's text such that prompt and answer decode to what the full text does.
        - The end of the turn is trained: unless the answer's text, but for whitespace, ends with a special token,
          the tokenizer's EOS is appended.
        - Prompts and answers are cut by `Limits`. Each answer keeps at least one token, else the row is refused.
        - Rows that came as tokens are cut like the others and are otherwise left alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: Literal["tokenizer", "none"],
        limits: Limits,
        vocab_size: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks that the tokenizer can do what is asked.

        Args:
            tokenizer: The policy's tokenizer.
            chat_template: `tokenizer` for the tokenizer's own template, `none` for text as it stands.
            limits: How long prompts and answers may be.
            vocab_size: Rows of the model's embedding, the bound for rows that came as tokens; None: no bound.
            template_kwargs: What the template is given besides turns, such as enable_thinking.

        Raises:
            ConfigError: The tokenizer has no chat template where one is asked for, or no EOS token.
        """
        if chat_template == "tokenizer":
            require_chat_template(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so that the end of an answer could not be "
                "trained: set its eos_token and save it anew"
            )
        self._limits = limits
        self._vocab_size = vocab_size
        self._eos = [int(tokenizer.eos_token_id)]
        self._bos_token_id = tokenizer.bos_token_id
        self._bos = _bos_added_by(tokenizer) if chat_template == "none" else []
        self._encoder = Encoder(tokenizer, turn_marks(tokenizer, template_kwargs or {}))
        self._render = Renderer(tokenizer, chat_template, self._encoder, template_kwargs or {})

    def __call__(self, pairs: Sequence[PreferencePair | TokenRow]) -> list[Tokenized | RowError]:
        """Tokenizes a batch.

        Args:
            pairs: Prompts and answers, best first.

        Returns:
            One entry per pair, in order: its tokens, or the reason why it has none: it cannot be rendered, its prompt
            has no tokens or leaves no room for an answer, or its tokens are not the tokenizer's.
        """
        rendered = iter(self._render([pair for pair in pairs if isinstance(pair, PreferencePair)]))
        entries = [pair if isinstance(pair, TokenRow) else next(rendered) for pair in pairs]
        plain = iter(self._encode([entry for entry in entries if isinstance(entry, Rendered) and not entry.guarded]))
        results: list[Tokenized | RowError] = []
        for entry in entries:
            if isinstance(entry, TokenRow):
                results.append(or_reason(self._check, entry))
            elif isinstance(entry, RowError):
                results.append(entry)
            else:
                results.append(or_reason(self._join, entry, None if entry.guarded else next(plain)))
        return results

    def _encode(self, batch: Sequence[Rendered], guarded: bool = False) -> list[_Encoded]:
        """The tokens of each prompt, and of each answer behind the end of its prompt."""
        prompts = self._encoder.encode([rendered.prompt for rendered in batch], guarded)
        tails = [
            self._encoder.tail(rendered.prompt, prompt, guarded)
            for rendered, prompt in zip(batch, prompts, strict=True)
        ]
        texts = [tail + text for rendered, (tail, _) in zip(batch, tails, strict=True) for text in rendered.answers]
        tokens = iter(self._encoder.encode(texts, guarded))
        return [
            _Encoded(prompt, start, [next(tokens) for _ in rendered.answers])
            for rendered, prompt, (_, start) in zip(batch, prompts, tails, strict=True)
        ]

    def _join(self, rendered: Rendered, encoded: _Encoded | None) -> Tokenized:
        # Guarded pairs are rare, and any of them may have to be refused.
        encoded = encoded or self._encode([rendered], guarded=True)[0]
        prompt = encoded.prompt
        shared = prompt[encoded.start :]
        answers = []
        for text, full in zip(rendered.answers, encoded.fulls, strict=True):
            begins = full[: len(shared)] == shared
            answer = full[len(shared) :] if begins else self._part(rendered, prompt, text)
            answers.append(answer if self._encoder.ends_turn(text, rendered.guarded) else answer + self._eos)
        return self._cut(self._bos + prompt, answers, rendered.prompt_differs)

    def _part(self, rendered: Rendered, prompt: list[int], answer: str) -> list[int]:
        """The answer's tokens where the full text's do not begin with the prompt's."""
        encode = self._encoder.encode
        full = encode([rendered.prompt + answer], rendered.guarded)[0]
        if full[: len(prompt)] == prompt:
            return full[len(prompt) :]
        meant = self._encoder.decode(full)
        for lead in _LEADS:
            before, both = encode([lead, lead + answer], rendered.guarded)
            tokens = both[len(before) :]
            if both[: len(before)] == before and self._encoder.decode(prompt + tokens) == meant:
                return tokens
        raise RowError(
            "the tokenizer cannot part prompt and answer: whatever tokens the answer is given, both do not decode to "
            f"the text around {self._encoder.spell(rendered.prompt[-20:] + answer[:20])!r}; separate them by a special "
            "token or a line break"
        )

    def _check(self, row: TokenRow) -> Tokenized:
        for name, ids in (("prompt", row.prompt), *(("answer", answer) for answer in row.answers)):
            if not ids:
                raise RowError(f"the {name} has no tokens: write some, or leave the row out")
            if self._vocab_size is not None and max(ids) >= self._vocab_size:
                raise RowError(
                    f"the {name} has token {max(ids)}, but the model has {self._vocab_size}: tokenize the row with the "
                    "tokenizer of model.path"
                )
        return self._cut(row.prompt, row.answers, prompt_differs=False)

    def _cut(self, prompt: list[int], answers: Sequence[list[int]], prompt_differs: bool) -> Tokenized:
        limits = self._limits
        if not prompt:
            raise RowError("the prompt has no tokens, so that nothing predicts an answer's first one: write a prompt")
        kept = prompt
        if limits.max_prompt_length is not None and len(prompt) > limits.max_prompt_length:
            bos = [prompt[0]] if limits.prompt_truncation_side == "left" and prompt[0] == self._bos_token_id else []
            kept = bos + _keep(prompt, limits.max_prompt_length - len(bos), limits.prompt_truncation_side)
        room = limits.max_length - len(kept)
        if room < 1:
            raise RowError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in {limits.max_length}: "
                "raise data.max_length, set data.max_prompt_length, or shorten the prompt"
            )
        room = min(room, limits.max_completion_length or room)
        arrays = tuple(
            np.array(_keep(answer, room, limits.completion_truncation_side), dtype=np.int32) for answer in answers
        )
        prompt_array = np.array(kept, dtype=np.int32)
        return Tokenized(
            TokenizedPair(pair_id(prompt_array, arrays), prompt_array, arrays),
            len(prompt) - len(kept),
            tuple(len(answer) - len(array) for answer, array in zip(answers, arrays, strict=True)),
            prompt_differs,
        )


def _keep(ids: list[int], num: int, cut_side: Side) -> list[int]:
    return ids[:num] if cut_side == "right" else ids[max(len(ids) - num, 0) :]


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
        "special_tokens": special_texts(tokenizer),
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


def _bos_added_by(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Probed with a letter: where BOS and EOS are one token, an empty text would not tell which of them was added.
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [int(bos)] if bos is not None and with_special[0] == bos else []
