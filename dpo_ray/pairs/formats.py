"""Raw row -> PreferencePair.

To add a format: write its `matches` and `parse` functions and put one entry into `FORMATS`; the first entry
that matches a row parses it. A column that is null counts as absent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.errors import RowError
from dpo_ray.types import Message, PreferencePair

HUMAN_MARKER = "\n\nHuman: "
ASSISTANT_MARKER = "\n\nAssistant: "

_MARKER_OF_ROLE = {"user": HUMAN_MARKER, "assistant": ASSISTANT_MARKER}
_ROLE_OF_MARKER = {marker: role for role, marker in _MARKER_OF_ROLE.items()}
_MARKERS = re.compile(f"({HUMAN_MARKER}|{ASSISTANT_MARKER})")

# Keys of a turn that a chat template would render and that a Message cannot carry: dropping them would train on
# something else than the row says.
_UNSUPPORTED_TURN_KEYS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking")

_MAX_COLUMNS_NAMED = 12


@dataclass(frozen=True, slots=True)
class Format:
    """One way in which a row may be written.

    Attributes:
        description: What such a row looks like; shown to the user whose row fits no format.
        matches: Whether a row is meant to be of this format, by its columns and the kinds of their values.
        parse: Makes the pair of a row that matches, or raises RowError.
    """

    description: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], PreferencePair]


def parse_row(row: Mapping[str, Any]) -> PreferencePair:
    """Reads one row in whichever format of `FORMATS` it is written; all text is kept verbatim.

    Args:
        row: Column name -> value, as read from JSON Lines or Parquet. Columns of no format are ignored.

    Returns:
        The pair. Chosen and rejected may be equal.

    Raises:
        RowError: The row fits no format, holds a wrong kind of value, or an answer is blank.
    """
    for row_format in FORMATS:
        if row_format.matches(row):
            return row_format.parse(row)
    columns = [f"{name!r} ({_kind(value)})" for name, value in row.items()]
    if len(columns) > _MAX_COLUMNS_NAMED:
        columns[_MAX_COLUMNS_NAMED:] = [f"{len(columns) - _MAX_COLUMNS_NAMED} more"]
    found = ", ".join(columns) if columns else "no columns"
    known = "; or ".join(row_format.description for row_format in FORMATS)
    raise RowError(f"the row fits no known format: it has {found}; write it as {known}")


def transcript(messages: Sequence[Message]) -> str:
    """Joins turns to an hh-rlhf dialogue: the inverse of how one is parsed.

    Args:
        messages: Turns with role user or assistant.

    Returns:
        The dialogue, each turn behind its marker.
    """
    return "".join(_MARKER_OF_ROLE[message.role] + message.content for message in messages)


def _is_text(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("prompt"), str) and _has_answers(row)


def _parse_text(row: Mapping[str, Any]) -> PreferencePair:
    prompt = (Message("user", _text(row["prompt"], "column 'prompt'")),)
    for column in ("chosen", "rejected"):
        if not isinstance(row[column], str):
            raise RowError(
                f"column {column!r} is {_kind(row[column])} while 'prompt' is a string: "
                "write both as strings, or the prompt as a list of turns too"
            )
    return PreferencePair(prompt, (_string_answer(row, "chosen"), _string_answer(row, "rejected")), "text")


def _is_messages(row: Mapping[str, Any]) -> bool:
    return _is_list(row.get("prompt")) and _has_answers(row)


def _parse_messages(row: Mapping[str, Any]) -> PreferencePair:
    prompt = _turns(row["prompt"], "prompt")
    if prompt[-1].role == "assistant":
        raise RowError(
            "column 'prompt' ends with an assistant turn: end it with the turn that is answered, "
            "and put what the assistant says into 'chosen' and 'rejected'"
        )
    return PreferencePair(prompt, (_answer(row, "chosen"), _answer(row, "rejected")), "messages")


def _is_dialogue(row: Mapping[str, Any]) -> bool:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None or not isinstance(chosen, str) or not isinstance(rejected, str):
        return False
    # One of them is enough, so that a damaged other one is named instead of "fits no format".
    return chosen.startswith(HUMAN_MARKER) or rejected.startswith(HUMAN_MARKER)


def _parse_dialogue(row: Mapping[str, Any]) -> PreferencePair:
    chosen, rejected = _dialogue_turns(row, "chosen"), _dialogue_turns(row, "rejected")
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        shared = _num_shared(chosen, rejected)
        raise RowError(
            f"the dialogues of 'chosen' ({len(chosen)} turns) and 'rejected' ({len(rejected)} turns) part at turn "
            f"{shared + 1}: they may differ only in the last assistant turn of both; cut both after that turn, "
            "or leave the row out"
        )
    prompt = chosen[:-1]
    if prompt[-1].role != "user":
        raise RowError(
            f"turn {len(prompt)} of the dialogues, the one before the answer, is an assistant turn: "
            "a prompt must end with a user turn; join the last two assistant turns, or leave the row out"
        )
    answers = (chosen[-1:], rejected[-1:])
    for column, answer in zip(("chosen", "rejected"), answers, strict=True):
        _require_content(answer, column)
    return PreferencePair(prompt, answers, "dialogue")


FORMATS: tuple[Format, ...] = (
    Format("'prompt', 'chosen' and 'rejected' as strings", _is_text, _parse_text),
    Format(
        "'prompt' as a list of turns {'role': ..., 'content': ...}, 'chosen' and 'rejected' as lists of assistant "
        "turns or as strings",
        _is_messages,
        _parse_messages,
    ),
    Format(
        f"'chosen' and 'rejected' alone, as whole hh-rlhf dialogues that begin with {HUMAN_MARKER!r}",
        _is_dialogue,
        _parse_dialogue,
    ),
)


def _has_answers(row: Mapping[str, Any]) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _answer(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    value = row[column]
    if isinstance(value, str):
        return _string_answer(row, column)
    if not _is_list(value):
        raise RowError(f"column {column!r} is {_kind(value)}: write a list of assistant turns, or a string")
    answer = _turns(value, column)
    for number, turn in enumerate(answer, start=1):
        if turn.role != "assistant":
            raise RowError(
                f"turn {number} of column {column!r} has role {turn.role!r}: with a 'prompt' column an answer holds "
                "assistant turns only; leave the prompt's turns out of it"
            )
    _require_content(answer, column)
    return answer


def _string_answer(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    answer = (Message("assistant", _text(row[column], f"column {column!r}")),)
    _require_content(answer, column)
    return answer


def _require_content(answer: Sequence[Message], column: str) -> None:
    if not any(message.content.strip() for message in answer):
        raise RowError(
            f"the answer of column {column!r} is empty or blank: there is nothing to learn; leave the row out"
        )


def _turns(value: Any, column: str) -> tuple[Message, ...]:
    if len(value) == 0:
        raise RowError(f"column {column!r} is an empty list: write at least one turn")
    return tuple(_turn(turn, f"turn {number} of column {column!r}") for number, turn in enumerate(value, start=1))


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {_kind(turn)}: write an object {{'role': ..., 'content': ...}}")
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise RowError(
                f"{where} has {key!r} = {_kind(turn.get(key))}, keys {list(turn)}: write {key!r} as a string"
            )
    for key in _UNSUPPORTED_TURN_KEYS:
        if turn.get(key) is not None:
            raise RowError(f"{where} has {key!r}, which is not supported: only 'role' and 'content' reach the template")
    return Message(_text(turn["role"], where), _text(turn["content"], where))


def _dialogue_turns(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    text = _text(row[column], f"column {column!r}")
    if not text.startswith(HUMAN_MARKER):
        raise RowError(
            f"column {column!r} is a string that does not begin with {HUMAN_MARKER!r}, while the other answer does: "
            "write both as whole dialogues, or give the row a 'prompt' column"
        )
    pieces = _MARKERS.split(text)[1:]
    turns = tuple(
        Message(_ROLE_OF_MARKER[marker], content) for marker, content in zip(pieces[::2], pieces[1::2], strict=True)
    )
    if turns[-1].role != "assistant":
        raise RowError(
            f"the dialogue of column {column!r} ends with a user turn: it must end with {ASSISTANT_MARKER!r}..."
        )
    return turns


def _num_shared(left: Sequence[Message], right: Sequence[Message]) -> int:
    shared = 0
    for left_turn, right_turn in zip(left, right, strict=False):
        if left_turn != right_turn:
            break
        shared += 1
    return shared


def _text(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} holds half of a UTF-16 surrogate pair at character {error.start}, which no tokenizer can read: "
            "repair or drop that character"
        ) from None
    return value


def _is_list(value: Any) -> bool:
    # Lists of structs come as object arrays where rows went through numpy batches.
    return isinstance(value, (list, tuple, np.ndarray))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a string"
    if _is_list(value):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return f"of type {type(value).__name__}"
