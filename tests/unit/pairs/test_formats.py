"""Rows of each format become the pair that they say, verbatim; every other row says what is wrong with it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.errors import RowError
from dpo_ray.pairs.formats import parse_row, transcript
from dpo_ray.types import Message

HH_FILE = Path(__file__).resolve().parents[3].parent / "shared/data/hh-rlhf/harmless-base-2000.jsonl.gz"

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def hh_rows() -> list[dict[str, str]]:
    if not HH_FILE.exists():
        pytest.skip(f"needs the hh-rlhf sample at {HH_FILE}")
    with gzip.open(HH_FILE, "rt", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def reason_of(row: dict[str, Any]) -> str:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    return str(caught.value)


def test_strings_become_one_user_turn_and_one_assistant_turn_per_answer() -> None:
    pair = parse_row({"prompt": " Q\n", "chosen": "\tgood ", "rejected": "bad", "score": 3})
    assert pair.layout == "text"
    assert pair.prompt == (user(" Q\n"),)
    assert pair.answers == ((assistant("\tgood "),), (assistant("bad"),))


def test_turns_are_kept_in_order_with_roles_and_text() -> None:
    chosen = [{"role": "assistant", "content": "Because"}, {"role": "assistant", "content": "\n\nof that."}]
    pair = parse_row({"prompt": TURNS, "chosen": chosen, "rejected": [{"role": "assistant", "content": "No."}]})
    assert pair.layout == "messages"
    assert pair.prompt == (Message("system", "Be brief."), user("Why?"))
    assert pair.answers == ((assistant("Because"), assistant("\n\nof that.")), (assistant("No."),))


def test_string_answers_to_a_list_prompt_are_assistant_turns() -> None:
    pair = parse_row({"prompt": TURNS, "chosen": "Yes.", "rejected": [{"role": "assistant", "content": "No."}]})
    assert pair.layout == "messages"
    assert pair.answers == ((assistant("Yes."),), (assistant("No."),))


def test_turns_may_come_as_numpy_arrays_and_null_keys_are_absent() -> None:
    turns = np.array([{"role": "user", "content": "Why?", "tool_calls": None}], dtype=object)
    pair = parse_row({"prompt": turns, "chosen": "Yes.", "rejected": "No."})
    assert pair.prompt == (user("Why?"),)


@pytest.mark.parametrize("extra", [{}, {"prompt": None}])
def test_dialogues_part_in_their_last_turn(extra: dict[str, None]) -> None:
    shared = "\n\nHuman: Hi \n\nAssistant:  Hello\n\nHuman: \n\nWhy?\n\nAssistant: "
    pair = parse_row({"chosen": shared + "A\n", "rejected": shared + "B", **extra})
    assert pair.layout == "dialogue"
    assert pair.prompt == (user("Hi "), assistant(" Hello"), user("\n\nWhy?"))
    assert pair.answers == ((assistant("A\n"),), (assistant("B"),))


def test_empty_turns_and_markers_without_a_space_stay_text() -> None:
    """A marker ends with a space, so `\\n\\nAssistant:x` belongs to the turn; a turn may be empty."""
    shared = "\n\nHuman: \n\nAssistant: ok\n\nAssistant:x\n\nHuman: go\n\nAssistant: "
    pair = parse_row({"chosen": shared + "A", "rejected": shared + "B"})
    assert pair.prompt == (user(""), assistant("ok\n\nAssistant:x"), user("go"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": TURNS, "chosen": "same", "rejected": "same"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: same", "rejected": "\n\nHuman: Q\n\nAssistant: same"},
    ],
)
def test_equal_answers_are_a_pair(row: dict[str, Any]) -> None:
    chosen, rejected = parse_row(row).answers
    assert chosen == rejected == (assistant("same"),)


DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, ["no columns"]),
        ({"text": "x"}, ["'text' (a string)", "'prompt'", "hh-rlhf"]),
        ({"prompt": 3, "chosen": "a", "rejected": None}, ["'prompt' (of type int)", "'rejected' (null)"]),
        ({"chosen": "a", "rejected": "b"}, ["'chosen' (a string)", r"'\n\nHuman: '"]),
        ({"prompt": "Q", "chosen": "a", "rejected": 7}, ["'rejected'", "of type int", "strings"]),
        ({"prompt": "Q", "chosen": [], "rejected": "b"}, ["'chosen'", "a list", "list of turns"]),
        ({"prompt": "Q", "chosen": "a", "rejected": ""}, ["'rejected'", "empty"]),
        ({"prompt": "Q", "chosen": " \n", "rejected": "b"}, ["'chosen'", "blank"]),
        ({"prompt": "Q", "chosen": "ab\ud800", "rejected": "b"}, ["'chosen'", "surrogate", "character 2"]),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, ["'prompt'", "empty list"]),
        ({"prompt": ["Q"], "chosen": "a", "rejected": "b"}, ["turn 1", "'prompt'", "a string", "'role'"]),
        ({"prompt": [{"from": "human"}], "chosen": "a", "rejected": "b"}, ["turn 1", "'role'", "null", "'from'"]),
        (
            {"prompt": [*TURNS, {"role": "user", "content": [{"type": "text"}]}], "chosen": "a", "rejected": "b"},
            ["turn 3", "'content'", "a list"],
        ),
        (
            {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "a", "tool_calls": [1]}], "rejected": "b"},
            ["'chosen'", "'tool_calls'", "not supported"],
        ),
        ({"prompt": TURNS, "chosen": "a", "rejected": 1.5}, ["'rejected'", "of type float"]),
        ({"prompt": TURNS, "chosen": [], "rejected": "b"}, ["'chosen'", "empty list"]),
        ({"prompt": TURNS, "chosen": "a", "rejected": [{"role": "assistant", "content": ""}]}, ["'rejected'", "empty"]),
        (
            {"prompt": TURNS, "chosen": [*TURNS, {"role": "assistant", "content": "a"}], "rejected": "b"},
            ["turn 1", "'chosen'", "'system'", "leave the prompt's turns out"],
        ),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"},
            ["'prompt'", "ends with an assistant turn"],
        ),
        ({"chosen": DIALOGUE, "rejected": "d"}, ["'rejected'", "does not begin with"]),
        ({"chosen": "\n\nHuman: a", "rejected": DIALOGUE}, ["'chosen'", "ends with a user turn"]),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE.replace("b", "B")}, ["part at turn 2"]),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE.replace(": a", ": A")}, ["part at turn 1"]),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE[: DIALOGUE.index("\n\nHuman: c")]}, ["part at turn 3"]),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE[:-1]}, ["'rejected'", "empty"]),
        (
            {"chosen": DIALOGUE + "\n\nAssistant: e", "rejected": DIALOGUE + "\n\nAssistant: f"},
            ["turn 4", "must end with a user turn"],
        ),
        ({"chosen": DIALOGUE + "\udc00", "rejected": DIALOGUE}, ["'chosen'", "surrogate"]),
    ],
)
def test_a_row_that_is_no_pair_says_why(row: dict[str, Any], words: list[str]) -> None:
    reason = reason_of(row)
    assert [word for word in words if word not in reason] == [], reason


def test_a_wide_row_does_not_flood_the_reason() -> None:
    reason = reason_of({f"column_{number}": number for number in range(500)})
    assert "488 more" in reason
    assert len(reason) < 1000


CONTENT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["", "\n\n", "\n\nHuman:", "Assistant: "])
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), max_size=5), CONTENT, CONTENT)
def test_any_dialogue_reads_back_verbatim(turns: list[tuple[str, str]], chosen: str, rejected: str) -> None:
    """Turns may be empty, repeat a role or nearly contain a marker: what is parsed joins to what was given.

    An "x" behind each answer keeps it from being blank, and a full stop before each marker keeps a text's end from
    completing one.
    """
    shared = transcript([user("q"), *(Message(role, content + ".") for role, content in turns), user(".")])
    row = {"chosen": f"{shared}\n\nAssistant: {chosen}x", "rejected": f"{shared}\n\nAssistant: {rejected}x"}
    pair = parse_row(row)
    assert transcript(pair.prompt + pair.answers[0]) == row["chosen"]
    assert transcript(pair.prompt + pair.answers[1]) == row["rejected"]
    assert pair.answers == ((assistant(chosen + "x"),), (assistant(rejected + "x"),))


def test_every_row_of_hh_is_reproduced_or_refused_for_a_known_reason() -> None:
    """Counted in the file by hand: 4 pairs part early, 4 chosen answers are empty, none ends its prompt oddly."""
    num_pairs = 0
    reasons: Counter[str] = Counter()
    for row in hh_rows():
        try:
            pair = parse_row(row)
        except RowError as error:
            reasons["part" if "part at turn" in str(error) else "empty" if "empty" in str(error) else str(error)] += 1
            continue
        num_pairs += 1
        assert pair.prompt[-1].role == "user"
        assert transcript(pair.prompt + pair.answers[0]) == row["chosen"]
        assert transcript(pair.prompt + pair.answers[1]) == row["rejected"]
    assert reasons == {"part": 4, "empty": 4}
    assert num_pairs == 1992
