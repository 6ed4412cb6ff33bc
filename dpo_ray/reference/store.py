"""The reference store: one file of scores per chunk, written atomically, ids checked at every read.

The store is all that stands between the trainer and the reference: either may die, restart or be elsewhere.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray import storage
from dpo_ray.errors import ReferenceFillError, ReferenceMismatchError
from dpo_ray.pairs.store import Chunk

FORMAT_VERSION = 1
_SCHEMA = pa.schema([("pair_id", pa.binary(16)), ("ref_logps", pa.list_(pa.float32()))])


def store_fingerprint(weights_digest: str, dtype: str, attention: str) -> str:
    """Names the store of one reference: what decides its scores, and nothing that does not."""
    return storage.fingerprint(
        {"format": FORMAT_VERSION, "weights": weights_digest, "dtype": dtype, "attention": attention}
    )


class ReferenceStore:
    """Scores of one reference model, by chunk."""

    def __init__(self, uri: str) -> None:
        """Args: uri: `<storage_path>/store/reference/<fingerprint>`."""
        self.uri = uri

    def put(self, chunk: Chunk, pair_ids: Sequence[bytes], ref_logps: Sequence[np.ndarray]) -> None:
        """Commits the scores of a chunk.

        Args:
            chunk: The chunk.
            pair_ids: Ids of its pairs.
            ref_logps: Per pair, Shape (answers,), float32, nats.
        """
        table = pa.table({"pair_id": list(pair_ids), "ref_logps": list(ref_logps)}, schema=_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        storage.write_bytes(self._place(chunk), sink.getvalue())

    def get(self, chunk: Chunk, pair_ids: Sequence[bytes]) -> list[np.ndarray]:
        """The scores of a chunk's pairs, in the order of `pair_ids`.

        Raises:
            FileNotFoundError: The chunk has not been scored yet.
            ReferenceMismatchError: The scores are of other pairs, or the file is damaged.
        """
        place = self._place(chunk)
        data = storage.read_bytes(place)
        try:
            table = pq.read_table(io.BytesIO(data), schema=_SCHEMA, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise ReferenceMismatchError(f"{place}: damaged ({error}); remove it, it will be scored again") from None
        if table["pair_id"].to_pylist() != list(pair_ids):
            raise ReferenceMismatchError(f"{place}: holds scores of other pairs; remove it, it will be scored again")
        scores = table["ref_logps"].combine_chunks()
        values = scores.flatten().to_numpy()
        return np.split(values, np.cumsum(scores.value_lengths().to_numpy())[:-1])

    def wait(
        self, chunk: Chunk, pair_ids: Sequence[bytes], check: Callable[[], None], poll_s: float = 0.2
    ) -> list[np.ndarray]:
        """Like `get`, but waits for a chunk that is still to be scored.

        Args:
            chunk: The chunk.
            pair_ids: Ids of its pairs.
            check: Called while waiting; raises when nobody will score the chunk any more.
            poll_s: First pause between looks; it doubles up to 5 seconds.
        """
        while True:
            try:
                return self.get(chunk, pair_ids)
            except FileNotFoundError:
                check()
                time.sleep(poll_s)
                poll_s = min(5.0, poll_s * 1.5)

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Those of `chunks` that have no scores yet, in the given order."""
        there = set(storage.list_names(self.uri))
        return [chunk for chunk in chunks if f"{chunk.key}.parquet" not in there]

    def _place(self, chunk: Chunk) -> str:
        return storage.join(self.uri, f"{chunk.key}.parquet")


def error_place(run_uri: str) -> str:
    """Where a run's filler leaves the error that stopped it: those who wait for scores see only storage."""
    return storage.join(run_uri, "reference_error.json")


def fill_check(run_uri: str) -> Callable[[], None]:
    """A picklable check for those who wait for scores: raises when nobody will make them any more."""
    return partial(_raise_if_stopped, error_place(run_uri))


def _raise_if_stopped(place: str) -> None:
    if storage.exists(place):
        raise ReferenceFillError(f"the reference stopped: {storage.read_json(place)['error']}")
