"""Rows of each format become the pair that they say, verbatim; every other row says what is wrong with it."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.errors import ConfigError, DataError, RowError, TiedError
from dpo_ray.pairs.formats import FORMATS, Reading, parse_row, recognise
from dpo_ray.pairs.parsers import ASSISTANT_MARKER, HUMAN_MARKER, transcript
from dpo_ray.types import Message, PreferencePair, TokenRow

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


def columns(*extra: str, **names: str) -> dict[str, str]:
    return {**{role: role for role in ("prompt", "chosen", "rejected", *extra)}, **names}


ANSWERS_ALONE = {"chosen": "chosen", "rejected": "rejected"}


def parse(row: dict[str, Any], **options: Any) -> PreferencePair:
    """The pair of a row whose source has only such rows."""
    pair = parse_row(row, recognise([row] * 4, **options))
    assert isinstance(pair, PreferencePair)
    return pair


def reason_of(row: dict[str, Any], format: str, *extra: str) -> str:
    """Why a row of a source of this format is no pair."""
    names = (
        columns(*extra) if "prompt" in FORMATS[format].roles else {**ANSWERS_ALONE, **{name: name for name in extra}}
    )
    with pytest.raises(RowError) as caught:
        parse_row(row, Reading(format, names))
    return str(caught.value)


def misfit_of(rows: list[dict[str, Any]], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        recognise(rows, **options)
    return str(caught.value)


def test_strings_become_one_user_turn_and_one_assistant_turn_per_answer() -> None:
    pair = parse({"prompt": " Q\n", "chosen": "\tgood ", "rejected": "bad", "score": 3})
    assert pair.layout == "text"
    assert pair.prompt == (user(" Q\n"),)
    assert pair.answers == ((assistant("\tgood "),), (assistant("bad"),))


def test_turns_are_kept_in_order_with_roles_and_text() -> None:
    chosen = [{"role": "assistant", "content": "Because"}, {"role": "assistant", "content": "\n\nof that."}]
    pair = parse({"prompt": TURNS, "chosen": chosen, "rejected": [{"role": "assistant", "content": "No."}]})
    assert pair.layout == "messages"
    assert pair.prompt == (Message("system", "Be brief."), user("Why?"))
    assert pair.answers == ((assistant("Because"), assistant("\n\nof that.")), (assistant("No."),))


def test_string_answers_to_a_list_prompt_are_assistant_turns() -> None:
    pair = parse({"prompt": TURNS, "chosen": "Yes.", "rejected": [{"role": "assistant", "content": "No."}]})
    assert pair.layout == "messages"
    assert pair.answers == ((assistant("Yes."),), (assistant("No."),))


def test_turns_may_come_as_numpy_arrays_and_null_keys_are_absent() -> None:
    turns = np.array([{"role": "user", "content": "Why?", "tool_calls": None}], dtype=object)
    pair = parse({"prompt": turns, "chosen": "Yes.", "rejected": "No."})
    assert pair.prompt == (user("Why?"),)


@pytest.mark.parametrize("extra", [{}, {"prompt": None}])
def test_dialogues_part_in_their_last_turn(extra: dict[str, None]) -> None:
    shared = "\n\nHuman: Hi \n\nAssistant:  Hello\n\nHuman: \n\nWhy?\n\nAssistant: "
    pair = parse({"chosen": shared + "A\n", "rejected": shared + "B", **extra})
    assert pair.layout == "dialogue"
    assert pair.prompt == (user("Hi "), assistant(" Hello"), user("\n\nWhy?"))
    assert pair.answers == ((assistant("A\n"),), (assistant("B"),))


def test_empty_turns_and_markers_without_a_space_stay_text() -> None:
    """A marker ends with a space, so `\\n\\nAssistant:x` belongs to the turn; a turn may be empty."""
    shared = "\n\nHuman: \n\nAssistant: ok\n\nAssistant:x\n\nHuman: go\n\nAssistant: "
    pair = parse({"chosen": shared + "A", "rejected": shared + "B"})
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
    chosen, rejected = parse(row).answers
    assert chosen == rejected == (assistant("same"),)


SYSTEM, WHY, YES, NO = (
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "Why is it so?"), ("assistant", "Yes"), ("assistant", "No"))
)
PAIR = ((user("Why is it so?"),), ((assistant("Yes"),), (assistant("No"),)))


def sharegpt(turn: dict[str, str]) -> dict[str, str]:
    speaker = {"system": "system", "user": "human", "assistant": "gpt"}[turn["role"]]
    return {"from": speaker, "value": turn["content"]}


ONE_PAIR_IN_ALL_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "strings": ("text", {"prompt": "Why is it so?", "chosen": "Yes", "rejected": "No"}),
    "question": ("text", {"question": "Why is it so?", "chosen": "Yes", "rejected": "No", "system": ""}),
    "instruction": ("text", {"instruction": "Why is it so?", "input": "", "chosen": "Yes", "rejected": "No"}),
    "input is the prompt": ("text", {"input": "Why is it so?", "chosen": "Yes", "rejected": "No"}),
    "blank input": ("text", {"prompt": "Why is it so?", "input": " \n", "chosen": "Yes", "rejected": "No"}),
    "repeated text": (
        "repeated",
        {"prompt": "Why is it so?", "chosen": "Why is it so?Yes", "rejected": "Why is it so?No"},
    ),
    "turns": ("messages", {"prompt": [WHY], "chosen": [YES], "rejected": [NO]}),
    "single turns": ("messages", {"prompt": [WHY], "chosen": YES, "rejected": NO}),
    "turns and strings": ("messages", {"prompt": [WHY], "chosen": "Yes", "rejected": "No"}),
    "string and turns": ("messages", {"prompt": "Why is it so?", "chosen": [YES], "rejected": NO}),
    "repeated turns": ("messages", {"prompt": [WHY], "chosen": [WHY, YES], "rejected": [WHY, NO]}),
    "ultrafeedback": ("messages", {"prompt": "Why is it so?", "chosen": [WHY, YES], "rejected": [WHY, NO]}),
    "sharegpt": (
        "messages",
        {"conversations": [sharegpt(WHY)], "chosen": sharegpt(YES), "rejected": sharegpt(NO)},
    ),
    "sharegpt lists": (
        "messages",
        {"conversations": [sharegpt(WHY)], "chosen": [sharegpt(YES)], "rejected": [sharegpt(NO)]},
    ),
    "conversations": ("conversations", {"chosen": [WHY, YES], "rejected": [WHY, NO]}),
    "sharegpt conversations": (
        "conversations",
        {"chosen": [sharegpt(WHY), sharegpt(YES)], "rejected": [sharegpt(WHY), sharegpt(NO)]},
    ),
    "dialogue": (
        "dialogue",
        {
            "chosen": "\n\nHuman: Why is it so?\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Why is it so?\n\nAssistant: No",
        },
    ),
}


@pytest.mark.parametrize("name", ONE_PAIR_IN_ALL_FORMATS)
def test_the_same_pair_in_any_format_is_the_same_pair(name: str) -> None:
    format, row = ONE_PAIR_IN_ALL_FORMATS[name]
    reading = recognise([row] * 4)
    pair = parse_row(row, reading)
    assert reading.format == format
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt, pair.answers) == PAIR


def test_the_same_pair_with_a_system_turn_too() -> None:
    turns = [SYSTEM, WHY]
    rows: list[dict[str, Any]] = [
        {"system": "Be brief.", "prompt": "Why is it so?", "chosen": "Yes", "rejected": "No"},
        {"system": "Be brief.", "prompt": [WHY], "chosen": [YES], "rejected": [NO]},
        {"system": "Be brief.", "prompt": turns, "chosen": [YES], "rejected": [NO]},
        {"prompt": turns, "chosen": "Yes", "rejected": "No"},
        {"prompt": "Why is it so?", "chosen": [*turns, YES], "rejected": [*turns, NO]},
        {"prompt": turns, "chosen": [*turns, YES], "rejected": [*turns, NO]},
        {"system": "Be brief.", "prompt": "Why is it so?", "chosen": [WHY, YES], "rejected": [WHY, NO]},
        {"system": "Be brief.", "chosen": [WHY, YES], "rejected": [WHY, NO]},
        {"chosen": [*turns, YES], "rejected": [*turns, NO]},
        {"conversations": [sharegpt(turn) for turn in turns], "chosen": sharegpt(YES), "rejected": sharegpt(NO)},
        {"system": "Be brief.", "prompt": "Why is it so?", "chosen": "Why is it so?Yes", "rejected": "Why is it so?No"},
    ]
    pairs = [parse(row) for row in rows]
    assert {(pair.prompt, pair.answers) for pair in pairs} == {((Message("system", "Be brief."), *PAIR[0]), PAIR[1])}
    assert {pair.layout for pair in pairs} == {"messages"}


def test_reference_material_follows_the_instruction() -> None:
    row = {"instruction": "Sum up.", "input": "A text.", "chosen": "x", "rejected": "y"}
    assert parse(row).prompt == (user("Sum up.\n\nA text."),)
    assert parse(row, columns={"input": None}).prompt == (user("Sum up."),)


def test_columns_may_have_any_names() -> None:
    row = {"q": "Q", "chosen": "not this", "good": "a", "bad": "b", "system": "not that", "messages": [WHY]}
    names: Any = {"prompt": "q", "chosen": "good", "rejected": "bad", "system": None}
    assert parse(row, columns=names) == PreferencePair((user("Q"),), ((assistant("a"),), (assistant("b"),)), "text")


def test_a_multi_turn_prompt_column_may_hold_the_first_or_the_last_turns() -> None:
    history = [WHY, {"role": "assistant", "content": "Hm"}, {"role": "user", "content": "So?"}]
    for prompt in (history, history[:1], "So?"):
        pair = parse({"prompt": prompt, "chosen": [*history, YES], "rejected": [*history, NO]})
        assert [turn.content for turn in pair.prompt] == ["Why is it so?", "Hm", "So?"]
        assert pair.answers == PAIR[1]


def test_answers_that_begin_alike_keep_what_they_share() -> None:
    """A prompt ends with what is answered: shared turns of the assistant before the place of parting are answers."""
    pair = parse({"chosen": [WHY, YES, YES], "rejected": [WHY, YES, NO]})
    assert pair.prompt == (user("Why is it so?"),)
    assert pair.answers == ((assistant("Yes"), assistant("Yes")), (assistant("Yes"), assistant("No")))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("The sky is blue.", "The sky is red.", "The sky is", (" blue.", " red.")),
        ("The sky", "The sky is red.", "The", (" sky", " sky is red.")),
        ("Q: a\nA: yes", "Q: a\nA: no", "Q: a\nA:", (" yes", " no")),
        ("The blue", "The blot", "The", (" blue", " blot")),
        ("a  b", "a  c", "a", ("  b", "  c")),
        ("one two", "one two", "one", (" two", " two")),
        ("one\u00a0two ", "one\u00a0three", "one", ("\u00a0two ", "\u00a0three")),
    ],
)
def test_texts_without_a_prompt_part_at_the_end_of_a_word(
    chosen: str, rejected: str, prompt: str, answers: tuple[str, str]
) -> None:
    pair = parse({"chosen": chosen, "rejected": rejected})
    assert pair.layout == "raw"
    assert pair.prompt == (user(prompt),)
    assert pair.answers == tuple((assistant(answer),) for answer in answers)


@pytest.mark.parametrize("suffix", ["ids", "input_ids"])
def test_rows_that_are_tokens_already(suffix: str) -> None:
    row = {f"prompt_{suffix}": [1, 2], f"chosen_{suffix}": np.array([3]), f"rejected_{suffix}": (4, 0)}
    reading = recognise([row])
    assert reading.format == "tokens"
    assert parse_row(row, reading) == TokenRow([1, 2], ([3], [4, 0]))


@pytest.mark.parametrize("token", [-1, 2**31, 1.5, "7", None, True])
def test_what_is_no_token_id(token: Any) -> None:
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    row = {"prompt_ids": [1], "chosen_ids": [2, token], "rejected_ids": [3]}
    with pytest.raises(RowError, match="token 2 of column 'chosen_ids' is .*integers"):
        parse_row(row, Reading("tokens", names))
    with pytest.raises(RowError, match="column 'chosen_ids' is a string"):
        parse_row({**row, "chosen_ids": "2"}, Reading("tokens", names))


# How a source is read.


def test_a_reading_is_plain_data() -> None:
    reading = recognise([{"question": "Q", "chosen": "a", "rejected": "b", "score": 1}])
    assert reading == Reading("text", {"prompt": "question", "chosen": "chosen", "rejected": "rejected"})
    assert Reading(**json.loads(json.dumps(asdict(reading)))) == reading == pickle.loads(pickle.dumps(reading))


def test_a_few_bad_rows_do_not_decide() -> None:
    good = {"prompt": "Why is it so?", "chosen": "Yes", "rejected": "No"}
    bad: list[dict[str, Any]] = [
        {"prompt": [WHY], "chosen": [YES], "rejected": [NO]},
        {},
        {"chosen": "\n\nHuman: x", "prompt": None},
    ]
    assert recognise([*bad, *[good] * 4]).format == "text"
    assert recognise([*bad, bad[0], good]).format == "messages"


def test_the_column_that_is_filled_most_often_is_the_prompt() -> None:
    rows = [{"prompt": None, "question": "Q", "chosen": "a", "rejected": "b"}] * 3
    assert recognise(rows).columns["prompt"] == "question"
    assert recognise([{**rows[0], "prompt": "P"}]).columns["prompt"] == "prompt"


def test_repetition_is_believed_of_a_source_and_not_of_a_row() -> None:
    """ "Hi there" may well answer "Hi"; that nearly all answers begin with their prompts is no chance."""
    repeated = {"prompt": "Once upon", "chosen": "Once upon a time", "rejected": "Once upon no time"}
    plain = {"prompt": "Once upon", "chosen": "a time", "rejected": "no time"}
    short = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}
    assert recognise([repeated] * 2).format == "text"
    assert recognise([repeated] * 3).format == "repeated"
    assert recognise([repeated] * 19 + [plain]).format == "repeated"
    assert recognise([repeated] * 18 + [plain] * 2).format == "text"
    assert recognise([short] * 20).format == "text"
    assert recognise([short], format="repeated").format == "repeated"
    assert "'chosen' does not begin with the prompt's text" in reason_of(plain, "repeated")


def test_a_common_beginning_is_believed_of_a_source_and_not_of_a_row() -> None:
    row = {"chosen": "The sky is blue", "rejected": "The sky is red"}
    assert recognise([row] * 3).format == "continuation"
    assert "no column 'prompt'" in misfit_of([row] * 2)
    assert recognise([row], format="continuation") == Reading("continuation", ANSWERS_ALONE)


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({}, {}, ["no columns", "no column 'chosen'", "no column 'rejected'"]),
        ({"text": "x"}, {}, ["'text' (a string)", "no column 'prompt'", "hh-rlhf", "data.columns"]),
        ({"prompt": 3, "chosen": "a", "rejected": None}, {}, ["'prompt' (of type int)", "'rejected' (null)"]),
        (
            {"prompt": "Q", "chosen": "a", "rejcted": "b"},
            {},
            ["no column 'rejected'; the nearest is 'rejcted'", "data.columns: {rejected: rejcted}"],
        ),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b"},
            {"columns": {"rejected": "rejectd"}},
            ["data.columns has rejected: rejectd", "the nearest is 'rejected'"],
        ),
        ({"chosen": "a", "rejected": "b"}, {}, ["no column 'prompt'", "'chosen' (a string)", r"'\n\nHuman: '"]),
        ({"chosen": "a", "rejected": "b"}, {"format": "text"}, ["no column 'prompt'", "text: 'prompt'"]),
        ({"prompt": "Q", "chosen": "a"}, {"format": "text"}, ["no column 'rejected'"]),
        (
            {"system": "S", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {},
            ["column 'system' has no reading in format 'dialogue'", "data.columns: {system: null}"],
        ),
        (
            {"system": "S", "prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [1]},
            {},
            ["column 'system' has no reading in format 'tokens'"],
        ),
        (
            {"q": "Q", "chosen": [WHY, YES], "rejected": [WHY, NO]},
            {"format": "conversations", "columns": {"prompt": "q"}},
            ["column 'q' has no reading in format 'conversations'", "{prompt: null}"],
        ),
    ],
)
def test_a_source_that_cannot_be_read_says_why(row: dict[str, Any], options: Any, words: list[str]) -> None:
    reason = misfit_of([row] * 4, **options)
    assert [word for word in words if word not in reason] == [], reason


def test_a_source_without_rows_and_an_unknown_format() -> None:
    assert "no rows" in misfit_of([])
    with pytest.raises(ConfigError, match=r"data\.format is 'txt', known are auto, .*nearest is 'text'"):
        recognise([{}], format="txt")


def test_a_wide_row_does_not_flood_the_reason() -> None:
    row = {f"column_{number}": number for number in range(500)}
    assert "488 more" in misfit_of([row])
    assert "488 more" in reason_of(row, "text")


# Rows of a source that is read well.

DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("text", {"prompt": "Q", "chosen": "a"}, ["no column 'rejected'", "leave the row out"]),
        ("text", {"prompt": "Q", "chosen": "a", "rejected": None}, ["column 'rejected' is null"]),
        ("text", {"prompt": None, "chosen": "a", "rejected": "b"}, ["column 'prompt' is null"]),
        ("text", {"prompt": "Q", "chosen": "a", "rejected": 7}, ["'rejected'", "of type int", "string"]),
        ("text", {"prompt": "Q", "chosen": [], "rejected": "b"}, ["'chosen'", "a list", "string"]),
        ("text", {"prompt": [WHY], "chosen": "a", "rejected": "b"}, ["'prompt'", "a list", "string"]),
        ("text", {"prompt": "Q", "chosen": "a", "rejected": ""}, ["'rejected'", "empty"]),
        ("text", {"prompt": "Q", "chosen": " \n", "rejected": "b"}, ["'chosen'", "blank"]),
        ("text", {"prompt": "Q", "chosen": "ab\ud800", "rejected": "b"}, ["'chosen'", "surrogate", "character 2"]),
        ("text", {"prompt": "Q", "chosen": "a", "rejected": "b", "system": 3}, ["'system'", "of type int"]),
        ("text", {"prompt": "Q", "chosen": "a", "rejected": "b", "input": [1]}, ["'input'", "a list"]),
        ("repeated", {"prompt": "Q", "chosen": "Qa", "rejected": "Q "}, ["'rejected'", "blank"]),
        ("messages", {"prompt": [], "chosen": "a", "rejected": "b"}, ["'prompt'", "empty list"]),
        ("messages", {"prompt": 3, "chosen": "a", "rejected": "b"}, ["'prompt'", "of type int"]),
        ("messages", {"prompt": ["Q"], "chosen": "a", "rejected": "b"}, ["turn 1", "'prompt'", "a string", "'role'"]),
        (
            "messages",
            {"prompt": [{"from": "human"}], "chosen": "a", "rejected": "b"},
            ["turn 1", "'value'", "null", "'from'"],
        ),
        (
            "messages",
            {"prompt": [{"from": "narrator", "value": "x"}], "chosen": "a", "rejected": "b"},
            ["turn 1", "'narrator'", "known are system, human"],
        ),
        (
            "messages",
            {"prompt": [*TURNS, {"role": "user", "content": [{"type": "text"}]}], "chosen": "a", "rejected": "b"},
            ["turn 3", "'content'", "a list"],
        ),
        (
            "messages",
            {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "a", "tool_calls": [1]}], "rejected": "b"},
            ["entry 1 of 'tool_calls' of turn 1 of column 'chosen' is of type int"],
        ),
        (
            "messages",
            {"prompt": TURNS, "chosen": {"role": "assistant", "content": None}, "rejected": "b"},
            ["'chosen'", "'content' = null"],
        ),
        (
            "messages",
            {"prompt": [{**WHY, "name": 7}], "chosen": "a", "rejected": "b"},
            ["'name' of turn 1 of column 'prompt' is of type int"],
        ),
        (
            "messages",
            {"prompt": [WHY], "chosen": {"role": "assistant", "content": "a", "function_call": {}}, "rejected": "b"},
            ["'chosen'", "'function_call'", "write 'tool_calls'"],
        ),
        ("messages", {"prompt": TURNS, "chosen": "a", "rejected": 1.5}, ["'rejected'", "of type float"]),
        ("messages", {"prompt": TURNS, "chosen": [], "rejected": "b"}, ["'chosen'", "empty list"]),
        (
            "messages",
            {"prompt": TURNS, "chosen": "a", "rejected": [{"role": "assistant", "content": ""}]},
            ["'rejected'", "empty"],
        ),
        (
            "messages",
            {"prompt": [WHY], "chosen": [TURNS[1], YES], "rejected": [TURNS[1], NO]},
            ["another prompt than column 'prompt'", "data.columns: {prompt: null}"],
        ),
        (
            "messages",
            {"prompt": [WHY], "chosen": [WHY, YES], "rejected": [NO]},
            ["part at turn 1", "turn 1 of 'chosen'", "'user'"],
        ),
        (
            "messages",
            {"prompt": [WHY], "chosen": [WHY, YES, WHY], "rejected": [WHY, NO, WHY]},
            ["part at turn 2", "turn 3 of 'chosen'", "'user'"],
        ),
        (
            "messages",
            {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"},
            ["'prompt'", "ends with an assistant turn"],
        ),
        (
            "messages",
            {"prompt": [WHY], "chosen": "a", "rejected": "b", "input": "more"},
            ["'input'", "list of turns", "{input: null}"],
        ),
        (
            "messages",
            {"prompt": TURNS, "chosen": "a", "rejected": "b", "system": "Be long."},
            ["'system'", "differ", "{system: null}"],
        ),
        ("conversations", {"chosen": [WHY, YES], "rejected": [WHY]}, ["'rejected'", "must end with an assistant turn"]),
        ("conversations", {"chosen": [YES], "rejected": [NO]}, ["no common prompt"]),
        ("conversations", {"chosen": [SYSTEM, YES], "rejected": [SYSTEM, NO]}, ["no common prompt"]),
        ("conversations", {"chosen": [WHY, YES], "rejected": 3}, ["'rejected'", "of type int"]),
        ("conversations", {"chosen": [WHY, {**YES, "content": " "}], "rejected": [WHY, NO]}, ["'chosen'", "blank"]),
        ("conversations", {"chosen": [WHY, YES], "rejected": [WHY, NO], "input": "x"}, ["'input' has no reading"]),
        ("dialogue", {"chosen": DIALOGUE, "rejected": "d"}, ["'rejected'", "does not begin with"]),
        ("dialogue", {"chosen": "\n\nHuman: a", "rejected": DIALOGUE}, ["'chosen'", "ends with a user turn"]),
        ("dialogue", {"chosen": DIALOGUE, "rejected": DIALOGUE.replace("b", "B")}, ["part at turn 2"]),
        ("dialogue", {"chosen": DIALOGUE, "rejected": DIALOGUE.replace(": a", ": A")}, ["part at turn 1"]),
        (
            "dialogue",
            {"chosen": DIALOGUE, "rejected": DIALOGUE[: DIALOGUE.index("\n\nHuman: c")]},
            ["part at turn 3"],
        ),
        ("dialogue", {"chosen": DIALOGUE, "rejected": DIALOGUE[:-1]}, ["'rejected'", "empty"]),
        (
            "dialogue",
            {"chosen": DIALOGUE + "\n\nAssistant: e", "rejected": DIALOGUE + "\n\nAssistant: f"},
            ["turn 4", "must end with a user turn"],
        ),
        ("dialogue", {"chosen": DIALOGUE + "\udc00", "rejected": DIALOGUE}, ["'chosen'", "surrogate"]),
        ("dialogue", {"chosen": DIALOGUE, "rejected": DIALOGUE, "system": "S"}, ["'system' has no reading"]),
        ("continuation", {"chosen": "The sky", "rejected": "A sky"}, ["no common beginning", "'prompt' column"]),
        ("continuation", {"chosen": "一二三", "rejected": "一二四"}, ["no common beginning"]),
        ("continuation", {"chosen": " \n", "rejected": " a"}, ["'chosen'", "blank"]),
        ("continuation", {"chosen": "a b", "rejected": "a c", "system": "S"}, ["'system' has no reading"]),
    ],
)
def test_a_row_that_is_no_pair_says_why(format: str, row: dict[str, Any], words: list[str]) -> None:
    reason = reason_of(row, format, *(name for name in ("system", "input") if name in row))
    assert [word for word in words if word not in reason] == [], reason


CONTENT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["", "\n\n", "\n\nHuman:", "Assistant: "])
).filter(lambda text: HUMAN_MARKER not in text and ASSISTANT_MARKER not in text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), max_size=5), CONTENT, CONTENT)
def test_any_dialogue_reads_back_verbatim(turns: list[tuple[str, str]], chosen: str, rejected: str) -> None:
    """Turns may be empty, repeat a role or nearly contain a marker: what is parsed joins to what was given.

    An "x" behind each answer keeps it from being blank, and a full stop before each marker keeps a text's end from
    completing one.
    """
    shared = transcript([user("q"), *(Message(role, content + ".") for role, content in turns), user(".")])
    row = {"chosen": f"{shared}\n\nAssistant: {chosen}x", "rejected": f"{shared}\n\nAssistant: {rejected}x"}
    pair = parse(row)
    assert transcript(pair.prompt + pair.answers[0]) == row["chosen"]
    assert transcript(pair.prompt + pair.answers[1]) == row["rejected"]
    assert pair.answers == ((assistant(chosen + "x"),), (assistant(rejected + "x"),))


def test_every_row_of_hh_is_reproduced_or_refused_for_a_known_reason() -> None:
    """Counted in the file by hand: 4 pairs part early, 4 chosen answers are empty, none ends its prompt oddly."""
    num_pairs = 0
    reasons: Counter[str] = Counter()
    rows = hh_rows()
    reading = recognise(rows[:100])
    assert reading == Reading("dialogue", ANSWERS_ALONE)
    for row in rows:
        try:
            pair = parse_row(row, reading)
        except RowError as error:
            reasons["part" if "part at turn" in str(error) else "empty" if "empty" in str(error) else str(error)] += 1
            continue
        num_pairs += 1
        assert isinstance(pair, PreferencePair)
        assert pair.prompt[-1].role == "user"
        assert transcript(pair.prompt + pair.answers[0]) == row["chosen"]
        assert transcript(pair.prompt + pair.answers[1]) == row["rejected"]
    assert reasons == {"part": 4, "empty": 4}
    assert num_pairs == 1992


def test_an_input_that_the_prompt_has_already_is_not_added_again() -> None:
    row = {"instruction": "Add", "input": "1 2", "prompt": "Add\n1 2", "chosen": "3", "rejected": "12"}
    assert recognise([row] * 5).columns == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    del row["prompt"]
    assert recognise([row] * 5).columns["input"] == "input"


# Tools.

WEATHER = {"name": "weather", "parameters": {"properties": {"city": {"type": "string", "default": None}}}}
CLOCK = {"name": "clock", "parameters": {"properties": {"zone": {"type": "string"}}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "noon", "tool_call_id": "1", "name": "clock"}
CALLS = Message("assistant", None, {"tool_calls": CALL["tool_calls"]})
RETURNS = Message("tool", "noon", {"tool_call_id": "1", "name": "clock"})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": "Quick", "chosen": "Quick, a", "rejected": "Quick, b"},
        {"prompt": [WHY], "chosen": [YES], "rejected": [NO]},
        {"chosen": [WHY, YES], "rejected": [WHY, NO]},
        {"prompt": "Q", "chosen": "a", "rejected": ["b", "c"]},
        {"prompt": "Q", "answers": ["a", "b"], "scores": [2, 1]},
    ],
)
def test_tools_of_any_format_are_a_list_or_json_of_one(row: dict[str, Any]) -> None:
    assert "tools" not in recognise([row] * 4).columns
    for tools in ([CLOCK], json.dumps([CLOCK]), np.array([CLOCK], dtype=object)):
        assert parse({**row, "tools": tools}).tools == [CLOCK]
    for nothing in (None, [], "", "[]", "null"):
        assert parse({**row, "tools": nothing}).tools is None
    assert parse({**row, "tools": [CLOCK]}, columns={"tools": None}).tools is None
    assert parse({**row, "functions": [CLOCK]}, columns={"tools": "functions"}).tools == [CLOCK]


def test_keys_that_parquet_fills_in_are_dropped_but_json_is_kept(tmp_path: Path) -> None:
    """Each struct of a column has the keys of all of them: here "zone" in the first one, and "city" in the second."""
    pq.write_table(pa.table({"tools": [[WEATHER, CLOCK]]}), tmp_path / "tools.parquet")
    filled = pq.read_table(tmp_path / "tools.parquet").to_pylist()[0]["tools"]
    assert filled[1]["parameters"]["properties"]["city"] is None
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    without_default = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
    assert parse({**row, "tools": filled}).tools == [without_default, CLOCK]
    assert parse({**row, "tools": json.dumps([WEATHER])}).tools == [WEATHER]


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        (CLOCK, "column 'tools' is an object: write a list"),
        (json.dumps(CLOCK), "column 'tools' is an object: write a list"),
        (3, "column 'tools' is of type int: write a list"),
        ("[{", "column 'tools' is not valid JSON: Expecting"),
        ("clock", "column 'tools' is not valid JSON"),
        ([CLOCK, "clock"], "entry 2 of column 'tools' is a string: write an object"),
        ([None], "entry 1 of column 'tools' is null"),
        (json.dumps([{"name": "\ud800"}]), "a text of column 'tools' holds half of a UTF-16 surrogate pair"),
        (json.dumps([{"\ud800": 1}]), "a key of column 'tools' holds half of a UTF-16 surrogate pair"),
        ("[" + '{"a":' * 100 + "1" + "}" * 100 + "]", "column 'tools' has more than 64 objects and lists within"),
        ("[" * 100_000, "column 'tools' is not valid JSON: "),
    ],
)
def test_what_is_no_list_of_tools(tools: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        parse_row({"prompt": "Q", "chosen": "a", "rejected": "b", "tools": tools}, Reading("text", columns("tools")))


def test_a_format_without_turns_has_no_reading_for_tools() -> None:
    row = {"chosen": DIALOGUE, "rejected": DIALOGUE}
    assert "column 'tools' has no reading in format 'dialogue'" in misfit_of([{**row, "tools": [CLOCK]}] * 4)
    assert parse({**row, "tools": []}).tools is None


def test_calls_and_what_they_return_are_kept_as_they_are() -> None:
    filled = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": None}], "name": None}
    context = (user("Why is it so?"), CALLS, RETURNS)
    answers = ((assistant("Yes"),), (CALLS,))
    rows: list[dict[str, Any]] = [
        {"prompt": [WHY, filled, RESULT], "chosen": [YES], "rejected": filled},
        {"chosen": [WHY, filled, RESULT, YES], "rejected": [WHY, CALL, RESULT, filled]},
        {"prompt": [WHY], "chosen": [WHY, CALL, RESULT, YES], "rejected": [WHY, CALL, RESULT, CALL]},
        {"prompt": [WHY, CALL, RESULT], "answers": [[CALL], [YES]], "scores": [1, 2]},
        {"prompt": [WHY, CALL, RESULT], "chosen": "Yes", "rejected": [[CALL]]},
    ]
    for row in rows:
        pair = parse(row)
        assert (pair.prompt, pair.answers) == (context, answers)
    thought = {**YES, "reasoning_content": "Hm"}
    pair = parse({"prompt": [WHY], "chosen": thought, "rejected": {"from": "gpt", "value": "No", "thinking": ""}})
    assert pair.answers[0] == (Message("assistant", "Yes", {"reasoning_content": "Hm"}),)
    assert pair.answers[1] == (Message("assistant", "No", {"thinking": ""}),)


def test_what_a_tool_returns_is_no_part_of_an_answer() -> None:
    reasons = [
        reason_of({"chosen": [WHY, CALL, RESULT, YES], "rejected": [WHY, NO]}, "conversations"),
        reason_of({"prompt": [WHY], "chosen": [CALL, RESULT, YES], "rejected": [NO]}, "messages"),
    ]
    with pytest.raises(RowError) as caught:
        parse_row({"prompt": "Q", "answers": [[CALL, RESULT, YES], "b"]}, ranking())
    for reason in (*reasons, str(caught.value)):
        assert "every token of an answer is trained, and what a user says or a tool returns is not" in reason


# Rankings.


def ranking(*extra: str, **options: Any) -> Reading:
    return Reading("ranking", {name: name for name in ("prompt", "answers", *extra)}, **options)


def texts(pair: PreferencePair | TokenRow) -> list[str]:
    assert isinstance(pair, PreferencePair)
    return ["".join(message.content for message in answer) for answer in pair.answers]


def test_a_list_of_answers_is_a_ranking_best_first() -> None:
    row = {"prompt": "Q", "answers": ["a", "b", "c"]}
    assert "ranking" in misfit_of([row])  # Perhaps the best does not come first: somebody has to say so.
    pair = parse(row, format="ranking")
    assert pair.layout == "text"
    assert pair.prompt == (user("Q"),)
    assert pair.answers == ((assistant("a"),), (assistant("b"),), (assistant("c"),))


def test_scores_rank_answers_the_highest_first() -> None:
    assert texts(parse({"prompt": "Q", "answers": ["a", "b", "c"], "scores": [1, 3.5, 2]})) == ["b", "c", "a"]


def test_answers_may_be_turns_or_objects_with_a_score() -> None:
    """UltraFeedback's rows have such objects."""
    completions = [
        {"model": "x", "response": "poor", "overall_score": 2.0},
        {"model": "y", "response": "good", "overall_score": 8.5},
    ]
    pair = parse({"instruction": "Q", "completions": completions})
    assert texts(pair) == ["good", "poor"]
    turns = [[{"role": "assistant", "content": text}] for text in ("a", "b", "c")]
    pair = parse({"prompt": TURNS, "answers": turns, "scores": [3, 2, 1]})
    assert pair.layout == "messages"
    assert texts(pair) == ["a", "b", "c"]


