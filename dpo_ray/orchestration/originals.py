"""The rows that pairs were made of, read again for what the pair store does not keep: turns, and columns of the data.

All of a file is read, for its rows may stand anywhere in it: by tasks of the cluster, a file each.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DataError, RowError
from dpo_ray.evaluation.statistics import groups_of
from dpo_ray.orchestration.rows import json_object, open_rows
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs import store
from dpo_ray.pairs.formats import Reading, parse_row
from dpo_ray.pairs.store import PairStore
from dpo_ray.pairs.turns import kind, read_number
from dpo_ray.types import PreferencePair, TokenRow

_SCHEMA = pa.schema([("uri", pa.string()), ("row", pa.int64()), ("content", pa.large_string())])
_MARK = " row "

Turns = list[dict[str, str]]


class Originals:
    """The files of a run's pairs that are as they were when the pairs were made."""

    def __init__(self, config: Config, pairs_uri: str) -> None:
        """Lists them, once.

        Args:
            config: The run that they were prepared for.
            pairs_uri: The pair store that was made of them.

        Raises:
            StorageError: A place cannot be listed.
        """
        listed = [file for _, pattern in config.data.sources for file in storage.expand(pattern, or_none=True)]
        now = {file.uri: file.identity for file in listed}
        made_of = store.files_of(pairs_uri)
        self._readings = {uri: each for uri, (identity, each) in made_of.items() if now.get(uri) == identity}
        self._label_selector = config.data.label_selector or None

    def has_turns(self, place: str) -> bool:
        """Whether the row's file is still there, and its format has turns.

        Args:
            place: File and row, as `store.sources_of` gives them.
        """
        reading = self._readings.get(place.rpartition(_MARK)[0])
        return reading is not None and reading["format"] != "tokens"

    def turns(self, places: Collection[str]) -> dict[str, Turns]:
        """The prompts of rows, as turns.

        Args:
            places: File and row of each.

        Returns:
            By place; without those of which `has_turns` is false, and those with tools or calls in them.
        """
        found = dict[str, Turns]()
        for uri, number, row in self._rows(filter(self.has_turns, places)):
            with contextlib.suppress(RowError):
                if turns := _plain_turns(parse_row(row, Reading(**self._readings[uri]))):
                    found[f"{uri}{_MARK}{number}"] = turns
        return found

    def columns(
        self, pairs: PairStore, columns: Sequence[str], watcher: Watcher
    ) -> dict[str, dict[bytes, str | float | None]]:
        """What columns of the data hold of the held-out pairs; of a pair that stands in several rows, one of them.

        Args:
            pairs: The pair store.
            columns: Their names.
            watcher: Told how many rows are read.

        Returns:
            By column and pair id: a text (also `true` and `false`), a number, or None where there is nothing.

        Raises:
            ConfigError: No held-out row has the column, or it has more different texts than there can be groups.
            DataError: A file is gone or has changed since; or a value is a list or an object.
        """
        pair_ids = {place: each for chunk in pairs.eval for each, place in store.sources_of(pairs.uri, chunk).items()}
        if lost := next((uri for uri in map(_file, pair_ids) if uri not in self._readings), None):
            raise DataError(
                f"{lost}: gone, or changed since pairs were made of it, so that evaluation.group_columns has nothing "
                "to read there: restore the file, or leave the option out"
            )
        found = {column: dict[bytes, str | float | None]() for column in columns}
        for done, (uri, number, row) in enumerate(self._rows(pair_ids, columns), start=1):
            place = f"{uri}{_MARK}{number}"
            for column in columns:
                found[column][pair_ids[place]] = _group_value(row.get(column), column, place)
            watcher.progress("reading columns (rows)", done, len(pair_ids))
        for column, values in found.items():
            if all(value is None for value in values.values()):
                ((_, _, row),) = self._rows(list(pair_ids)[:1])
                raise ConfigError(
                    f"evaluation.group_columns: no held-out pair has a {column!r}; the rows have "
                    f"{', '.join(sorted(row))}"
                )
            try:
                groups_of(list(values.values()))
            except ValueError as error:
                raise ConfigError(
                    f"evaluation.group_columns: {column} {error}: name columns whose values many pairs share"
                ) from None
        return found

    def _rows(
        self, places: Iterable[str], columns: Sequence[str] | None = None
    ) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """File, number and content of rows of unchanged files, in no order.

        Args:
            places: File and row of each.
            columns: Of a row, those that are read; all when None.
        """
        numbers = defaultdict[str, list[int]](list)
        for place in places:
            numbers[_file(place)].append(int(place.rpartition(_MARK)[2]))
        if not numbers:
            return
        items = [json.dumps(each) for each in numbers.items()]
        picked = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            pick, batch_size=1, num_cpus=1, fn_args=(columns,)
        )
        picked.context.execution_options.label_selector = self._label_selector
        for each in picked.iter_rows():
            yield each["uri"], each["row"], json.loads(each["content"])


def pick(batch: Mapping[str, Any], columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """Some rows of files.

    Args:
        batch: Under `item`, as JSON, a file's URI and the numbers of its rows, from 1.
        columns: Of a row; all when None.

    Yields:
        Tables of URI, number and content, the row's object as JSON.
    """
    for uri, numbers in map(json.loads, batch["item"]):
        wanted, last, number = set(numbers), max(numbers), 0
        for texts, _ in open_rows(uri, columns):
            found = {each: json_object(text) for each, text in enumerate(texts, start=number + 1) if each in wanted}
            number += len(texts)
            if columns is not None:
                found = {each: {name: row.get(name) for name in columns} for each, row in found.items()}
            contents = list(map(json.dumps, found.values()))
            yield pa.table({"uri": [uri] * len(found), "row": [*found], "content": contents}, _SCHEMA)
            if number >= last:
                break


def _file(place: str) -> str:
    return place.rpartition(_MARK)[0]


def _group_value(value: Any, column: str, place: str) -> str | float | None:
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return read_number(value)
    if value is None or isinstance(value, str):
        return value
    raise DataError(
        f"{place}: {column} is {kind(value)}: evaluation.group_columns takes columns of texts, numbers, true and false"
    )


def _plain_turns(row: PreferencePair | TokenRow) -> Turns:
    """The turns of a row's prompt; none where it has others than of a role and a text."""
    if isinstance(row, TokenRow) or row.layout == "raw" or row.tools:
        return []
    if any(turn.extra or turn.content is None for turn in row.prompt):
        return []
    return [{"role": turn.role, "content": str(turn.content)} for turn in row.prompt]
