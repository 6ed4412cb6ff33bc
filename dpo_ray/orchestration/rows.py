"""What the tasks of `prepare` do: read rows, tokenize them into sorted runs, merge runs into chunks.

Light to import, for every task imports it.
"""

from __future__ import annotations

import functools
import json
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_ray import storage
from dpo_ray.errors import DataError, RowError, TiedError
from dpo_ray.model.files import load_tokenizer
from dpo_ray.pairs import runs, store
from dpo_ray.pairs.formats import Reading, parse_row
from dpo_ray.pairs.tokenize import Limits, PairTokenizer, Tokenized, pair_id, tokenizer_digest
from dpo_ray.pairs.turns import read_number
from dpo_ray.types import PreferencePair, TokenizedPair, TokenRow

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ROWS_PER_READ = 1000
RAW_SCHEMA = pa.schema(
    [("file", pa.int64()), ("row", pa.int64()), ("text", pa.large_binary()), ("num_bytes", pa.int64())]
)


class _Brought(NamedTuple):
    """What a row brings besides texts.

    Attributes:
        scores: The reference's.
        numbers: By their names in `store.PAIR_NUMBERS`.
        judged: The answers' own scores, see `PreferencePair.scores`.
    """

    scores: list[float]
    numbers: dict[str, float]
    judged: tuple[float, ...]


