"""Texts -> token ids; the text of a control token is that token only where a template wrote it.

A conversation may quote "<|im_end|>". Where one does, the text is encoded in another alphabet: private characters stand
for the control tokens, and what is quoted stays text, because no token has that name any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_ray.errors import RowError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# At the end of Unicode's last private plane: what stands for an answer, for quoted control tokens, for real ones.
SENTINEL = "\U00107fff"
_QUOTED, _REAL = 0x108000, 0x10C000
_RESERVED = re.compile("[\U00107fff-\U0010ffff]")
# What stands for a quoted one, as Python's repr and ASCII JSON write it where a template prints an object.
_ESCAPED = re.compile(r"\\U0010[89ab][0-9a-f]{3}|\\udbe[0-9a-f]\\ud[c-f][0-9a-f]{2}")


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of all special tokens: also of those without a name, as an end of turn often is."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(text for text in added | set(tokenizer.all_special_tokens) if text.strip()))


class Encoder:
    """A tokenizer without its additions: no BOS, no EOS, no truncation, no padding, whatever its own settings say.

    Texts are plain, where every token written out is read as such, or guarded: made by `quote` and `guard`.

    Attributes:
        always_guards: Whether plain text may turn into a control token without spelling it, by being normalized.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn_marks: Sequence[str] = ()) -> None:
        """Reads what the tokenizer says of its tokens.

        Args:
            tokenizer: Any tokenizer; one without a Rust backend has no guarded alphabet.
            turn_marks: Control tokens of its template that are not special.
        """
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._guarded: Tokenizer | None = None
        self._id_of_guarded: dict[int, int] = {}
        special = special_texts(tokenizer)
        controls = sorted({*special, *turn_marks}, key=lambda text: (-len(text), text))
        self._controls = re.compile("|".join(map(re.escape, controls)) or "(?!)")
        self._real = {text: chr(_REAL + index) for index, text in enumerate(controls)}
        self._quoted = {text: chr(_QUOTED + index) for index, text in enumerate(controls)}
        self._unquoted = {ord(mark): text for text, mark in self._quoted.items()}
        self._spelled = {ord(mark): text for text, mark in self._real.items()}
        self._ends = {False: special, True: tuple(self._real[text] for text in special)}
        self._text_of_id = {int(tokenizer.convert_tokens_to_ids(text)): text for text in special}
        self._never_typed = frozenset(self._text_of_id) - {tokenizer.unk_token_id}
        added = tokenizer.added_tokens_decoder.values()
        normalizes = self._backend is not None and _normalizes(self._backend)
        self.always_guards = normalizes and any(token.content in self._real and token.normalized for token in added)

    def __getstate__(self) -> dict[str, Any]:
        """Without the second vocabulary, which takes a second to build and is seldom needed."""
        return {**self.__dict__, "_guarded": None}

    def quotes_controls(self, value: Any) -> bool:
        """Whether a text, or one anywhere in a JSON value, spells a control token."""
        if isinstance(value, str):
            return self._controls.search(value) is not None
        if isinstance(value, (list, tuple)):
            return any(map(self.quotes_controls, value))
        return isinstance(value, Mapping) and any(map(self.quotes_controls, (*value, *value.values())))

    def quote(self, value: Any) -> Any:
        """A text, or a JSON value with its texts, for a template that then writes no control token because of it.

        Raises:
            RowError: It holds characters that are used for this, or the tokenizer cannot keep it as text.
        """
        if isinstance(value, str):
            return self._quote_text(value)
        if isinstance(value, (list, tuple)):
            return [self.quote(item) for item in value]
        if isinstance(value, Mapping):
            return {self.quote(key): self.quote(item) for key, item in value.items()}
        return value

    def _quote_text(self, text: str) -> str:
        found = _RESERVED.search(text)
        if found:
            raise RowError(
                f"character {found.start()} of a text, U+{ord(found[0]):X}, is a private one that is needed to keep "
                "special tokens apart from text: drop it"
            )
        if self._backend is None:
            raise RowError(
                "the text of a special token stands in a conversation, and this tokenizer has no Rust backend that "
                "could keep it as text: drop it, or set model.tokenizer to a fast tokenizer"
            )
        return self._controls.sub(lambda match: self._quoted[match[0]], text)

    def guard(self, rendered: str) -> str:
        """A rendering of quoted texts in the guarded alphabet: what the template wrote is real, what it quotes text.

        Raises:
            RowError: The template escapes the private characters.
        """
        if _ESCAPED.search(rendered):
            raise RowError(
                "the text of a special token stands in tools or tool calls, and the chat template writes these with "
                "escapes, so that it cannot be kept as text: drop it, or give the tokenizer a template that uses tojson"
            )
        return self._controls.sub(lambda match: self._real[match[0]], rendered).translate(self._unquoted)

    def spell(self, guarded: str) -> str:
        """A guarded text as the template would have rendered it without quoting."""
        return guarded.translate(self._spelled)

    def ends_turn(self, text: str, guarded: bool) -> bool:
        """Whether a text, but for whitespace, ends with a special token."""
        return text.rstrip().endswith(self._ends[guarded])

    def tail(self, text: str, ids: list[int], guarded: bool) -> tuple[str, int]:
        """The end of a text from its last special token on: what follows never changes the tokens before it.

        Args:
            text: Any text.
            ids: Its tokens.
            guarded: Which alphabet it is in.

        Returns:
            The text's end, and where its tokens begin; the whole text where it has no such end.
        """
        if self.always_guards or self._backend is None:
            return text, 0
        for at in range(len(ids) - 1, 0, -1):
            if ids[at] in self._never_typed:
                spelled = self._text_of_id[ids[at]]
                begin = text.rfind(self._real[spelled] if guarded else spelled)
                return (text[begin:], at) if begin > 0 else (text, 0)
        return text, 0

    def encode(self, texts: Sequence[str], guarded: bool) -> list[list[int]]:
        """Encodes texts of one alphabet.

        Raises:
            RowError: Plain text became a control token all the same.
        """
        if not texts:
            return []
        if guarded:
            return self._encode_guarded(texts)
        if self._backend is None:
            encoding = self._tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False)
            return [list(map(int, ids)) for ids in encoding["input_ids"]]
        # The backend keeps the settings of whoever called last.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode_guarded(self, texts: Sequence[str]) -> list[list[int]]:
        if self._guarded is None:
            self._guarded = self._rename_controls()
        known = self._id_of_guarded
        batch = []
        for encoding in self._guarded.encode_batch_fast(texts, add_special_tokens=False):
            for token in encoding.ids:
                if token in self._never_typed and token not in known:
                    raise RowError(
                        f"the tokenizer reads the text {self._text_of_id[token]!r} as the special token of that name "
                        "wherever it stands: drop it from the conversation"
                    )
            batch.append([known.get(token, token) for token in encoding.ids])
        return batch

    def _rename_controls(self) -> Tokenizer:
        """The same tokenizer, in which a private character spells each control token."""
        from tokenizers import Tokenizer

        assert self._backend is not None
        content = json.loads(self._backend.to_str())
        content |= {"truncation": None, "padding": None, "post_processor": None}
        for token in content["added_tokens"]:
            token["content"] = self._real.get(token["content"], token["content"])
        renamed = Tokenizer.from_str(json.dumps(content))
        # Renamed tokens that also stand in the model's vocabulary get new ids there.
        ids = {token["id"]: renamed.token_to_id(token["content"]) for token in content["added_tokens"]}
        self._id_of_guarded = {guarded: token for token, guarded in ids.items() if guarded is not None}
        return renamed


def _normalizes(backend: Tokenizer) -> bool:
    # An empty sequence of normalizers is usual.
    normalizer = backend.normalizer
    return normalizer is not None and json.loads(normalizer.__getstate__()).get("normalizers") != []
