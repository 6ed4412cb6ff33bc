"""Raw row -> PreferencePair.

How a data source is read is decided once, from a sample of its rows: its format, and the column of each role. To add a
format: write its two functions in `parsers` and put one entry into `FORMATS`; or, without a change to this package, a
`Format` into a module of your own, as `data.format: module:name`. A column that is null counts as absent.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from dpo_ray.errors import ConfigError, DataError, RowError
from dpo_ray.extensions import imported
from dpo_ray.pairs import parsers
from dpo_ray.pairs.parsers import HUMAN_MARKER, Fields, RankingRule, Role
from dpo_ray.pairs.turns import is_list
from dpo_ray.types import PreferencePair, TokenRow

_ROLES: tuple[Role, ...] = get_args(Role)
_OPTIONAL: tuple[Role, ...] = ("system", "input", "tools", "scores")
_OF_PAIRS: tuple[Role, ...] = ("prompt", "chosen", "rejected", "system", "input", "tools")
# Columns of these names may mean anything beside a pair: they are looked for in rankings alone.
_OF_RANKINGS: tuple[Role, ...] = ("answers", "scores")

# The columns of a role where the user names none, the usual ones first.
_NAMES: dict[Role, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "conversations", "messages"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "system": ("system",),
    "input": ("input",),
    "tools": ("tools",),
    "answers": ("answers", "responses", "completions"),
    "scores": ("scores", "ratings"),
}
_TOKEN_NAMES: dict[Role, tuple[str, ...]] = {
    **_NAMES,
    "prompt": ("prompt_input_ids", "prompt_ids"),
    "chosen": ("chosen_input_ids", "chosen_ids"),
    "rejected": ("rejected_input_ids", "rejected_ids"),
}

RANKING = "ranking"

# What a single row cannot tell is believed of a source when nearly all of several rows say it.
_SURE_FRACTION, _SURE_ROWS = 0.95, 3


@dataclass(frozen=True, slots=True)
class Format:
    """One way in which a row may be written.

    Attributes:
        description: What such a row looks like; shown to the user whose rows fit no format.
        roles: What it has columns for; any other column of `names` has no reading beside them.
        matches: Whether a row is meant to be of this format, by the kinds of its values.
        parse: Makes the pair of a row, or raises RowError.
        must_be_sure: Whether one row that matches may be meant otherwise, so that nearly all have to match.
        names: The columns that it knows, by role.
    """

    description: str
    roles: tuple[Role, ...]
    matches: Callable[[Fields], bool]
    parse: Callable[[Fields], PreferencePair | TokenRow]
    must_be_sure: bool = False
    names: Mapping[Role, tuple[str, ...]] = field(default_factory=lambda: _NAMES)


# In the order of recognition.
FORMATS: dict[str, Format] = {
    "repeated": Format(
        "'prompt', 'chosen' and 'rejected' as strings, both answers beginning with the prompt's text",
        _OF_PAIRS,
        parsers.is_repeated,
        parsers.parse_repeated,
        must_be_sure=True,
    ),
    "several_rejected": Format(
        "'prompt' and 'chosen' as strings or lists of turns, 'rejected' as a list of such answers",
        _OF_PAIRS,
        parsers.is_several_rejected,
        parsers.parse_several_rejected,
    ),
    "text": Format(
        "'prompt', 'chosen' and 'rejected' as strings",
        _OF_PAIRS,
        parsers.is_text,
        parsers.parse_text,
    ),
    "messages": Format(
        "'prompt' as a list of turns {'role': ..., 'content': ...} or {'from': ..., 'value': ...} or as a string, "
        "'chosen' and 'rejected' as lists of assistant turns, with or without the prompt's turns before them, as "
        "single turns or as strings",
        _OF_PAIRS,
        parsers.is_messages,
        parsers.parse_messages,
    ),
    "conversations": Format(
        "'chosen' and 'rejected' alone, as lists of turns that begin alike",
        ("chosen", "rejected", "system", "tools"),
        parsers.is_conversations,
        parsers.parse_conversations,
    ),
    "dialogue": Format(
        f"'chosen' and 'rejected' alone, as whole hh-rlhf dialogues that begin with {HUMAN_MARKER!r}",
        ("chosen", "rejected"),
        parsers.is_dialogue,
        parsers.parse_dialogue,
    ),
    "continuation": Format(
        "'chosen' and 'rejected' alone, as texts that begin alike (read with data.chat_template: none)",
        ("chosen", "rejected"),
        parsers.is_continuation,
        parsers.parse_continuation,
        must_be_sure=True,
    ),
    RANKING: Format(
        "'prompt' as a string or a list of turns, 'answers' as a list of two or more answers with 'scores', or, where "
        "data.format: ranking says so, best first; an answer is a string, a list of turns, or an object "
        "{'response': ..., 'score': ...}",
        ("prompt", "answers", "scores", "system", "input", "tools"),
        parsers.is_ranking,
        parsers.parse_ranking,
    ),
    "tokens": Format(
        "'prompt_input_ids', 'chosen_input_ids' and 'rejected_input_ids' as lists of token ids",
        ("prompt", "chosen", "rejected"),
        parsers.is_tokens,
        parsers.parse_tokens,
        names=_TOKEN_NAMES,
    ),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data source is read.

    Attributes:
        format: A key of `FORMATS`.
        columns: Role -> the column that fills it.
        keep: See `RankingRule`.
        min_score_gap: Likewise; with `score_columns`, by more than this the chosen answer's score is to be higher.
        score_columns: Columns of the scores of a pair's answers, best answer first; empty where there are none.
    """

    format: str
    columns: dict[str, str]
    keep: str = "all"
    min_score_gap: float = 0.0
    score_columns: list[str] = field(default_factory=list)


