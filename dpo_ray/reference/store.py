"""The reference store: one file of scores per chunk, written atomically, ids checked at every read.

The store is all that stands between the trainer and the reference: either may die, restart or be elsewhere. A file
that is not what it should be is refused, which its reader writes down; whoever scores looks there, and makes it anew.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray import storage
from dpo_ray.errors import ReferenceFillError, ReferenceMismatchError, ScoresLostError
from dpo_ray.pairs.store import Chunk

FORMAT_VERSION = 1
# A reader that has waited this long says so in the store: somebody may have removed what a filler has seen.
MISSING_S = 30.0
_SCHEMA = pa.schema([("pair_id", pa.binary(16)), ("ref_logps", pa.list_(pa.float32()))])


def store_fingerprint(
    weights_digest: str, dtype: str, attention: str, per_token: bool, quantize: str | None = None
) -> str:
    """Names the store of one reference: what decides its scores, and nothing that does not."""
    about: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "weights": weights_digest,
        "dtype": dtype,
        "attention": attention,
    }
    # Only where set: the names of stores that there are stay.
    about |= {"per_token": True} if per_token else {}
    about |= {"quantize": quantize} if quantize else {}
    return storage.fingerprint(about)


def brought_fingerprint(weights_digest: str, pairs_uri: str) -> str:
    """Names the store of the scores that came with the pairs of one pair store, checked against one reference."""
    return storage.fingerprint(
        {"format": FORMAT_VERSION, "weights": weights_digest, "brought_with": storage.name_of(pairs_uri)}
    )


class ReferenceStore:
    """Scores of one reference model, by chunk."""

    def __init__(self, uri: str, filled_beside: bool = True) -> None:
        """Names the store.

        Args:
            uri: `<storage_path>/store/reference/<fingerprint>`.
            filled_beside: Whether somebody scores again, meanwhile, what a reader has refused.
        """
        self.uri, self._filled_beside = uri, filled_beside

    def put(self, chunk: Chunk, pair_ids: Sequence[bytes], ref_logps: Sequence[np.ndarray]) -> None:
        """Commits the scores of a chunk, where there are none yet: of several that score it, all use the first one's.

        Scores that cannot be read, or that a reader has refused, are replaced.

        Args:
            chunk: The chunk.
            pair_ids: Ids of its pairs.
            ref_logps: Per pair, float32, nats: Shape (answers,), or Shape (completion tokens,), as the store has them.
        """
        table = pa.table({"pair_id": list(pair_ids), "ref_logps": list(ref_logps)}, schema=_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        place, data, refusal = self.place(chunk.key), sink.getvalue(), self._refusal(chunk.key)
        refused = storage.exists(refusal)
        if refused or not (storage.create(place, data) or self._is_readable(chunk, pair_ids)):
            storage.write_bytes(place, data)
        if refused:
            storage.remove_file(refusal)

    def _is_readable(self, chunk: Chunk, pair_ids: Sequence[bytes]) -> bool:
        try:
            self.get(chunk, pair_ids)
        except (FileNotFoundError, ReferenceMismatchError):
            return False
        return True

    def get(self, chunk: Chunk, pair_ids: Sequence[bytes]) -> list[np.ndarray]:
        """The scores of a chunk's pairs, in the order of `pair_ids`.

        Raises:
            FileNotFoundError: The chunk has not been scored yet.
            ReferenceMismatchError: The scores are of other pairs, or the file is damaged.
        """
        place = self.place(chunk.key)
        data = storage.read_bytes(place)
        try:
            table = pq.read_table(io.BytesIO(data), schema=_SCHEMA, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise ReferenceMismatchError(f"{place}: damaged ({error})") from None
        if table["pair_id"].to_pylist() != list(pair_ids):
            raise ReferenceMismatchError(f"{place}: holds scores of other pairs")
        scores = table["ref_logps"].combine_chunks()
        values = scores.flatten().to_numpy()
        return np.split(values, np.cumsum(scores.value_lengths().to_numpy())[:-1])

    def wait(
        self, chunk: Chunk, pair_ids: Sequence[bytes], check: Callable[[], None], poll_s: float = 0.2
    ) -> tuple[list[np.ndarray], float]:
        """Like `get`, but waits for a chunk that is still to be scored, or has to be scored again.

        Args:
            chunk: The chunk.
            pair_ids: Ids of its pairs.
            check: Called while waiting; raises when nobody will score the chunk any more.
            poll_s: First pause between looks; it grows up to 5 seconds.

        Returns:
            The scores, and the seconds waited.

        Raises:
            ScoresLostError: They are refused, and nobody scores them again while this waits.
        """
        refused: list[str | None] = []
        began, waited_s = time.monotonic(), 0.0
        while True:
            try:
                return self.get(chunk, pair_ids), waited_s
            except FileNotFoundError:
                # Who scores it knows so; who thinks that it is there does not.
                if waited_s > MISSING_S and None not in refused:
                    self._refuse(chunk.key, None, f"{self.place(chunk.key)}: is not there")
                    refused.append(None)
            except ReferenceMismatchError as error:
                with contextlib.suppress(FileNotFoundError):
                    identity = storage.identity(self.place(chunk.key))
                    if identity not in refused:
                        self._refuse(chunk.key, identity, str(error))
                        refused.append(identity)
            if not self._filled_beside and any(refused):
                # Not within the handler: what it handles is an error that would end the run.
                raise ScoresLostError(f"{self.place(chunk.key)}: the scores are refused, and are to be made again")
            check()
            time.sleep(poll_s)
            poll_s = min(5.0, poll_s * 1.5)
            waited_s = time.monotonic() - began

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Those of `chunks` that have no scores, or refused ones, in the given order."""
        there = self.scored() - self.refused()
        return [chunk for chunk in chunks if chunk.key not in there]

    def scored(self) -> set[str]:
        """Keys of the chunks that have scores."""
        return {name.removesuffix(".parquet") for name in storage.list_names(self.uri) if name.endswith(".parquet")}

    def refused(self) -> set[str]:
        """Keys of the chunks whose scores a reader has refused, or missed."""
        names = storage.list_names(storage.join(self.uri, "refused"))
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def refusal(self, key: str) -> str | None:
        """Why a reader has refused the scores of a chunk that are there now; None where nobody has."""
        try:
            refusal = storage.read_json(self._refusal(key))
        except FileNotFoundError:
            return None
        identity = None
        with contextlib.suppress(FileNotFoundError):
            identity = storage.identity(self.place(key))
        if identity != refusal["identity"]:
            # They have been replaced since.
            storage.remove_file(self._refusal(key))
            return None
        return str(refusal["reason"])

    def damaged(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a reader has refused scores of one of `chunks` that are there, and still are."""
        keys = self.refused() & {chunk.key for chunk in chunks}
        return any(self.refusal(key) is not None and storage.exists(self.place(key)) for key in keys)

    def has(self, chunk: Chunk) -> bool:
        """Whether a chunk has scores that nobody has refused."""
        return storage.exists(self.place(chunk.key)) and self.refusal(chunk.key) is None

    def place(self, key: str) -> str:
        """Where the scores of a chunk are."""
        return storage.join(self.uri, f"{key}.parquet")

    def _refuse(self, key: str, identity: str | None, reason: str) -> None:
        storage.write_json(self._refusal(key), {"identity": identity, "reason": reason})

    def _refusal(self, key: str) -> str:
        return storage.join(self.uri, "refused", f"{key}.json")


def error_place(run_uri: str, generation: int) -> str:
    """Where the filler of a run's driver leaves the error that stopped it: who waits for scores sees only storage."""
    return storage.join(run_uri, f"reference_error-{generation:08d}.json")


def fill_check(place: str) -> Callable[[], None]:
    """A picklable check for those who wait for scores: raises when nobody will make them any more.

    Args:
        place: Of the error, from `error_place`.
    """
    return partial(_raise_if_stopped, place)


def _raise_if_stopped(place: str) -> None:
    if storage.exists(place):
        raise ReferenceFillError(f"the reference stopped: {storage.read_json(place)['error']}")
