"""The ways in which a row can be written: whether one is meant by a row, and the pair that it then says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dpo_ray.errors import RowError, TiedError
from dpo_ray.pairs.turns import (
    ALL_TRAINED,
    is_list,
    kind,
    num_shared,
    read_number,
    read_objects,
    read_text,
    read_turns,
    says_nothing,
    split_conversations,
)
from dpo_ray.types import Message, PreferencePair, TokenRow

Role = Literal["prompt", "chosen", "rejected", "system", "input", "tools", "answers", "scores"]

HUMAN_MARKER = "\n\nHuman: "
ASSISTANT_MARKER = "\n\nAssistant: "

_MARKER_OF_ROLE = {"user": HUMAN_MARKER, "assistant": ASSISTANT_MARKER}
_ROLE_OF_MARKER = {marker: role for role, marker in _MARKER_OF_ROLE.items()}
_MARKERS = re.compile(f"({HUMAN_MARKER}|{ASSISTANT_MARKER})")

_MAX_COLUMNS_NAMED = 12
_MAX_TOKEN = 2**31 - 1
# Where an answer that is an object has its text, and its score.
_TEXT_KEYS = ("response", "text", "completion", "answer")
_SCORE_KEYS = ("overall_score", "score", "rating")
# A shorter prompt may begin an answer by chance ("Hi" / "Hi there").
_MIN_REPEATED_CHARACTERS = 4


class RankingRule(NamedTuple):
    """What of a ranking is used.

    Attributes:
        keep: `all` answers, or only the `best_worst` ones.
        min_score_gap: An answer is used where its score is lower, by more than this, than that of the one before.
    """

    keep: str = "all"
    min_score_gap: float = 0.0


class Fields:
    """A row's values by role, how to name their columns, and what of a ranking is used."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], rule: RankingRule | None = None) -> None:
        self._row = row
        self._columns = columns
        self.rule = rule or RankingRule()

    def get(self, role: Role) -> Any:
        """The value of a role; None where it has no column or the column is null."""
        name = self._columns.get(role)
        return None if name is None else self._row.get(name)

    def has(self, role: Role) -> bool:
        """Whether the source has a column of a role."""
        return role in self._columns

    def where(self, role: Role) -> str:
        """How to name a role's column in an error."""
        return f"column {self._columns.get(role, role)!r}"

    def need(self, role: Role) -> Any:
        """A role's value. Raises RowError where there is none."""
        value = self.get(role)
        if value is None:
            name = self._columns.get(role, role)
            problem = f"{self.where(role)} is null" if name in self._row else f"no {self.where(role)}"
            raise RowError(f"{problem}: fill it in, or leave the row out; the row has {describe(self._row)}")
        return value

    def text(self, role: Role) -> str:
        """A role's text. Raises RowError where it is none."""
        return read_text(self.need(role), self.where(role))

    def optional_text(self, role: Role) -> str:
        """A text that may be missing, and says nothing where it is blank."""
        value = self.get(role)
        text = "" if value is None else read_text(value, self.where(role))
        return text if text.strip() else ""

    def tools(self) -> list[dict[str, Any]] | None:
        """The functions that the model may call; None where there are none. Raises RowError."""
        return read_objects(self.get("tools"), self.where("tools")) or None


def transcript(messages: Sequence[Message]) -> str:
    """Joins turns to an hh-rlhf dialogue: the inverse of how one is parsed.

    Args:
        messages: Turns with role user or assistant.

    Returns:
        The dialogue, each turn behind its marker.
    """
    return "".join(_MARKER_OF_ROLE[message.role] + (message.content or "") for message in messages)


def describe(row: Mapping[str, Any]) -> str:
    """A row's columns and their kinds, for people."""
    columns = [f"{name!r} ({kind(value)})" for name, value in row.items()]
    if len(columns) > _MAX_COLUMNS_NAMED:
        columns[_MAX_COLUMNS_NAMED:] = [f"{len(columns) - _MAX_COLUMNS_NAMED} more"]
    return ", ".join(columns) if columns else "no columns"


def _strings(row: Fields, *roles: Role) -> bool:
    return all(isinstance(row.get(role), str) for role in roles)