def recognise(
    rows: Sequence[Mapping[str, Any]], format: str = "auto", columns: Mapping[Role, str | None] | None = None
) -> Reading:
    """Decides from a sample how all rows of a data source are read.

    Args:
        rows: Some rows of one source: column name -> value, as read from JSON Lines or Parquet.
        format: A key of `FORMATS`, or `auto` for the one that most rows match.
        columns: Role -> the column that fills it, in place of the usual names; None leaves the role's column out.

    Returns:
        The format and the columns, also those that the format has no reading for.

    Raises:
        DataError: There are no rows, a column is missing or has no reading, or the rows fit no format. The message
            names no source.
        ConfigError: There is no such format.
    """
    if format != "auto":
        format_named(format)
    if not rows:
        raise DataError("it has no rows: leave it out, or put rows into it")
    named = columns or {}
    filled = Counter[str]()
    for row in rows:
        filled.update({name: int(value is not None) for name, value in row.items()})
    for role, name in named.items():
        if name is not None and name not in filled:
            raise DataError(
                f"data.columns has {role}: {name}, and there is no such column{_nearest(name, filled)}; the rows have "
                f"{parsers.describe(rows[0])}"
            )
    candidates = [format] if format != "auto" else list(FORMATS)
    readings = {name: Reading(name, _columns(format_named(name), named, filled)) for name in candidates}
    complete = {name: reading for name, reading in readings.items() if not _missing(reading)}
    found = next(iter(complete), None) if format != "auto" else _most_likely(rows, complete)
    if found is None:
        raise DataError(_fits_nothing(rows[0], filled, readings))
    reading = readings[found]
    for role in _without_reading(reading):
        if 2 * sum(_says_something(row, reading, role) for row in rows) > len(rows):
            raise DataError(_has_no_reading(role, reading))
    return reading


def prompt_column(row: Mapping[str, Any]) -> str:
    """The column of a row's prompt, by the usual names."""
    names = _NAMES["prompt"]
    return next((name for name in names if row.get(name) is not None), names[0])


def format_named(name: str) -> Format:
    """An entry of `FORMATS`, or a `Format` of one's own as `module:name`.

    Raises:
        ConfigError: There is no such entry, or it cannot be imported or is no `Format`.
    """
    if ":" in name:
        try:
            return imported(name, Format)
        except ValueError as error:
            raise ConfigError(f"data.format is {error}") from None
    if name not in FORMATS:
        raise ConfigError(f"data.format is {name!r}, known are auto, {', '.join(FORMATS)}{_nearest(name, FORMATS)}")
    return FORMATS[name]


