"""The pair store: chunks of tokenized pairs in Parquet, and a manifest written last.

A chunk's bytes depend on the pairs alone: they are sorted by content id, so neither the order of the input files nor
the parallelism of `prepare` shows in the store.
"""

from __future__ import annotations

import hashlib
import io
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_ray import storage
from dpo_ray.errors import DataError, StorageError
from dpo_ray.types import TokenizedPair

FORMAT_VERSION = 2
CHUNKS_AHEAD = 4
TOKENS = pa.list_(pa.int32())
PAIR_SCHEMA = pa.schema([("pair_id", pa.binary(16)), ("prompt", TOKENS), ("answers", pa.list_(TOKENS))])
SOURCE_SCHEMA = pa.schema([("pair_id", pa.binary(16)), ("source", pa.string()), ("row", pa.int64())])
# Beside the tokens, where the data bring a pair's weight, or the margin of its chosen answer.
PAIR_NUMBERS = ("weight", "margin")
# Beside the source, where the data bring the reference's scores.
BROUGHT_SCORES = pa.field("ref_logps", pa.list_(pa.float32()))
# Likewise, where the answers have scores of a reward model or a judge: the first one's less the last one's.
SCORE_GAP = pa.field("score_gap", pa.float32())
# rows = pairs + eval_pairs + duplicates + identical + tied + rejects. The others are counted before duplicates are
# dropped: prompts, answers and tokens cut, prompts that the chat template renders otherwise when their answer follows,
# and pairs whose answers have scores.
COUNTS = (
    *("rows", "pairs", "eval_pairs", "duplicates", "identical", "tied", "rejects"),
    *("prompts_cut", "answers_cut", "tokens_cut", "prompts_differ", "with_scores"),
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk, as the manifest has it.

    Attributes:
        name: File name in the store.
        key: Digest of the token content of its pairs: names its reference scores.
        sha256: Digest of the file.
        num_pairs: Pairs in it.
        num_tokens: Tokens in it, prompts counted once per pair.
    """

    name: str
    key: str
    sha256: str
    num_pairs: int
    num_tokens: int

    @property
    def source(self) -> int:
        """Number of the source, or of the held-out set, that its pairs are of; 0 where they are not kept apart."""
        return int(self.name.partition("-")[0].partition(".")[2] or 0)


@dataclass(frozen=True, slots=True)
class PairStore:
    """A finished pair store.

    Attributes:
        uri: Its folder.
        train: Chunks to train on, in store order.
        eval: Held-out chunks.
        counts: What became of the rows, see `COUNTS`.
    """

    uri: str
    train: tuple[Chunk, ...]
    eval: tuple[Chunk, ...]
    counts: dict[str, int]


def chunk_name(part: str, index: int) -> str:
    """File name of a chunk.

    Args:
        part: `train` or `eval`; with the number of a source or set behind it, e.g. `train.1`, where these are kept
            apart.
        index: Counted from 0 in its part.
    """
    return f"{part}-{index:06d}.parquet"


def num_chunks(num_pairs: int, chunk_pairs: int) -> int:
    """How many chunks `num_pairs` go to.

    Small data get smaller chunks, down to 64 pairs, so that the first step does not wait for all of them to be scored
    and several reference actors have work.
    """
    target = min(chunk_pairs, max(64, num_pairs // 16))
    return max(1, -(-num_pairs // target))


def chunk_start(index: int, chunks: int) -> int:
    """The least first 8 bytes of an id, as a number, that belong to a chunk; 2^64 for the one after the last.

    Ids are uniform, so this shuffles and balances.
    """
    return -(-(index << 64) // chunks)


def held_out(pair_id: bytes, fraction: float) -> bool:
    """Whether a pair belongs to the held-out split, by its content alone."""
    return int.from_bytes(pair_id[8:], "big") < fraction * 2**64


def write_chunk(uri: str, name: str, table: pa.Table) -> Chunk:
    """Writes a chunk, and where its pairs come from.

    The chunk's bytes depend on its pairs alone; their sources are a file of their own.

    Args:
        uri: The store.
        name: From `chunk_name`.
        table: `PAIR_SCHEMA`, `SOURCE_SCHEMA` and perhaps `PAIR_NUMBERS` (float32), `BROUGHT_SCORES` and `SCORE_GAP`,
            sorted by id, ids unique.
    """
    numbers = [name for name in PAIR_NUMBERS if name in table.column_names]
    data = _parquet(table.select([*PAIR_SCHEMA.names, *numbers]))
    beside = (*SOURCE_SCHEMA.names, BROUGHT_SCORES.name, SCORE_GAP.name)
    about = [name for name in beside if name in table.column_names]
    storage.write_bytes(storage.join(uri, "sources", name), _parquet(table.select(about)))
    storage.write_bytes(storage.join(uri, name), data)
    tokens = [table["prompt"], pc.list_flatten(table["answers"])]
    num_tokens = sum(int(pc.sum(pc.list_value_length(lists)).as_py() or 0) for lists in tokens)
    key = chunk_key(table["pair_id"].to_pylist())
    return Chunk(name, key, hashlib.sha256(data).hexdigest(), table.num_rows, num_tokens)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def sources_of(uri: str, chunk: Chunk) -> dict[bytes, str]:
    """Where the pairs of a chunk come from, file and row, for people to read."""
    data = storage.read_bytes(storage.join(uri, "sources", chunk.name))
    table = pq.read_table(io.BytesIO(data), schema=SOURCE_SCHEMA)
    return {row["pair_id"]: f"{row['source']} row {row['row']}" for row in table.to_pylist()}


def files_of(uri: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The files that a store was made from, each with its `FileInfo.identity` at that time, and its `Reading`."""
    manifest = storage.read_json(storage.join(uri, "manifest.json"))
    return {file: (identity, reading) for file, identity, _, reading in manifest["about"]["files"]}


def brought_scores(uri: str, chunk: Chunk, pair_ids: Sequence[bytes]) -> list[np.ndarray]:
    """The scores that came with a chunk's pairs, in store order: Shape (answers,) each, float32, nats.

    Raises:
        DataError: They are damaged, or not those of `pair_ids`.
    """
    return _split(_beside(uri, chunk, pair_ids, BROUGHT_SCORES.name))


def score_gaps(uri: str, chunk: Chunk, pair_ids: Sequence[bytes]) -> np.ndarray:
    """By how much the scores of a chunk's pairs fall from the first answer to the last, in store order.

    Returns:
        Shape (pairs,), float32; NaN where the answers have none.

    Raises:
        DataError: They are damaged, or not those of `pair_ids`.
    """
    return _beside(uri, chunk, pair_ids, SCORE_GAP.name).to_numpy()


def _beside(uri: str, chunk: Chunk, pair_ids: Sequence[bytes], name: str) -> pa.ChunkedArray:
    """A column of what stands beside a chunk. Raises DataError."""
    place = storage.join(uri, "sources", chunk.name)
    try:
        data = io.BytesIO(storage.read_bytes(place))
        table = pq.read_table(data, columns=["pair_id", name], page_checksum_verification=True)
        if table["pair_id"].to_pylist() == list(pair_ids):
            return table[name]
    except FileNotFoundError:
        pass
    except Exception as error:
        if not storage.is_damage(error):
            raise
    raise DataError(
        f"{place}: the scores that came with the pairs are missing or damaged; remove "
        f"{storage.join(uri, 'manifest.json')} and run `dpo-ray prepare` to make the store anew"
    )


def chunk_key(pair_ids: Iterable[bytes]) -> str:
    """Digest of a chunk's token content: ids are digests of tokens already."""
    return hashlib.sha256(b"".join(sorted(pair_ids))).hexdigest()[:32]


def read_chunk(uri: str, chunk: Chunk) -> list[TokenizedPair]:
    """The pairs of a chunk, in store order.

    Raises:
        DataError: The file is missing or is not the one that the manifest describes.
        StorageError: Nothing of the store is to be seen from this host.
    """
    place = storage.join(uri, chunk.name)
    # What was damaged on its way, once, is no damaged file.
    data = next((data for data in (_content(place) for _ in range(2)) if _is_chunk(data, chunk)), None)
    if data is None:
        if not storage.exists(storage.join(uri, "manifest.json")):
            raise not_seen(uri)
        raise DataError(
            f"{place}: the chunk is missing or damaged (its SHA-256 is not the manifest's); remove "
            f"{storage.join(uri, 'manifest.json')} and run `dpo-ray prepare` to make the store anew"
        )
    return pairs_of(pq.read_table(io.BytesIO(data)))


def not_seen(uri: str) -> StorageError:
    """Says that a pair store which others have read cannot be seen from here."""
    return StorageError(
        f"{uri}: {socket.gethostname()} sees nothing of this pair store, which others have read: is the file system "
        "mounted there? If somebody has removed the store, `dpo-ray prepare` makes it anew"
    )


def _content(place: str) -> bytes:
    try:
        return storage.read_bytes(place)
    except FileNotFoundError:
        return b""


def _is_chunk(data: bytes, chunk: Chunk) -> bool:
    return hashlib.sha256(data).hexdigest() == chunk.sha256


def read_ahead(read: Callable[[Chunk], _T], chunks: Iterable[Chunk]) -> Iterator[_T]:
    """Reads chunks with a few threads, `CHUNKS_AHEAD` of the one in use and no more.

    Args:
        read: Reads one; what it raises is raised here.
        chunks: In the order in which they are wanted.
    """
    pool, waiting = ThreadPoolExecutor(CHUNKS_AHEAD), deque[Future[_T]]()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(read, chunk))
            if len(waiting) > CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_pair_ids(uri: str, chunk: Chunk) -> list[bytes]:
    """The ids of a chunk's pairs, in store order; of the file little more than their column is read.

    Raises:
        DataError: The file is missing, or holds other ids than the manifest says.
    """
    place = storage.join(uri, chunk.name)
    try:
        with (
            storage.open_ranges(place) as ranges,
            pq.ParquetFile(pa.PythonFile(ranges, "r"), page_checksum_verification=True) as file,
        ):
            pair_ids: list[bytes] = file.read(columns=["pair_id"])["pair_id"].to_pylist()
    except FileNotFoundError:
        raise DataError(f"{place}: the chunk is missing") from None
    except Exception as error:
        if not storage.is_damage(error):
            raise
        raise DataError(f"{place}: the chunk is damaged: {error}") from None
    if len(pair_ids) != chunk.num_pairs or chunk_key(pair_ids) != chunk.key:
        raise DataError(
            f"{place}: the chunk is not the manifest's: it has {len(pair_ids)} pairs, the manifest {chunk.num_pairs}, "
            "and their ids differ"
        )
    return pair_ids