def prompt_turns(row: Fields) -> tuple[Message, ...]:
    """The turns of a prompt that is a text or a list of turns. Raises RowError."""
    value = row.need("prompt")
    reference = row.optional_text("input")
    if isinstance(value, str):
        return (Message("user", row.text("prompt") + ("\n\n" + reference if reference else "")),)
    if reference:
        raise RowError(
            f"{row.where('input')} stands beside a list of turns, of which none is meant to take it: put it into a "
            "turn, or set data.columns: {input: null}"
        )
    return read_turns(value, row.where("prompt"))


def _with_system(row: Fields, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    system = row.optional_text("system")
    if not system:
        return prompt
    own = [message.content for message in prompt if message.role == "system"]
    if any(content != system for content in own):
        raise RowError(
            f"{row.where('system')} and the conversation's own system turn differ: keep one of them, or set "
            "data.columns: {system: null}"
        )
    return prompt if own else (Message("system", system), *prompt)


def _string_answer(row: Fields, role: Role, text: str) -> tuple[Message, ...]:
    answer = (Message("assistant", text),)
    _require_content(row, role, answer)
    return answer


def _require_content(row: Fields, role: Role, answer: Sequence[Message]) -> None:
    if says_nothing(answer):
        raise RowError(
            f"the answer of {row.where(role)} is empty or blank: there is nothing to learn; leave the row out"
        )


def is_text(row: Fields) -> bool:
    """Whether the prompt and an answer are strings."""
    # One answer is enough, so that a damaged other one is named instead of "fits no format".
    return _strings(row, "prompt", "chosen") or _strings(row, "prompt", "rejected")


def _text_pair(row: Fields, chosen: str, rejected: str) -> PreferencePair:
    prompt = _with_system(row, prompt_turns(row))
    answers = (_string_answer(row, "chosen", chosen), _string_answer(row, "rejected", rejected))
    return PreferencePair(prompt, answers, "text" if len(prompt) == 1 else "messages", row.tools())


def parse_text(row: Fields) -> PreferencePair:
    """A prompt and answers as strings. Raises RowError."""
    row.text("prompt")
    return _text_pair(row, row.text("chosen"), row.text("rejected"))


def is_repeated(row: Fields) -> bool:
    """Whether prompt and answers are strings, and both answers begin with a prompt long enough to be no chance."""
    if not _strings(row, "prompt", "chosen", "rejected"):
        return False
    prompt = row.get("prompt")
    begins = row.get("chosen").startswith(prompt) and row.get("rejected").startswith(prompt)
    return begins and len(prompt.strip()) >= _MIN_REPEATED_CHARACTERS


def parse_repeated(row: Fields) -> PreferencePair:
    """Strings of which the answers repeat the prompt. Raises RowError."""
    prompt, chosen, rejected = row.text("prompt"), row.text("chosen"), row.text("rejected")
    for role, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.startswith(prompt):
            raise RowError(
                f"column {role!r} does not begin with the prompt's text, as this source's answers do: repeat the "
                "prompt there too, or set data.format: text where no answer repeats it"
            )
    return _text_pair(row, chosen[len(prompt) :], rejected[len(prompt) :])


def is_messages(row: Fields) -> bool:
    """Whether the prompt is a list of turns, or an answer is one, or a single turn."""
    answers = (row.get("chosen"), row.get("rejected"))
    of_turns = any(is_list(value) or isinstance(value, Mapping) for value in answers)
    return of_turns or (is_list(row.get("prompt")) and any(isinstance(value, str) for value in answers))


def parse_messages(row: Fields) -> PreferencePair:
    """A prompt of turns or text, and answers of turns with or without it, or of text. Raises RowError."""
    prompt = prompt_turns(row)
    if prompt[-1].role == "assistant":
        raise RowError(
            f"{row.where('prompt')} ends with an assistant turn: end it with the turn that is answered, and put what "
            "the assistant says into 'chosen' and 'rejected'; or set data.columns: {prompt: null} where these hold "
            "whole conversations"
        )
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if any(turn.role != "assistant" for turn in chosen + rejected):
        shared, answers = split_conversations(chosen, rejected)
        if not _repeats_turns(prompt, shared):
            raise RowError(
                f"the conversations of 'chosen' and 'rejected' have another prompt than {row.where('prompt')}: write "
                "the same turns, or all turns before the answers into 'prompt', or set data.columns: {prompt: null} "
                "where these hold whole conversations"
            )
        prompt = shared
    else:
        answers = (chosen, rejected)
    for role, answer in zip(("chosen", "rejected"), answers, strict=True):
        _require_content(row, role, answer)  # type: ignore[arg-type]
    return PreferencePair(_with_system(row, prompt), answers, "messages", row.tools())


def _answer(row: Fields, role: Role) -> tuple[Message, ...]:
    value = row.need(role)
    return (Message("assistant", row.text(role)),) if isinstance(value, str) else read_turns(value, row.where(role))


def _repeats_turns(prompt: tuple[Message, ...], shared: tuple[Message, ...]) -> bool:
    """Whether the shared turns begin, behind a system turn, or end with the prompt's."""
    own = shared[1:] if shared[0].role == "system" and prompt[0].role != "system" else shared
    return prompt in (own[: len(prompt)], own[-len(prompt) :])


def is_ranking(row: Fields) -> bool:
    """Whether the answers are a list, and have scores: of others nobody knows whether the best comes first."""
    answers = row.get("answers")
    return is_list(answers) and (is_list(row.get("scores")) or any(_score_key(each) is not None for each in answers))


def parse_ranking(row: Fields) -> PreferencePair:
    """A prompt and a list of answers, best first or with scores. Raises RowError."""
    value = row.need("answers")
    if not is_list(value) or len(value) < 2:
        found = f"has {len(value)} answers" if is_list(value) else f"is {kind(value)}"
        raise RowError(f"{row.where('answers')} {found}: write a list of two or more answers, or leave the row out")
    where = [f"answer {number} of {row.where('answers')}" for number in range(1, len(value) + 1)]
    answers = [_ranked_answer(each, place) for each, place in zip(value, where, strict=True)]
    scores = _scores(row, value, where)
    order = list(range(len(answers)))
    if scores is not None:
        # Sorting is stable: of equal scores the first stays first.
        order.sort(key=lambda index: -scores[index])
        kept = order[:1]
        for index in order[1:]:
            if scores[kept[-1]] - scores[index] > row.rule.min_score_gap:
                kept.append(index)
        if len(kept) < 2:
            raise TiedError(
                f"no answer's score is below another's by more than data.min_score_gap ({row.rule.min_score_gap:g}): "
                f"{', '.join(f'{score:g}' for score in scores)}"
            )
        order = kept
    if row.rule.keep == "best_worst":
        order = [order[0], order[-1]]
    theirs = () if scores is None else tuple(scores[index] for index in order)
    return _several(row, [answers[index] for index in order], theirs)


def is_several_rejected(row: Fields) -> bool:
    """Whether the rejected answers are a list of answers, each a text or a list of turns."""
    rejected = row.get("rejected")
    return is_list(rejected) and len(rejected) > 0 and not any(isinstance(each, Mapping) for each in rejected)


def parse_several_rejected(row: Fields) -> PreferencePair:
    """A prompt, a chosen answer, and a list of rejected ones. Raises RowError."""
    value = row.need("rejected")
    if not is_several_rejected(row):
        raise RowError(f"{row.where('rejected')} is {kind(value)}: write a list of answers, as this source's rows do")
    answers = [_ranked_answer(row.need("chosen"), row.where("chosen"))]
    for number, each in enumerate(value, start=1):
        answers.append(_ranked_answer(each, f"answer {number} of {row.where('rejected')}"))
    return _several(row, answers)


def _several(row: Fields, answers: Sequence[tuple[Message, ...]], scores: tuple[float, ...] = ()) -> PreferencePair:
    prompt = _with_system(row, prompt_turns(row))
    if prompt[-1].role == "assistant":
        raise RowError(f"{row.where('prompt')} ends with an assistant turn: end it with the turn that is answered")
    plain = len(prompt) == 1 and prompt[0].role == "user" and all(len(answer) == 1 for answer in answers)
    layout: Literal["text", "messages"] = "text" if plain and isinstance(row.get("prompt"), str) else "messages"
    return PreferencePair(prompt, tuple(answers), layout, row.tools(), scores)


def _text_key(answer: Mapping[str, Any]) -> str | None:
    return next((key for key in _TEXT_KEYS if answer.get(key) is not None), None)


def _ranked_answer(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, Mapping):
        key = _text_key(value)
        if key is not None:
            value = read_text(value[key], f"{key!r} of {where}")
    turns = (Message("assistant", read_text(value, where)),) if isinstance(value, str) else read_turns(value, where)
    if any(turn.role != "assistant" for turn in turns):
        raise RowError(
            f"{where} has a turn that is not the assistant's, and {ALL_TRAINED}: write the prompt's turns into "
            "'prompt', and end the answer before any other"
        )
    if says_nothing(turns):
        raise RowError(f"{where} is empty or blank: there is nothing to learn; leave it out")
    return turns


def _score_key(answer: Any) -> str | None:
    return next((key for key in _SCORE_KEYS if isinstance(answer, Mapping) and key in answer), None)


def _scores(row: Fields, answers: Sequence[Any], where: Sequence[str]) -> list[float] | None:
    """The answers' scores, or None where the source has none and they are ranked as they stand."""
    value: Any
    if not row.has("scores"):
        keys = [_score_key(each) for each in answers]
        if all(key is None for key in keys):
            if any(isinstance(each, Mapping) and _text_key(each) is not None for each in answers):
                raise RowError(
                    f"{row.where('answers')} has answers that are objects without a score: write one of "
                    f"{', '.join(_SCORE_KEYS)} into each, a column 'scores', or the answers as texts, best first"
                )
            if row.rule.min_score_gap:
                raise RowError(
                    f"{row.where('answers')} has no scores, which data.min_score_gap is about: write a column "
                    "'scores', or leave data.min_score_gap out"
                )
            return None
        value = [each[key] if key is not None else None for each, key in zip(answers, keys, strict=True)]
    else:
        value = row.need("scores")
    if not is_list(value) or len(value) != len(answers):
        found = f"has {len(value)}" if is_list(value) else f"is {kind(value)}"
        raise RowError(f"{row.where('scores')} {found}, beside {len(answers)} answers: write a number for each of them")
    return [_score(score, f"the score of {place}") for score, place in zip(value, where, strict=True)]


def _score(value: Any, where: str) -> float:
    score = read_number(value)
    if score is None:
        raise RowError(f"{where} is {value!r:.40}: write a finite number, the higher the better")
    return score


def pair_scores(row: Mapping[str, Any], columns: Sequence[str], num_answers: int, min_gap: float) -> tuple[float, ...]:
    """The scores that stand beside a pair, of the chosen answer and of the rejected one.

    Args:
        row: Column name -> value.
        columns: As `data.score_columns`.
        num_answers: How many answers the row has.
        min_gap: By more than this the chosen answer's is to be higher.

    Raises:
        TiedError: It is not.
        RowError: A score is missing or no finite number, or there are more answers.
    """
    if num_answers != len(columns):
        raise RowError(
            f"{', '.join(columns)}: data.score_columns brings {len(columns)} scores, the row has {num_answers} "
            "answers; leave the row out, or data.score_columns"
        )
    for column in columns:
        if column not in row:
            raise RowError(f"no column {column!r}, which data.score_columns names: write it, or leave the row out")
    scores = tuple(_score(row[column], f"column {column!r}") for column in columns)
    if not scores[0] - scores[1] > min_gap:
        raise TiedError(
            f"the chosen answer's score is not above the rejected one's by more than data.min_score_gap ({min_gap:g}): "
            f"{', '.join(f'{score:g}' for score in scores)}"
        )
    return scores


def is_conversations(row: Fields) -> bool:
    """Whether an answer is a list."""
    return is_list(row.get("chosen")) or is_list(row.get("rejected"))


def parse_conversations(row: Fields) -> PreferencePair:
    """Two whole conversations that begin alike. Raises RowError."""
    prompt, answers = split_conversations(_answer(row, "chosen"), _answer(row, "rejected"))
    _require_content(row, "chosen", answers[0])
    _require_content(row, "rejected", answers[1])
    return PreferencePair(_with_system(row, prompt), answers, "messages", row.tools())


def is_dialogue(row: Fields) -> bool:
    """Whether both answers are strings, and one begins as an hh-rlhf dialogue."""
    if not _strings(row, "chosen", "rejected"):
        return False
    # One of them is enough, so that a damaged other one is named instead of "fits no format".
    return bool(row.get("chosen").startswith(HUMAN_MARKER) or row.get("rejected").startswith(HUMAN_MARKER))


def parse_dialogue(row: Fields) -> PreferencePair:
    """Two hh-rlhf dialogues that differ in their last turn. Raises RowError."""
    chosen, rejected = _dialogue_turns(row, "chosen"), _dialogue_turns(row, "rejected")
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise RowError(
            f"the dialogues of 'chosen' ({len(chosen)} turns) and 'rejected' ({len(rejected)} turns) part at turn "
            f"{num_shared(chosen, rejected) + 1}: they may differ only in the last assistant turn of both; cut both "
            "after that turn, or leave the row out"
        )
    prompt = chosen[:-1]
    if prompt[-1].role != "user":
        raise RowError(
            f"turn {len(prompt)} of the dialogues, the one before the answer, is an assistant turn: "
            "a prompt must end with a user turn; join the last two assistant turns, or leave the row out"
        )
    answers = (chosen[-1:], rejected[-1:])
    _require_content(row, "chosen", answers[0])
    _require_content(row, "rejected", answers[1])
    return PreferencePair(prompt, answers, "dialogue")


def _dialogue_turns(row: Fields, role: Role) -> tuple[Message, ...]:
    text = row.text(role)
    if not text.startswith(HUMAN_MARKER):
        raise RowError(
            f"{row.where(role)} is a string that does not begin with {HUMAN_MARKER!r}, while this source's answers "
            "do: write both as whole dialogues, or give the rows a 'prompt' column"
        )
    pieces = _MARKERS.split(text)[1:]
    turns = tuple(
        Message(_ROLE_OF_MARKER[marker], content) for marker, content in zip(pieces[::2], pieces[1::2], strict=True)
    )
    if turns[-1].role != "assistant":
        raise RowError(
            f"the dialogue of {row.where(role)} ends with a user turn: it must end with {ASSISTANT_MARKER!r}..."
        )
    return turns


def is_continuation(row: Fields) -> bool:
    """Whether both answers are strings that share whole words at their beginning."""
    if not _strings(row, "chosen", "rejected"):
        return False
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return not chosen.startswith(HUMAN_MARKER) and _boundary(chosen, rejected) > 0


def parse_continuation(row: Fields) -> PreferencePair:
    """Two texts that begin alike. Raises RowError."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    _string_answer(row, "chosen", chosen), _string_answer(row, "rejected", rejected)
    cut = _boundary(chosen, rejected)
    if not cut:
        raise RowError(
            "the texts of 'chosen' and 'rejected' have no common beginning that ends with a whole word and leaves an "
            "answer: give the rows a 'prompt' column"
        )
    answers = ((Message("assistant", chosen[cut:]),), (Message("assistant", rejected[cut:]),))
    return PreferencePair((Message("user", chosen[:cut]),), answers, "raw")


def _boundary(chosen: str, rejected: str) -> int:
    """Where the last word ends that both texts begin with, such that each goes on with more than whitespace; else 0."""
    cut = min(num_shared(chosen, rejected), len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    while cut > 0 and not (chosen[cut].isspace() and rejected[cut].isspace() and not chosen[cut - 1].isspace()):
        cut -= 1
    return max(cut, 0)


def is_tokens(row: Fields) -> bool:
    """Whether prompt and answers are lists that begin with an integer."""
    values = [row.get(role) for role in ("prompt", "chosen", "rejected")]
    return all(is_list(value) and len(value) and _is_integer(value[0]) for value in values)


def parse_tokens(row: Fields) -> TokenRow:
    """Token ids. Raises RowError."""
    return TokenRow(_ids(row, "prompt"), (_ids(row, "chosen"), _ids(row, "rejected")))


def _ids(row: Fields, role: Role) -> list[int]:
    value = row.need(role)
    if not is_list(value):
        raise RowError(f"{row.where(role)} is {kind(value)}: write a list of token ids")
    for number, token in enumerate(value, start=1):
        if not _is_integer(token) or not 0 <= token <= _MAX_TOKEN:
            shown = token if _is_integer(token) else kind(token)
            raise RowError(f"token {number} of {row.where(role)} is {shown}: token ids are integers from 0 on")
    return [int(token) for token in value]


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