_Good = tuple[Tokenized, str, int, _Brought]  # With source and row.


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file.

    Attributes:
        uri: The file.
        num_bytes: Its size.
        identity: What changes when its content does.
        part: Of the store that its pairs go to, see `store.chunk_name`.
        reading: How its rows are read.
    """

    uri: str
    num_bytes: int
    identity: str
    part: str
    reading: Reading


@dataclass(frozen=True, slots=True)
class Job:
    """What all tasks of one `prepare` know.

    Attributes:
        uri: The store that is being made.
        files: The input, in the order of their URIs.
        tokenizer_uri: Directory of the tokenizer.
        tokenizer_digest: Of the tokenizer that is meant.
        chat_template: As in the configuration.
        limits: As in the configuration.
        vocab_size: Rows of the model's embedding.
        template_kwargs: As in the configuration, as JSON.
        eval_fraction: As in the configuration.
        score_columns: Columns that bring the reference's scores, best answer first; empty where none do.
        number_columns: Of `store.PAIR_NUMBERS`, those that some column brings, and which.
    """

    uri: str
    files: tuple[SourceFile, ...]
    tokenizer_uri: str
    tokenizer_digest: str
    chat_template: str
    limits: Limits
    vocab_size: int
    template_kwargs: str
    eval_fraction: float
    score_columns: tuple[str, ...] = ()
    number_columns: dict[str, str] = field(default_factory=dict)

    def columns(self, reading: Reading) -> list[str]:
        """The columns of a source that are read."""
        own = (*reading.columns.values(), *reading.score_columns)
        return [*own, *self.score_columns, *self.number_columns.values()]


def open_rows(uri: str, columns: Sequence[str] | None = None) -> Iterator[tuple[list[bytes], float]]:
    """The rows of a file as JSON text, some at a time, with the share of the file that is read by then.

    Args:
        uri: A file with one of `SUFFIXES`.
        columns: Columns of a Parquet file to read; all when None.

    Raises:
        DataError: The file is gone, damaged, or not what its name says.
    """
    number = 0
    try:
        for rows, share in _parquet_rows(uri, columns) if uri.endswith(".parquet") else _lines(uri):
            yield rows, share
            number += len(rows)
    except Exception as error:
        if storage.is_damage(error):
            raise DataError(f"{uri}: cannot read past row {number}: {error}; restore the file") from None
        raise storage.as_storage_error(uri, error) from None


def _lines(uri: str) -> Iterator[tuple[list[bytes], float]]:
    total = max(1, storage.size(uri))
    with storage.open_read(uri) as (file, position):
        rows = list[bytes]()
        for line in file:
            rows.append(line.rstrip(b"\r\n"))
            if len(rows) == ROWS_PER_READ:
                yield rows, position() / total
                rows = []
        yield rows, 1.0


def _parquet_rows(uri: str, columns: Sequence[str] | None) -> Iterator[tuple[list[bytes], float]]:
    with storage.open_read(uri) as (file, _):
        parquet = pq.ParquetFile(file)
        there = set(parquet.schema_arrow.names)
        wanted = None if columns is None else [name for name in columns if name in there]
        number, total = 0, max(1, parquet.metadata.num_rows)
        for batch in parquet.iter_batches(batch_size=ROWS_PER_READ, columns=wanted):
            number += batch.num_rows
            yield [json.dumps(row, default=str).encode() for row in batch.to_pylist()], number / total
        if not number:
            yield [], 1.0


def read(batch: Mapping[str, Any], job: Job) -> Iterator[pa.Table]:
    """Rows of files, some at a time, numbered from 1; the size of the file is shared out among them.

    Raises:
        DataError: A file is not the one any more that the store is named after.
    """
    for index in map(int, batch["item"]):
        file = job.files[index]
        # Hosts may have copies of a local file, of other times.
        meant = storage.identity(file.uri) if storage.is_local(file.uri) else file.identity
        _refuse_changed(file, meant)
        number = told = 0
        for texts, share in open_rows(file.uri, job.columns(file.reading)):
            now = int(share * file.num_bytes)
            yield _raw(index, number, texts, now - told)
            number, told = number + len(texts), now
        _refuse_changed(file, meant)


def _refuse_changed(file: SourceFile, meant: str) -> None:
    now = storage.identity(file.uri)
    # Some listings have etags without the quotation marks that a look at one file gives them.
    if now.replace('"', "") != meant.replace('"', "") or now.partition(":")[0] != str(file.num_bytes):
        raise DataError(
            f"{file.uri} has changed since this command began (size and mark were {file.identity}, are {now}): give "
            "the same command again, and leave the file alone meanwhile"
        )


def _raw(file: int, before: int, texts: list[bytes], num_bytes: int) -> pa.Table:
    # A file without rows gives one row without text, so that no block is empty and its bytes are counted.
    found: list[bytes | None] = [*texts] or [None]
    sizes = [num_bytes] + [0] * (len(found) - 1)
    numbers = range(before + 1, before + 1 + len(found))
    return pa.table({"file": [file] * len(found), "row": numbers, "text": found, "num_bytes": sizes}, RAW_SCHEMA)


def make_runs(block: pa.Table, job: Job) -> pa.Table:
    """Tokenizes a block of rows into sorted runs on storage.

    What is made is on record when it is whole, so that a `prepare` that was killed does not tokenize it again.

    Returns:
        One row: the record, as JSON.
    """
    first, last = (f"{block['file'][row].as_py():06d}-{block['row'][row].as_py():012d}" for row in (0, -1))
    place = storage.join(job.uri, "runs", f"{first}-{last}")
    num_bytes = sum(block["num_bytes"].to_pylist())
    record = _record(place)
    if record is None:
        record = _make_runs(block, job, place)
        storage.write_json(f"{place}.json", record)
    return pa.table({"record": [json.dumps({**record, "num_bytes": num_bytes})]})


def _record(place: str) -> dict[str, Any] | None:
    """What an earlier `prepare` has recorded, where its runs are still there."""
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(f"{place}.json"))
    except FileNotFoundError:
        return None
    return record if all(storage.exists(run["uri"]) for run in record["runs"].values()) else None


def _make_runs(block: pa.Table, job: Job, place: str) -> dict[str, Any]:
    tables: defaultdict[str, list[pa.Table]] = defaultdict(list)
    rejects, counts = list[dict[str, Any]](), Counter[str]()
    # Arrow tables at once: as Python objects short pairs take ten times the memory of their tokens.
    for start in range(0, block.num_rows, ROWS_PER_READ):
        good: defaultdict[str, list[_Good]] = defaultdict(list)
        for file, row, text, made, brought in _tokenize(block.slice(start, ROWS_PER_READ), job):
            counts["rows"] += 1
            if isinstance(made, TiedError):
                counts["tied"] += 1
            elif isinstance(made, RowError):
                shown = text.decode("utf-8", errors="backslashreplace")
                rejects.append({"source": file.uri, "row": row, "reason": str(made), "text": shown})
            elif len(kept := _distinct(made.pair)) < 2:
                counts["identical"] += 1
            else:
                made = replace(made, pair=_with_answers(made.pair, kept))
                if brought.judged:
                    brought = brought._replace(judged=tuple(brought.judged[index] for index in kept))
                    counts["with_scores"] += 1
                part = "eval" if store.held_out(made.pair.pair_id, job.eval_fraction) else file.part
                good[part].append((made, file.uri, row, brought))
                counts["prompts_cut"] += made.prompt_tokens_cut > 0
                counts["answers_cut"] += sum(cut > 0 for cut in made.answer_tokens_cut)
                counts["tokens_cut"] += made.prompt_tokens_cut + sum(made.answer_tokens_cut)
                counts["prompts_differ"] += made.prompt_differs
        for part, pairs in good.items():
            counts[f"good_{part}"] += len(pairs)
            tables[part].append(_run_table(pairs, job))
    counts["rejects"] = len(rejects)
    if rejects:
        storage.write_json_lines(storage.join(job.uri, "rejects", f"{storage.name_of(place)}.jsonl"), rejects)
    written = {
        part: asdict(runs.write_run(f"{place}.{part}.arrow", pa.concat_tables(each))) for part, each in tables.items()
    }
    return {"counts": counts, "runs": written}


def _distinct(pair: TokenizedPair) -> list[int]:
    """Which answers do not say the same as one before."""
    first = {answer.tobytes(): index for index, answer in reversed(list(enumerate(pair.answers)))}
    return sorted(first.values())


def _with_answers(pair: TokenizedPair, kept: Sequence[int]) -> TokenizedPair:
    if len(kept) == len(pair.answers):
        return pair
    answers = tuple(pair.answers[index] for index in kept)
    return replace(pair, pair_id=pair_id(pair.prompt, answers), answers=answers)


def _tokenize(block: pa.Table, job: Job) -> Iterator[tuple[SourceFile, int, bytes, Tokenized | RowError, _Brought]]:
    rows = [
        (job.files[file], number, text)
        for file, number, text in zip(*(block[name].to_pylist() for name in ("file", "row", "text")), strict=True)
        if text is not None and text.strip()
    ]
    parsed = [_parsed(text, file.reading, job) for file, _, text in rows]
    about = job.tokenizer_uri, job.tokenizer_digest, job.chat_template, job.limits, job.vocab_size, job.template_kwargs
    tokenizer = _pair_tokenizer(*about)
    tokenized = iter(tokenizer([each[0] for each in parsed if not isinstance(each, RowError)]))
    for (file, number, text), each in zip(rows, parsed, strict=True):
        if isinstance(each, RowError):
            yield file, number, text, each, _Brought([], {}, ())
            continue
        made, (_, brought) = next(tokenized), each
        if brought.scores and isinstance(made, Tokenized) and made.prompt_tokens_cut + sum(made.answer_tokens_cut):
            made = RowError(
                f"{', '.join(job.score_columns)}: the pair is longer than data.max_length and its like allow, and was "
                "cut, but its scores are of the whole; raise the limit, or leave the row out"
            )
        yield file, number, text, made, brought


@functools.cache
def _pair_tokenizer(
    uri: str, digest: str, chat_template: Any, limits: Limits, vocab_size: int, template_kwargs: str
) -> PairTokenizer:
    tokenizer = load_tokenizer(uri)
    if tokenizer_digest(tokenizer) != digest:
        raise DataError(
            f"{uri}: on node {socket.gethostname()} this is another tokenizer than where the run was started, or it "
            "was changed meanwhile: put the same files there, or use a place that all nodes share"
        )
    return PairTokenizer(tokenizer, chat_template, limits, vocab_size, json.loads(template_kwargs))


def _parsed(text: bytes, reading: Reading, job: Job) -> tuple[PreferencePair | TokenRow, _Brought] | RowError:
    try:
        row = json_object(text)
        pair = parse_row(row, reading)
        if len(pair.answers) < 2:
            raise RowError(f"format {reading.format} gives {len(pair.answers)} answers: a pair needs two or more")
        if job.score_columns and len(pair.answers) != len(job.score_columns):
            raise RowError(
                f"{', '.join(job.score_columns)}: reference.columns brings {len(job.score_columns)} scores, the row "
                f"has {len(pair.answers)} answers; leave the row out, or reference.columns"
            )
        scores = [_score(row, column) for column in job.score_columns]
        numbers = {name: _number(row, name, job.number_columns[name]) for name in job.number_columns}
        return pair, _Brought(scores, numbers, pair.scores)
    except RowError as error:
        return error


def _score(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    score = read_number(value)
    if score is None or score > 0:
        shown = json.dumps(value)[:40] if column in row else "missing"
        raise RowError(
            f"{column} is {shown}: reference.columns wants the log-probability of an answer there, a sum over its "
            "tokens and so a number of at most 0"
        )
    return score


def _number(row: Mapping[str, Any], name: str, column: str) -> float:
    value = row.get(column)
    number = read_number(value)
    if number is None or name == "weight" and number < 0:
        shown = json.dumps(value)[:40] if column in row else "missing"
        least = ", 0 or more" if name == "weight" else ""
        raise RowError(f"{column} is {shown}: data.{name}_column wants a finite number there{least}")
    return number


def json_object(text: bytes) -> dict[str, Any]:
    """The object that a row of JSON holds.

    Raises:
        RowError: It is not UTF-8, not JSON, or no object.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"))  # Editors on Windows begin a file with a byte order mark.
    except UnicodeDecodeError as error:
        raise RowError(
            f"not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}; save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON: {error}; mend the line, or leave it out") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise RowError(f"not a JSON object but a {kind}: write one object {{...}} with the row's columns on each line")
    return value


