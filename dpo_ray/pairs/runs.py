"""Sorted runs: the intermediate files of `prepare`, an external sort by content id on storage.

A task that tokenizes writes its pairs as one run, sorted by id, in slices that can be fetched one by one; a task that
writes chunks fetches from every run the slices of its range of ids. Memory is bounded by one run and one range,
whatever the size of the data.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray import storage
from dpo_ray.pairs.store import PAIR_SCHEMA

RUN_SCHEMA = pa.schema([*PAIR_SCHEMA, ("source", pa.string()), ("row", pa.int64())])
SLICE_PAIRS = 256


@dataclass(frozen=True, slots=True)
class Run:
    """One sorted run.

    Attributes:
        uri: The file.
        first: Per slice, the first 8 bytes of its first id as a big-endian number.
        offsets: Where each slice begins in the file, and where the last ends.
        num_bytes: Size of its columns in memory.
    """

    uri: str
    first: list[int]
    offsets: list[int]
    num_bytes: int


def write_run(uri: str, table: pa.Table) -> Run:
    """Sorts a table of `RUN_SCHEMA`, and perhaps more columns, and writes it."""
    table = _sorted(table)
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    first, offsets = [], [0]
    heads = id_heads(table)
    for start in range(0, table.num_rows, SLICE_PAIRS):
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table.slice(start, SLICE_PAIRS))
        first.append(int(heads[start]))
        offsets.append(sink.tell())
    storage.write_bytes(uri, sink.getvalue())
    return Run(uri, first, offsets, table.nbytes)


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a run that hold all its ids of a range, and some beside it."""

    uri: str
    start: int
    stop: int


def extents(runs: Iterable[Run], low: int, high: int) -> list[Extent]:
    """Where the ids whose first 8 bytes are in [low, high) are."""
    found = []
    for run in runs:
        # Ids that begin like a slice's first may also end the slice before it.
        start = max(0, bisect.bisect_left(run.first, low) - 1)
        stop = bisect.bisect_left(run.first, high)
        if start < stop:
            found.append(Extent(run.uri, run.offsets[start], run.offsets[stop]))
    return found


def read_range(parts: Sequence[Extent], low: int, high: int) -> pa.Table:
    """The pairs of a range of ids from all runs, sorted by id, each once.

    Of equal pairs the one whose source and row come first stays.
    """
    tables = [_within(table, low, high) for part in parts for table in _slices(part)]
    table = _sorted(pa.concat_tables([table for table in tables if table.num_rows] or [RUN_SCHEMA.empty_table()]))
    ids = _id_bytes(table)
    different = np.ones(len(ids), dtype=bool)
    different[1:] = (ids[1:] != ids[:-1]).any(axis=1)
    # Filtering copies.
    return table if different.all() else table.filter(pa.array(different))


def id_heads(table: pa.Table) -> np.ndarray:
    """Shape (rows,), uint64: the first 8 bytes of each `pair_id` as a big-endian number."""
    return _id_bytes(table)[:, :8].copy().view(">u8").astype(np.uint64).reshape(-1)


def _id_bytes(table: pa.Table) -> np.ndarray:
    column = table["pair_id"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # What combining no chunks gives.
        return np.zeros((0, 16), dtype=np.uint8)
    raw = np.frombuffer(column.buffers()[1], dtype=np.uint8) if len(column) else np.zeros(0, dtype=np.uint8)
    return raw[column.offset * 16 : (column.offset + len(column)) * 16].reshape(-1, 16)


def _slices(part: Extent) -> Iterable[pa.Table]:
    buffer = pa.BufferReader(storage.read_bytes(part.uri, part.start, part.stop))
    while buffer.tell() < buffer.size():
        with pa.ipc.open_stream(buffer) as reader:
            yield reader.read_all()


def _within(table: pa.Table, low: int, high: int) -> pa.Table:
    heads = id_heads(table)
    start = int(np.searchsorted(heads, np.uint64(low)))
    stop = len(heads) if high == 2**64 else int(np.searchsorted(heads, np.uint64(high)))
    # A copy: a slice would hold all that it was cut from.
    return table.take(pa.array(np.arange(start, stop)))


def _sorted(table: pa.Table) -> pa.Table:
    keys = [("pair_id", "ascending"), ("source", "ascending"), ("row", "ascending")]
    return table.take(pc.sort_indices(table.select([key for key, _ in keys]), sort_keys=keys))