def test_one_chosen_and_several_rejected() -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": ["bad", "worse", "worst"]}
    assert recognise([row]).format == "several_rejected"
    assert texts(parse(row)) == ["good", "bad", "worse", "worst"]
    turns = [[{"role": "assistant", "content": text}] for text in ("bad", "worse")]
    assert texts(parse({**row, "rejected": turns})) == ["good", "bad", "worse"]


@pytest.mark.parametrize(
    ("scores", "gap", "expected"),
    [
        ([5, 5, 3, 3, 1], 0.0, "ace"),  # Of equal scores the first.
        ([5, 5, 3, 3, 1], 2.0, "ae"),  # 3 is below 5 by 2, not by more.
        ([1, 4, 2.5, 4, 0], 1.0, "bca"),  # From 4 to 2.5, to 1; 0 is 1 below it.
        ([1, 2, 3, 4, 5], 0.0, "edcba"),
    ],
)
def test_an_answer_counts_that_is_worse_by_more_than_the_gap(scores: list[float], gap: float, expected: str) -> None:
    row = {"prompt": "Q", "answers": list("abcde"), "scores": scores}
    assert texts(parse_row(row, ranking("scores", min_score_gap=gap))) == list(expected)
    ends = expected[0] + expected[-1]
    assert texts(parse_row(row, ranking("scores", min_score_gap=gap, keep="best_worst"))) == list(ends)