def parse_row(row: Mapping[str, Any], reading: Reading) -> PreferencePair | TokenRow:
    """Reads one row; all text is kept verbatim.

    Args:
        row: Column name -> value. Columns that the reading does not name are ignored.
        reading: How the row's source is read.

    Returns:
        The pair, or its tokens. Chosen and rejected may be equal.

    Raises:
        RowError: A column is missing or holds a wrong kind of value, or an answer is blank.
        TiedError: By their scores no answer is better than another.
    """
    for role in _without_reading(reading):
        if _says_something(row, reading, role):
            raise RowError(_has_no_reading(role, reading))
    rule = RankingRule(reading.keep, reading.min_score_gap)
    pair = format_named(reading.format).parse(Fields(row, reading.columns, rule))
    if not reading.score_columns:
        return pair
    scores = parsers.pair_scores(row, reading.score_columns, len(pair.answers), reading.min_score_gap)
    return replace(pair, scores=scores)


def _columns(known: Format, named: Mapping[Role, str | None], filled: Mapping[str, int]) -> dict[str, str]:
    """The column of each role: the user's, else of the usual ones the one that is null least often."""
    found: dict[str, str] = {}
    for role in _ROLES:
        if role not in known.roles and role not in named and (role in _OF_RANKINGS or "answers" in known.roles):
            continue
        own = named.get(role)
        names = known.names.get(role, ()) if role not in named else () if own is None else (own,)
        present = [name for name in names if name in filled]
        if present:
            found[role] = max(present, key=lambda name: filled[name])
    # Where an instruction was joined with its input already, the prompt has both.
    if "input" not in named and "instruction" in filled and found.get("prompt") not in (None, "instruction"):
        found.pop("input", None)
    if "prompt" not in found and "input" in found and {"prompt", "input"} <= set(known.roles) and "prompt" not in named:
        found["prompt"] = found.pop("input")
    return found


def _missing(reading: Reading) -> list[Role]:
    return [role for role in format_named(reading.format).roles if role not in (*_OPTIONAL, *reading.columns)]


def _without_reading(reading: Reading) -> list[Role]:
    return [role for role in _ROLES if role in reading.columns and role not in format_named(reading.format).roles]


def _says_something(row: Mapping[str, Any], reading: Reading, role: Role) -> bool:
    value = row.get(reading.columns[role])
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (is_list(value) and len(value) == 0)


def _most_likely(rows: Sequence[Mapping[str, Any]], readings: Mapping[str, Reading]) -> str | None:
    plain: dict[str, int] = {}
    for name, reading in readings.items():
        known = format_named(name)
        implicit = "prompt" not in known.roles and "prompt" in reading.columns
        count = sum(
            known.matches(Fields(row, reading.columns))
            for row in rows
            if not (implicit and _says_something(row, reading, "prompt"))
        )
        if known.must_be_sure and count >= max(_SURE_ROWS, _SURE_FRACTION * len(rows)):
            return name
        if not known.must_be_sure and count:
            plain[name] = count
    return max(plain, key=lambda name: plain[name], default=None)


def _has_no_reading(role: Role, reading: Reading) -> str:
    return (
        f"column {reading.columns[role]!r} has no reading in format {reading.format!r}: set data.columns: "
        f"{{{role}: null}} to leave it out, or write the rows in another format"
    )


def _fits_nothing(row: Mapping[str, Any], filled: Mapping[str, int], readings: Mapping[str, Reading]) -> str:
    problems = []
    for role in ("chosen", "rejected", "prompt", "answers"):
        needing = [reading for reading in readings.values() if role in format_named(reading.format).roles]
        pairs_too = role == "answers" and len(needing) < len(readings)  # Then a ranking is what nobody looks for first.
        if needing and not pairs_too and all(role in _missing(reading) for reading in needing):
            used = {name for reading in readings.values() for name in reading.columns.values()}
            near = difflib.get_close_matches(role, [name for name in filled if name not in used], n=1)
            mend = [f"the nearest is {name!r}: rename it, or set data.columns: {{{role}: {name}}}" for name in near]
            problems.append("; ".join([f"no column {role!r}", *mend]))
    known = "; ".join(f"{name}: {format_named(name).description}" for name in readings)
    problems.append(f"the rows fit no known format, the first has {parsers.describe(row)}")
    return f"{'; '.join(problems)}. Known are {known}. Other names of columns can be set in data.columns"


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""
