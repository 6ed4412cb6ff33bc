"""PreferencePair -> the texts of prompt and answers: by the tokenizer's chat template, or as they stand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from jinja2 import TemplateError

from dpo_ray.errors import ConfigError, RowError
from dpo_ray.pairs.parsers import ASSISTANT_MARKER, transcript
from dpo_ray.pairs.specials import SENTINEL, Encoder
from dpo_ray.pairs.turns import REASONING_KEYS, num_shared
from dpo_ray.types import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Made = TypeVar("_Made")
_Turn = dict[str, Any]

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError)
# Added tokens that templates write too, but that an answer's text means as such.
_REASONING_MARKS = ("<think>", "</think>")


class Rendered(NamedTuple):
    """What a pair says.

    Attributes:
        prompt: The prompt's text.
        answers: Each answer's text: the template's full rendering is always prompt + answer.
        guarded: Whether the texts are in the alphabet in which quoted special tokens stay text.
        prompt_differs: Whether the template does not ask for an answer with this prompt.
    """

    prompt: str
    answers: list[str]
    guarded: bool
    prompt_differs: bool


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that cannot render a conversation.

    Raises:
        ConfigError: It has no default chat template.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"data.chat_template is 'tokenizer', but the tokenizer {tokenizer.name_or_path!r} has no (default) chat "
            "template: set `data.chat_template: none`, or give the tokenizer a template"
        ) from error


def turn_marks(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> list[str]:
    """Added tokens with which the template, if there is one, begins or ends turns, special or not."""
    turns = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **template_kwargs)
    except _TEMPLATE_ERRORS:
        return []
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return sorted(mark for mark in added.difference(_REASONING_MARKS) if mark.strip() and mark in text)


class _Conversation(NamedTuple):
    """A pair as a template takes it: the prompt's turns, those of prompt and answer for each answer, and tools."""

    prompt: list[_Turn]
    fulls: list[list[_Turn]]
    tools: list[dict[str, Any]] | None
    guarded: bool


