"""Rows picked by their numbers, and numbers that stand in columns beside a pair."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.errors import RowError
from dpo_ray.orchestration.rows import ROWS_PER_READ, _number, _score, pick

HUGE = 10**400


@pytest.mark.parametrize("value", [HUGE, -HUGE, float("inf"), float("nan"), True, "1", None])
def test_what_is_no_number_to_compute_with_is_a_reject(value: Any) -> None:
    with pytest.raises(RowError, match="column is .*: reference.columns wants the log-probability"):
        _score({"column": value}, "column")
    for name in ("weight", "margin"):
        with pytest.raises(RowError, match=f"column is .*: data.{name}_column wants a finite number there"):
            _number({"column": value}, name, "column")


def test_numbers_in_their_ranges() -> None:
    assert (_score({"c": -2}, "c"), _number({"c": 0}, "weight", "c"), _number({"c": -3}, "margin", "c")) == (-2, 0, -3)
    with pytest.raises(RowError, match=r"c is 0.5: .* at most 0"):
        _score({"c": 0.5}, "c")
    with pytest.raises(RowError, match=r"c is -0.5: data.weight_column wants a finite number there, 0 or more"):
        _number({"c": -0.5}, "weight", "c")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_are_picked_by_their_numbers(tmp_path: Path, suffix: str) -> None:
    """About the edges of what is read at a time; a column that a row lacks is null; no more is read than need be."""
    rows = [{"at": number, "text": f"row {number}"} for number in range(1, 3 * ROWS_PER_READ + 1)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with gzip.open(path, "wt") if suffix.endswith("gz") else path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    wanted = [2 * ROWS_PER_READ, 1, ROWS_PER_READ + 1, ROWS_PER_READ]
    for columns in (None, ["at", "other"]):
        batch = {"item": [json.dumps([str(path), wanted])]}
        tables = list(pick(batch, columns))
        assert len(tables) == 2
        picked = pa.concat_tables(tables).to_pylist()
        assert [row["row"] for row in picked] == sorted(wanted)
        assert {row["uri"] for row in picked} == {str(path)}
        for row in picked:
            expected = rows[row["row"] - 1] if columns is None else {"at": row["row"], "other": None}
            assert json.loads(row["content"]) == expected