def test_equal_scores_are_no_ranking() -> None:
    with pytest.raises(TiedError, match=r"by more than data.min_score_gap \(0\): 3, 3"):
        parse_row({"prompt": "Q", "answers": ["a", "b"], "scores": [3, 3]}, ranking("scores"))


def test_the_scores_of_a_ranking_s_answers_come_along() -> None:
    row = {"prompt": "Q", "answers": list("abc"), "scores": [3, 1, 2]}
    assert parse_row(row, ranking("scores")).scores == (3, 2, 1)
    assert parse_row(row, ranking("scores", keep="best_worst")).scores == (3, 1)
    assert parse_row({"prompt": "Q", "answers": ["a", "b"]}, ranking()).scores == ()


SCORED = replace(recognise([{"prompt": "Q", "chosen": "a", "rejected": "b"}]), score_columns=["good", "bad"])


def test_a_pair_whose_scores_differ_by_more_than_the_gap() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "good": 2.5, "bad": 2}
    assert parse_row(row, SCORED).scores == (2.5, 2)
    assert texts(parse_row(row, replace(SCORED, min_score_gap=0.4))) == ["a", "b"]
    with pytest.raises(TiedError, match=r"by more than data.min_score_gap \(0.5\): 2.5, 2"):
        parse_row(row, replace(SCORED, min_score_gap=0.5))
    for bad in (2.5, 3):  # As good, and better.
        with pytest.raises(TiedError, match=rf"by more than data.min_score_gap \(0\): 2.5, {bad}"):
            parse_row({**row, "bad": bad}, SCORED)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"good": 1}, "no column 'bad', which data.score_columns names"),
        ({"good": None, "bad": 0}, "column 'good' is None: write a finite number"),
        ({"good": 1, "bad": float("-inf")}, "column 'bad' is -inf: write a finite number"),
        ({"good": 10**400, "bad": 0}, "column 'good' is 1000.*: write a finite number"),
        ({"good": True, "bad": 0}, "column 'good' is True: write a finite number"),
        ({"good": "9", "bad": 0}, "column 'good' is '9': write a finite number"),
    ],
)
def test_scores_of_a_pair_that_cannot_be_read(scores: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message) as raised:
        parse_row({"prompt": "Q", "chosen": "a", "rejected": "b", **scores}, SCORED)
    assert not isinstance(raised.value, TiedError)