class Renderer:
    """Pairs -> texts. See `PairTokenizer` for the rules."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: Literal["tokenizer", "none"],
        encoder: Encoder,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        """Takes a tokenizer that has a template where one is asked for, and what else that template is given."""
        self._tokenizer, self._template_kwargs = tokenizer, template_kwargs
        self._with_template = chat_template == "tokenizer"
        self._encoder = encoder

    def __call__(self, pairs: Sequence[PreferencePair]) -> list[Rendered | RowError]:
        """Renders each pair by itself; one that cannot be rendered gets the reason in its place."""
        if not self._with_template:
            return [or_reason(self._as_it_stands, pair) for pair in pairs]
        conversations = [or_reason(self._conversation, pair) for pair in pairs]
        good = [conversation for conversation in conversations if not isinstance(conversation, RowError)]
        try:
            texts = iter(self._apply_template(good))
        except _TEMPLATE_ERRORS:
            return [
                entry if isinstance(entry, RowError) else or_reason(self._render_alone, entry)
                for entry in conversations
            ]
        return [
            entry if isinstance(entry, RowError) else or_reason(self._split, entry, *next(texts))
            for entry in conversations
        ]

    def _as_it_stands(self, pair: PreferencePair) -> Rendered:
        if pair.tools:
            raise RowError(
                "tools have no reading without a chat template: set data.chat_template: tokenizer, or data.columns: "
                "{tools: null} to leave them out"
            )
        for key in (key for turns in (pair.prompt, *pair.answers) for turn in turns for key in turn.extra or ()):
            raise RowError(
                f"a turn's {key!r} has no reading without a chat template: set data.chat_template: tokenizer, or leave "
                "it out"
            )
        if pair.layout in ("text", "raw"):
            prompt, *answers = (turns[0].content or "" for turns in (pair.prompt, *pair.answers))
            return Rendered(prompt, answers, False, False)
        if pair.layout == "messages":
            raise RowError(
                "a prompt that is a list of turns, or has a system text, has no reading without a chat template: "
                "set data.chat_template: tokenizer, or write prompt and answers as strings"
            )
        label = ASSISTANT_MARKER.rstrip(" ")
        texts = [transcript(pair.prompt) + label, *(transcript(answer)[len(label) :] for answer in pair.answers)]
        guarded = self._encoder.always_guards or any(map(self._encoder.quotes_controls, texts))
        if guarded:
            # Nothing here is a template's, so all of it is quoted.
            texts = [self._encoder.guard(self._encoder.quote(text)) for text in texts]
        return Rendered(texts[0], texts[1:], guarded, False)

    def _conversation(self, pair: PreferencePair) -> _Conversation:
        if pair.layout == "raw":
            raise RowError(
                "texts that are only known to begin alike are no conversation for a chat template: "
                "set data.chat_template: none, or write the prompt into a column 'prompt'"
            )
        encoder = self._encoder
        said: list[Any] = [[turn.as_dict() for turn in turns] for turns in (pair.prompt, *pair.answers)]
        guarded = encoder.always_guards or encoder.quotes_controls((pair.prompt, pair.answers, pair.tools))
        prompt, *answers, tools = encoder.quote([*said, pair.tools]) if guarded else [*said, pair.tools]
        return _Conversation(prompt, [prompt + answer for answer in answers], tools, guarded)

    def _render_alone(self, conversation: _Conversation) -> Rendered:
        try:
            texts = self._apply_template([conversation])
        except _TEMPLATE_ERRORS as error:
            roles = ", ".join(turn["role"] for turn in conversation.fulls[0])
            raise RowError(f"the chat template refuses turns with the roles {roles}: {error}") from error
        return self._split(conversation, *texts[0])

    def _apply_template(self, conversations: Sequence[_Conversation]) -> list[tuple[str, list[str]]]:
        """Prompt, and prompt and answer for each answer, as the template renders them, quotes in place."""
        # One call takes one list of tools.
        by_tools: dict[str, list[int]] = {}
        for index, conversation in enumerate(conversations):
            by_tools.setdefault(json.dumps(conversation.tools), []).append(index)
        texts: dict[int, tuple[str, list[str]]] = {}
        for indices in by_tools.values():
            group = [conversations[index] for index in indices]
            tools = group[0].tools
            asked = self._rendered([conversation.prompt for conversation in group], tools, ask=True)
            fulls = [full for conversation in group for full in conversation.fulls]
            answered = iter(self._rendered(fulls, tools, ask=False))
            for index, conversation, prompt in zip(indices, group, asked, strict=True):
                texts[index] = prompt, [next(answered) for _ in conversation.fulls]
        return [texts[index] for index in range(len(conversations))]

    def _rendered(self, conversations: list[list[_Turn]], tools: list[dict[str, Any]] | None, ask: bool) -> list[str]:
        texts = self._tokenizer.apply_chat_template(
            conversations, tools=tools, tokenize=False, add_generation_prompt=ask, **self._template_kwargs
        )
        return [str(text) for text in texts]

    def _rendered_or_empty(self, turns: list[_Turn], tools: list[dict[str, Any]] | None, ask: bool) -> str:
        """One conversation, or nothing where the template refuses it."""
        try:
            return self._rendered([turns], tools, ask)[0]
        except _TEMPLATE_ERRORS:
            return ""

    def _require_all(self, conversation: _Conversation, asked: str, fulls: list[str]) -> None:
        """Raises RowError where the template leaves out what the row says: it would train on something else."""
        tools, num_prompt = conversation.tools, len(conversation.prompt)
        if tools and self._rendered_or_empty(conversation.prompt, None, ask=True) == asked:
            raise RowError(
                "the chat template leaves tools out: give the tokenizer one that renders them, or set data.columns: "
                "{tools: null}"
            )
        for turns, full in zip(conversation.fulls, fulls, strict=True):
            # Of earlier turns many templates leave the reasoning out on purpose.
            for keys, first in ((("tool_calls",), 0), (REASONING_KEYS, num_prompt)):
                named = next((key for turn in turns[first:] for key in keys if key in turn), None)
                if named is None:
                    continue
                without = [{key: turn[key] for key in turn if key not in keys} for turn in turns[first:]]
                if self._rendered_or_empty(turns[:first] + without, tools, ask=False) == full:
                    raise RowError(
                        f"the chat template leaves {named!r} out: give the tokenizer one that renders it, or take it "
                        "out of the row"
                    )

    def _split(self, conversation: _Conversation, asked: str, fulls: list[str]) -> Rendered:
        self._require_all(conversation, asked, fulls)
        prompt_differs = not all(full.startswith(asked) for full in fulls)
        prompt = self._before_the_answer(conversation, asked, fulls) if prompt_differs else asked
        texts = [prompt, *(full[len(prompt) :] for full in fulls)]
        if not all(texts[1:]):
            raise RowError("the chat template renders nothing of an answer: give the tokenizer one that does")
        if conversation.guarded:
            texts = [self._encoder.guard(text) for text in texts]
        return Rendered(texts[0], texts[1:], conversation.guarded, prompt_differs)

    def _before_the_answer(self, conversation: _Conversation, asked: str, fulls: list[str]) -> str:
        """What stands before the answers in renderings that do not begin with what the model is asked with."""
        num_prompt = len(conversation.prompt)
        probe = [*conversation.prompt, {"role": conversation.fulls[0][num_prompt]["role"], "content": SENTINEL}]
        text = self._rendered_or_empty(probe, conversation.tools, ask=False)
        prompt = text.partition(SENTINEL)[0]
        if SENTINEL in text and prompt and all(full.startswith(prompt) for full in fulls):
            return prompt
        at = min(num_shared(asked, full) for full in fulls)
        raise RowError(
            "the chat template rewrites earlier turns depending on the answer: at character "
            f"{at}, {asked[at : at + 30]!r} becomes {[full[at : at + 30] for full in fulls]}; "
            "give the tokenizer a template that only appends, or set data.chat_template: none"
        )


def or_reason(make: Callable[..., _Made], *args: Any) -> _Made | RowError:
    """What a function makes of one row, or the reason why it does not, so that the rest of a batch goes on."""
    try:
        return make(*args)
    except RowError as error:
        return error
