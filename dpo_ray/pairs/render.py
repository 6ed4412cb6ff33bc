"""PreferencePair -> the texts of prompt and answers: by the tokenizer's chat template, or as they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from jinja2 import TemplateError

from dpo_ray.errors import ConfigError, RowError
from dpo_ray.pairs.parsers import ASSISTANT_MARKER, transcript
from dpo_ray.pairs.specials import SENTINEL, Encoder
from dpo_ray.pairs.turns import num_shared
from dpo_ray.types import Message, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Made = TypeVar("_Made")

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
    """A pair as a template takes it: the prompt's turns, and those of prompt and answer for each answer."""

    prompt: list[dict[str, str]]
    fulls: list[list[dict[str, str]]]
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
        if pair.layout in ("text", "raw"):
            return Rendered(pair.prompt[0].content, [answer[0].content for answer in pair.answers], False, False)
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
        messages = [*pair.prompt, *(message for answer in pair.answers for message in answer)]
        guarded = encoder.always_guards or any(encoder.quotes_controls(text) for turn in messages for text in turn)
        prompt, *answers = ([_turn(turn, encoder, guarded) for turn in turns] for turns in (pair.prompt, *pair.answers))
        return _Conversation(prompt, [prompt + answer for answer in answers], guarded)

    def _render_alone(self, conversation: _Conversation) -> Rendered:
        try:
            texts = self._apply_template([conversation])
        except _TEMPLATE_ERRORS as error:
            roles = ", ".join(turn["role"] for turn in conversation.fulls[0])
            raise RowError(f"the chat template refuses turns with the roles {roles}: {error}") from error
        return self._split(conversation, *texts[0])

    def _apply_template(self, conversations: Sequence[_Conversation]) -> list[tuple[str, list[str]]]:
        """Prompt, and prompt and answer for each answer, as the template renders them, quotes in place."""
        if not conversations:
            return []
        asked = self._tokenizer.apply_chat_template(
            [conversation.prompt for conversation in conversations],
            tokenize=False,
            add_generation_prompt=True,
            **self._template_kwargs,
        )
        answered = iter(
            self._tokenizer.apply_chat_template(
                [full for conversation in conversations for full in conversation.fulls],
                tokenize=False,
                **self._template_kwargs,
            )
        )
        return [
            (str(prompt), [str(next(answered)) for _ in conversation.fulls])
            for prompt, conversation in zip(asked, conversations, strict=True)
        ]

    def _split(self, conversation: _Conversation, asked: str, fulls: list[str]) -> Rendered:
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
        probe = [*conversation.prompt, {**conversation.fulls[0][num_prompt], "content": SENTINEL}]
        try:
            text = str(self._tokenizer.apply_chat_template(probe, tokenize=False, **self._template_kwargs))
        except _TEMPLATE_ERRORS:
            text = ""
        prompt = text.partition(SENTINEL)[0]
        if SENTINEL in text and prompt and all(full.startswith(prompt) for full in fulls):
            return prompt
        at = min(num_shared(asked, full) for full in fulls)
        raise RowError(
            "the chat template rewrites earlier turns depending on the answer: at character "
            f"{at}, {asked[at : at + 30]!r} becomes {[full[at : at + 30] for full in fulls]}; "
            "give the tokenizer a template that only appends, or set data.chat_template: none"
        )


def _turn(message: Message, encoder: Encoder, guarded: bool) -> dict[str, str]:
    if not guarded:
        return {"role": message.role, "content": message.content}
    return {"role": encoder.quote(message.role), "content": encoder.quote(message.content)}


def or_reason(make: Callable[..., _Made], *args: Any) -> _Made | RowError:
    """What a function makes of one row, or the reason why it does not, so that the rest of a batch goes on."""
    try:
        return make(*args)
    except RowError as error:
        return error
