"""Numbers that stand in columns beside a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import S3Server

from dpo_ray import storage
from dpo_ray.errors import DataError, RowError
from dpo_ray.orchestration.rows import Job, SourceFile, _number, _score, read
from dpo_ray.pairs.formats import Reading
from dpo_ray.pairs.tokenize import Limits

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


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_file_that_changes_meanwhile_is_refused(request: pytest.FixtureRequest, tmp_path: Path, where: str) -> None:
    """The store that is being made has its name from what was there first."""
    place = str(tmp_path)
    if where == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        place = server.uri(f"rows-{tmp_path.name}")
    uri = storage.join(place, "pairs.jsonl")
    storage.write_bytes(uri, b'{"a": 1}\n' * 3)
    file = SourceFile(uri, storage.size(uri), storage.identity(uri), "train", Reading("auto", {}))
    job = Job("", (file,), "", "", "none", Limits(9, None, None, "left", "right"), 9, "", 0.0)
    (rows,) = read({"item": [0]}, job)
    assert rows["row"].to_pylist() == [1, 2, 3]
    storage.write_bytes(uri, b'{"a": 1}\n' * 4)
    with pytest.raises(DataError, match=r"pairs.jsonl has changed since this command began \(size and mark were 27:"):
        list(read({"item": [0]}, job))
    # While it is read.
    storage.write_bytes(uri, b'{"a": 1}\n' * 3)
    meant = SourceFile(uri, 27, storage.identity(uri), "train", Reading("auto", {}))
    reading = read({"item": [0]}, Job("", (meant,), "", "", "none", job.limits, 9, "", 0.0))
    assert next(reading).num_rows == 3
    storage.write_bytes(uri, b'{"b": 1}\n' * 3)
    with pytest.raises(DataError, match=r"has changed since this command began"):
        next(reading)