def pairs_of(table: pa.Table) -> list[TokenizedPair]:
    """Decodes a table of `PAIR_SCHEMA`, and perhaps `PAIR_NUMBERS`; the arrays are views into it."""
    table = table.combine_chunks()
    prompts = _split(table["prompt"])
    answers = table["answers"].combine_chunks()
    each_answer = _split_array(answers.flatten())
    bounds = np.concatenate([[0], np.cumsum(answers.value_lengths().to_numpy())])
    numbers = {name: table[name].to_pylist() for name in PAIR_NUMBERS if name in table.column_names}
    return [
        TokenizedPair(
            pair_id,
            prompt,
            tuple(each_answer[bounds[row] : bounds[row + 1]]),
            **{name: values[row] for name, values in numbers.items()},
        )
        for row, (pair_id, prompt) in enumerate(zip(table["pair_id"].to_pylist(), prompts, strict=True))
    ]


def table_of(pairs: Sequence[TokenizedPair]) -> pa.Table:
    """Encodes pairs as a table of `PAIR_SCHEMA`."""
    answers = _lists([answer for pair in pairs for answer in pair.answers])
    ends = np.cumsum([0, *(len(pair.answers) for pair in pairs)], dtype=np.int32)
    return pa.table(
        {
            "pair_id": pa.array([pair.pair_id for pair in pairs], PAIR_SCHEMA.field("pair_id").type),
            "prompt": _lists([pair.prompt for pair in pairs]),
            "answers": pa.ListArray.from_arrays(ends, answers),
        },
        schema=PAIR_SCHEMA,
    )


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    # Arrow's own conversion of lists of arrays goes number by number.
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(values, pa.int32()))