def test_two_scores_are_of_two_answers() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": ["b", "c"], "good": 2, "bad": 1}
    with pytest.raises(RowError, match="data.score_columns brings 2 scores, the row has 3 answers"):
        parse_row(row, replace(recognise([row]), score_columns=["good", "bad"]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["a"]}, "column 'answers' has 1 answers: write a list of two or more"),
        ({"answers": "a"}, "column 'answers' is a string: write a list of two or more"),
        ({"answers": ["a", " "]}, "answer 2 of column 'answers' is empty or blank"),
        ({"answers": ["a", 3]}, "answer 2 of column 'answers' is of type int: write a list of turns"),
        ({"answers": ["a", [{"role": "user", "content": "b"}]]}, "answer 2 .* has a turn that is not the assistant's"),
        ({"answers": ["a", "b"], "scores": [1]}, "column 'scores' has 1, beside 2 answers"),
        ({"answers": ["a", "b"], "scores": [1, None]}, "the score of answer 2 of column 'answers' is None"),
        (
            {"answers": ["a", "b"], "scores": [1, float("nan")]},
            "the score of answer 2 .* is nan: write a finite number",
        ),
        ({"answers": ["a", "b"], "scores": None}, "column 'scores' is null: fill it in"),
        ({"answers": ["a", {"response": "b", "score": 1}]}, "the score of answer 1 .* is None"),
        ({"answers": [{"text": "a", "pm": 1}, {"text": "b", "pm": 2}]}, "has answers that are objects without a score"),
    ],
)
def test_a_ranking_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row({"prompt": "Q", **row}, ranking(*(["scores"] if "scores" in row else [])))


