"""Rows that are read again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.orchestration.originals import pick
from dpo_ray.orchestration.rows import ROWS_PER_READ


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
