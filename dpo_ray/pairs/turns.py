"""What one value of a row says: texts, turns and whole conversations, or why it cannot be read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_ray.errors import RowError
from dpo_ray.types import Message

# Who speaks in ShareGPT's turns {'from': ..., 'value': ...}.
_ROLE_OF_SPEAKER = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
}

# Why an answer has turns of the assistant alone.
ALL_TRAINED = "every token of an answer is trained, and what a user says or a tool returns is not the model's to write"

# Under which name the assistant's thoughts stand depends on who wrote the data.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Keys of a turn that reach the template as they are, beside role, content and tool_calls.
_KEPT_KEYS = ("tool_call_id", "name", *REASONING_KEYS)

# Far beyond what a function needs, and below what Python's stack holds.
_MOST_NESTED = 64


def kind(value: Any) -> str:
    """A value's kind in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a string"
    if is_list(value):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return f"of type {type(value).__name__}"


def is_list(value: Any) -> bool:
    """Whether a value is a list; lists of structs come as object arrays where rows went through numpy batches."""
    return isinstance(value, (list, tuple, np.ndarray))


def read_number(value: Any) -> float | None:
    """A finite number; None where a value is none, or too large for one: JSON's integers have any length."""
    try:
        if isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    return None


def read_text(value: Any, where: str) -> str:
    """A string that a tokenizer can read.

    Raises:
        RowError: It is no string, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind(value)}: write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} holds half of a UTF-16 surrogate pair at character {error.start}, which no tokenizer can read: "
            "repair or drop that character"
        ) from None
    return value


def read_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """The objects of a list, or of a JSON text of one; none where there is nothing.

    Keys that are null are left out, in objects at any depth: a Parquet file has every key of any row in all of them.
    A JSON text is taken as it stands.

    Raises:
        RowError: It is neither, an entry is no object, or something in it cannot be read.
    """
    given = value
    if isinstance(given, str):
        try:
            value = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where} is not valid JSON: {error}; write a list of objects, or leave it out") from None
    if value is None:
        return []
    if not is_list(value):
        raise RowError(f"{where} is {kind(value)}: write a list of objects, or a JSON text of one")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, Mapping):
            raise RowError(f"entry {number} of {where} is {kind(entry)}: write an object")
    return [_plain(entry, where, keep_nulls=isinstance(given, str)) for entry in value]


def _plain(value: Any, where: str, keep_nulls: bool, depth: int = 1) -> Any:
    """A value as JSON has it."""
    if depth > _MOST_NESTED:
        raise RowError(f"{where} has more than {_MOST_NESTED} objects and lists within each other: write it flatter")
    if isinstance(value, Mapping):
        return {
            read_text(key, f"a key of {where}"): _plain(item, where, keep_nulls, depth + 1)
            for key, item in value.items()
            if keep_nulls or item is not None
        }
    if is_list(value):
        return [_plain(item, where, keep_nulls, depth + 1) for item in value]
    return read_text(value, f"a text of {where}") if isinstance(value, str) else value


def read_turns(value: Any, where: str) -> tuple[Message, ...]:
    """The turns of a list, or of a single object.

    Raises:
        RowError: It is neither, the list is empty, or a turn cannot be read.
    """
    if isinstance(value, Mapping):
        return (_turn(value, where),)
    if not is_list(value):
        raise RowError(f"{where} is {kind(value)}: write a list of turns")
    if len(value) == 0:
        raise RowError(f"{where} is an empty list: write at least one turn")
    return tuple(_turn(turn, f"turn {number} of {where}") for number, turn in enumerate(value, start=1))


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {kind(turn)}: write an object {{'role': ..., 'content': ...}}")
    from_speaker = turn.get("role") is None and turn.get("from") is not None
    role_key, content_key = ("from", "value") if from_speaker else ("role", "content")
    extra = _extra(turn, where)
    needs_content = turn.get(content_key) is not None or "tool_calls" not in extra
    for key in (role_key, content_key) if needs_content else (role_key,):
        if not isinstance(turn.get(key), str):
            raise RowError(f"{where} has {key!r} = {kind(turn.get(key))}, keys {list(turn)}: write {key!r} as a string")
    role = read_text(turn[role_key], where)
    content = read_text(turn[content_key], where) if needs_content else None
    if from_speaker:
        if role not in _ROLE_OF_SPEAKER:
            raise RowError(f"{where} is from {role!r}: known are {', '.join(_ROLE_OF_SPEAKER)}; rename the speaker")
        role = _ROLE_OF_SPEAKER[role]
    return Message(role, content, extra or None)


def _extra(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    if turn.get("function_call") is not None:
        raise RowError(f"{where} has 'function_call', which chat templates do not know: write 'tool_calls'")
    calls = read_objects(turn.get("tool_calls"), f"'tool_calls' of {where}")
    texts = {key: read_text(turn[key], f"{key!r} of {where}") for key in _KEPT_KEYS if turn.get(key) is not None}
    return {"tool_calls": calls, **texts} if calls else texts


def says_nothing(turns: Sequence[Message]) -> bool:
    """Whether turns have neither text nor tool calls."""
    return not any((turn.content or "").strip() or "tool_calls" in (turn.extra or {}) for turn in turns)


def num_shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Over how many items two sequences begin alike."""
    for index, (left_item, right_item) in enumerate(zip(left, right, strict=False)):
        if left_item != right_item:
            return index
    return min(len(left), len(right))


def split_conversations(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """Parts two whole conversations into the prompt that they share and their answers.

    Turns of the assistant right before the place where the two part belong to the answers: a prompt ends with what is
    answered. So of two equal conversations the last turns of the assistant are the answer.

    Returns:
        The prompt, and the answers, each of assistant turns alone.

    Raises:
        RowError: They share no prompt, or differ in more than assistant turns.
    """
    shared = num_shared(chosen, rejected)
    first = shared
    while first and chosen[first - 1].role == "assistant":
        first -= 1
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) == first:
            raise RowError(
                f"the conversation of {column!r} ends with turn {first}, of role {turns[-1].role!r}: "
                "it must end with an assistant turn, the answer"
            )
        for number, turn in enumerate(turns[first:], start=first + 1):
            if turn.role != "assistant":
                raise RowError(
                    f"the conversations of 'chosen' ({len(chosen)} turns) and 'rejected' ({len(rejected)} turns) part "
                    f"at turn {shared + 1}, and turn {number} of {column!r} has role {turn.role!r}: behind the prompt "
                    f"that both begin with there may be assistant turns only, for {ALL_TRAINED}; write both with the "
                    "same prompt, end them before that turn, or leave the row out"
                )
    if not any(turn.role != "system" for turn in chosen[:first]):
        raise RowError(
            "the conversations of 'chosen' and 'rejected' begin with no common prompt: begin both with the same user "
            "turns, or write a column 'prompt'"
        )
    return chosen[:first], (chosen[first:], rejected[first:])