def write_manifest(store: PairStore, about: dict[str, Any]) -> None:
    """Commits a store: without its manifest it does not exist."""
    storage.write_json(
        storage.join(store.uri, "manifest.json"),
        {
            "format": FORMAT_VERSION,
            "about": about,
            "counts": store.counts,
            "train": [asdict(chunk) for chunk in store.train],
            "eval": [asdict(chunk) for chunk in store.eval],
        },
    )


def open_store(uri: str) -> PairStore | None:
    """The store at a place, or None where there is no finished one.

    Raises:
        DataError: It was written by another version.
    """
    place = storage.join(uri, "manifest.json")
    if not storage.exists(place):
        return None
    manifest = storage.read_json(place)
    if manifest["format"] != FORMAT_VERSION:
        raise DataError(f"{place}: format {manifest['format']}, this version reads {FORMAT_VERSION}; run prepare again")
    train, held = ([Chunk(**chunk) for chunk in manifest[split]] for split in ("train", "eval"))
    return PairStore(uri, tuple(train), tuple(held), {**dict.fromkeys(COUNTS, 0), **manifest["counts"]})


def _split(column: pa.ChunkedArray) -> list[np.ndarray]:
    return _split_array(column.combine_chunks())


def _split_array(lists: pa.ListArray) -> list[np.ndarray]:
    values = lists.flatten().to_numpy()
    return np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1]) if len(lists) else []