def test_a_gap_between_scores_needs_scores() -> None:
    with pytest.raises(RowError, match="has no scores, which data.min_score_gap is about"):
        parse_row({"prompt": "Q", "answers": ["a", "b"]}, ranking(min_score_gap=1.0))


def test_columns_that_only_rankings_know_stand_in_no_other_format_s_way() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "scores": [1, 2], "responses": ["a", "b"]}
    assert recognise([row]).format == "text"
    named = recognise([row], format="ranking")
    assert named.columns == {"prompt": "prompt", "answers": "responses", "scores": "scores"}
    assert texts(parse_row(row, named)) == ["b", "a"]


FORMAT_MODULE = """
from dpo_ray.pairs.formats import Format
from dpo_ray.types import Message, PreferencePair

def parse(row):
    answers = tuple((Message("assistant", text),) for text in row.text("chosen").split("|"))
    return PreferencePair((Message("user", row.text("prompt")),), answers, "text")

BARS = Format("two answers with a bar between", ("prompt", "chosen"), lambda row: True, parse)
"""


def test_a_format_of_one_s_own_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "formats_of_mine.py").write_text(FORMAT_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    row = {"prompt": "Q", "chosen": "good|bad"}
    reading = recognise([row], format="formats_of_mine:BARS")
    assert texts(parse_row(row, reading)) == ["good", "bad"]
    with pytest.raises(ConfigError, match="data.format is 'formats_of_mine:parse' is of type function"):
        recognise([row], format="formats_of_mine:parse")
    with pytest.raises(DataError, match="two answers with a bar between"):
        recognise([{"prompt": "Q"}], format="formats_of_mine:BARS")
