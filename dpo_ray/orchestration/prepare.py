"""Raw rows -> pair store, with Ray Data: read, parse, tokenize, send each pair to its chunk, write."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import DataError
from dpo_ray.model.files import check_vocabulary, load_tokenizer
from dpo_ray.orchestration import rows
from dpo_ray.pairs import store
from dpo_ray.pairs.store import PairStore
from dpo_ray.pairs.tokenize import PairTokenizer, tokenizer_digest

MAX_PARTITIONS = 256
# The groups of what is not in a chunk.
_REJECTS, _DROPPED = "rejects", "dropped"


def locate(config: Config) -> tuple[str, dict[str, Any]]:
    """Where the store of a configuration's pairs is, made or not, and what it is made from.

    Raises:
        DataError: A file is missing or of an unknown kind.
        ConfigError: The tokenizer cannot be loaded or does not fit.
    """
    data = config.data
    tokenizer_uri = config.model.tokenizer or config.model.path
    tokenizer = load_tokenizer(tokenizer_uri)
    check_vocabulary(config.model.path, tokenizer)
    PairTokenizer(tokenizer, data.chat_template, data.max_length)
    files = sorted({uri for pattern in data.train for uri in storage.expand(pattern)})
    held = sorted({uri for pattern in data.eval for uri in storage.expand(pattern)})
    for uri in [*files, *held]:
        if not uri.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise DataError(f"{uri}: unknown kind of file; known are .jsonl, .jsonl.gz and .parquet")
    about = {
        "format": store.FORMAT_VERSION,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": data.chat_template,
        "max_length": data.max_length,
        "chunk_pairs": data.chunk_pairs,
        "eval_fraction": data.eval_fraction,
        "train": [[uri, storage.identity(uri)] for uri in files],
        "eval": [[uri, storage.identity(uri)] for uri in held],
    }
    return storage.join(config.store_uri, "pairs", storage.fingerprint(about)), about


def prepare(config: Config) -> PairStore:
    """Makes the pair store, or opens it where it is there already.

    Raises:
        DataError: A file cannot be read, too many rows are rejects, or nothing is left to train on. The rejects
            stand in `<run>/rejects/rejects.jsonl`.
    """
    uri, about = locate(config)
    made = store.open_store(uri)
    if made is None:
        return _make(config, uri, about)
    _show_rejects(config, uri, made.counts)
    return made


def _make(config: Config, uri: str, about: dict[str, Any]) -> PairStore:
    tokenized = _tokenize(config, about).materialize()
    counts = _count(tokenized)
    chunks = _write(tokenized, counts, uri, config.data.chunk_pairs)
    _show_rejects(config, uri, counts)
    train, held = (tuple(chunk for chunk in chunks if chunk.name.startswith(split)) for split in ("train", "eval"))
    counts["pairs"] = sum(chunk.num_pairs for chunk in train)
    counts["eval_pairs"] = sum(chunk.num_pairs for chunk in held)
    counts["duplicates"] = counts.pop("good_train") + counts.pop("good_eval") - counts["pairs"] - counts["eval_pairs"]
    if not counts["pairs"]:
        raise DataError(f"{', '.join(config.data.train)}: no pair is left to train on; counts: {json.dumps(counts)}")
    made = PairStore(uri, train, held, counts)
    store.write_manifest(made, about)
    return made


def _tokenize(config: Config, about: dict[str, Any]) -> ray.data.Dataset:
    """One row per input row: its tokens, or the reason why it has none."""
    files = [{"uri": uri, "split": split} for split in ("train", "eval") for uri, _ in about[split]]
    tokenizer_uri = config.model.tokenizer or config.model.path
    # Reading and tokenizing differ in their resources so that they do not fuse: one large file then feeds many tasks.
    lines = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        rows.read, batch_size=1, num_cpus=0.5, zero_copy_batch=True
    )
    lines.context.target_max_block_size = 8 * 2**20
    return lines.map_batches(
        rows.tokenize_rows,
        batch_size=rows.ROWS_PER_READ,
        batch_format="pyarrow",
        num_cpus=1,
        fn_args=(tokenizer_uri, config.data.chat_template, config.data.max_length, config.data.eval_fraction),
    )


def _count(tokenized: ray.data.Dataset) -> dict[str, int]:
    """What became of the rows."""

    def count(batch: pa.Table) -> pa.Table:
        reasons = Counter(batch["reason"].to_pylist())
        good = Counter(batch.filter(pc.is_null(batch["reason"]))["split"].to_pylist())
        num_rows = batch.num_rows - reasons[rows.END]
        values = {
            "rows": num_rows,
            "rejects": num_rows - reasons[rows.IDENTICAL] - reasons[None],
            "identical": reasons[rows.IDENTICAL],
            "good_train": good["train"],
            "good_eval": good["eval"],
        }
        return pa.table({name: [value] for name, value in values.items()})

    total: Counter[str] = Counter()
    for row in tokenized.map_batches(count, batch_format="pyarrow", batch_size=None).iter_rows():
        total.update({name: int(value) for name, value in row.items()})
    return dict(total)


def _write(tokenized: ray.data.Dataset, counts: dict[str, int], uri: str, chunk_pairs: int) -> list[store.Chunk]:
    """One exchange: each pair to its chunk, the rejects to their file. Returns the chunks in order."""
    chunks = {split: store.num_chunks(counts[f"good_{split}"], chunk_pairs) for split in ("train", "eval")}
    held_out = _held_out_ids(tokenized) if counts["good_eval"] else set()

    def add_key(batch: pa.Table) -> pa.Table:
        rows = zip(*(batch[name].to_pylist() for name in ("reason", "split", "pair_id")), strict=True)
        keys = [
            store.chunk_name(split, store.chunk_of(pair_id, chunks[split])) if reason is None else _leftover(reason)
            for reason, split, pair_id in rows
        ]
        return batch.append_column("key", pa.array(keys, pa.string()))

    def write(group: pa.Table) -> pa.Table:
        key = group["key"][0].as_py()
        if key == _REJECTS:
            _write_rejects(uri, group)
        if key in (_REJECTS, _DROPPED):
            return pa.table({"chunk": [""]})
        # A held-out pair that also stands among the training pairs is held out.
        drop = held_out if key.startswith("train") else set()
        first = {pair_id: row for row, pair_id in enumerate(group["pair_id"].to_pylist()) if pair_id not in drop}
        if not first:
            return pa.table({"chunk": [""]})
        table = group.take(list(first.values())).select(store.PAIR_SCHEMA.names).cast(store.PAIR_SCHEMA)
        return pa.table({"chunk": [json.dumps(asdict(store.write_chunk(uri, key, table)))]})

    keyed = tokenized.map_batches(add_key, batch_format="pyarrow", batch_size=None)
    written = keyed.groupby("key", num_partitions=min(sum(chunks.values()) + 2, MAX_PARTITIONS)).map_groups(
        write, batch_format="pyarrow"
    )
    found = [store.Chunk(**json.loads(row["chunk"])) for row in written.iter_rows() if row["chunk"]]
    return sorted(found, key=lambda chunk: chunk.name)


def _held_out_ids(tokenized: ray.data.Dataset) -> set[bytes]:
    def select(batch: pa.Table) -> pa.Table:
        return batch.filter(pc.and_(pc.is_null(batch["reason"]), pc.equal(batch["split"], "eval"))).select(["pair_id"])

    return {
        row["pair_id"] for row in tokenized.map_batches(select, batch_format="pyarrow", batch_size=None).iter_rows()
    }


def _leftover(reason: str) -> str:
    return _DROPPED if reason in (rows.END, rows.IDENTICAL) else _REJECTS


def _write_rejects(uri: str, group: pa.Table) -> None:
    """The rejected rows as JSON lines, in the order of their sources."""
    rows = group.select(["source", "row", "reason", "text"]).sort_by([("source", "ascending"), ("row", "ascending")])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())
    storage.write_bytes(storage.join(uri, "rejects.jsonl"), lines.encode())


def _show_rejects(config: Config, uri: str, counts: dict[str, int]) -> None:
    """Copies the rejects beside the run, and stops when they are too many."""
    if not counts["rejects"]:
        return
    place = storage.join(config.run_uri, "rejects", "rejects.jsonl")
    rejects = storage.read_bytes(storage.join(uri, "rejects.jsonl"))
    storage.write_bytes(place, rejects)
    limit = config.data.max_reject_fraction
    if counts["rejects"] > limit * counts["rows"]:
        first = json.loads(rejects.decode().splitlines()[0])
        raise DataError(
            f"{counts['rejects']} of {counts['rows']} rows cannot become a pair, more than data.max_reject_fraction "
            f"({limit:g}) allows. The first: {first['source']} row {first['row']}: {first['reason']}. All: {place}"
        )