def _run_table(made: list[_Good], job: Job) -> pa.Table:
    table = store.table_of([tokenized.pair for tokenized, *_ in made])
    sources = pa.array([source for _, source, *_ in made], pa.string())
    numbers = pa.array([row for _, _, row, _ in made], pa.int64())
    judged = [brought.judged for *_, brought in made]
    gaps = pa.array([each[0] - each[-1] if each else None for each in judged], store.SCORE_GAP.type)
    table = table.append_column("source", sources).append_column("row", numbers).append_column(store.SCORE_GAP, gaps)
    for name in job.number_columns:
        table = table.append_column(name, pa.array([brought.numbers[name] for *_, brought in made], pa.float32()))
    if not job.score_columns:
        return table
    scores = pa.array([brought.scores for *_, brought in made], store.BROUGHT_SCORES.type)
    return table.append_column(store.BROUGHT_SCORES, scores)


@dataclass(frozen=True, slots=True)
class Merge:
    """Consecutive chunks of one part of the store that one task writes.

    Attributes:
        part: Which, see `store.chunk_name`.
        chunks: How many chunks the part has.
        first: The first to write.
        stop: The one after the last to write.
        parts: Where the pairs are.
        others: Where pairs of other parts with ids of this range are: what stands there is left out here.
    """

    part: str
    chunks: int
    first: int
    stop: int
    parts: list[runs.Extent]
    others: list[runs.Extent]


def write_chunks(merge: Merge, uri: str) -> Iterator[store.Chunk]:
    """Merges runs into the chunks of a range of ids."""
    starts = [store.chunk_start(index, merge.chunks) for index in range(merge.first, merge.stop + 1)]
    try:
        table = runs.read_range(merge.parts, starts[0], starts[-1])
    except FileNotFoundError as error:
        raise DataError(
            f"{uri}: a file of this pair store went away while it was made ({error}): another run that makes the same "
            "store has given up; give the command again"
        ) from None
    if merge.others:
        ids = runs.read_range(merge.others, starts[0], starts[-1])["pair_id"]
        table = table.filter(pc.invert(pc.is_in(table["pair_id"], value_set=ids.combine_chunks())))
    bounds = [0, *runs.id_heads(table).searchsorted(np.array(starts[1:-1], dtype=np.uint64)).tolist(), table.num_rows]
    for index, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False), start=merge.first):
        if stop > start:
            yield store.write_chunk(uri, store.chunk_name(merge.part, index), table.slice(start, stop - start))
