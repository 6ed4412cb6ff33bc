"""Raw rows -> pair store, with Ray Data, in two passes over storage: an external sort by content id.

1. Read files, tokenize blocks of rows, write each block's pairs as a run sorted by id (`pairs/runs.py`).
2. Merge the same range of ids from all runs into its chunks.

Memory depends on the size of a block and of a range, not on the data. Ray's own shuffle keeps all of it in the object
store and its aggregators. What pass 1 has finished is on storage, so that a `prepare` that was killed goes on there.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DataError, RowError, TiedError
from dpo_ray.extensions import code_digest
from dpo_ray.model.files import check_vocabulary, load_tokenizer, vocabulary_size
from dpo_ray.orchestration import rows
from dpo_ray.orchestration.rows import Job, Merge, SourceFile
from dpo_ray.orchestration.watch import Example, SourcePreview, Watcher
from dpo_ray.pairs import runs, store
from dpo_ray.pairs.formats import RANKING, Reading, parse_row, recognise
from dpo_ray.pairs.runs import Run
from dpo_ray.pairs.store import Chunk, PairStore
from dpo_ray.pairs.tokenize import Limits, PairTokenizer, Tokenized, tokenizer_digest
from dpo_ray.storage import FileInfo

# Raw text of a block, and token data of a range: what one task holds, several times over, while it works.
BLOCK_BYTES = 8 * 2**20
MERGE_BYTES = 16 * 2**20
# Every range asks every run: with very large data, or very many files, blocks and ranges grow instead.
MOST_RUNS, MOST_REQUESTS = 1000, 10**6
# Reading is much faster than tokenizing. This share of the object store, which grows with the cluster, is some four
# blocks for each CPU on usual nodes (4 GiB of memory for a CPU, 30 % of it Ray's object store).
READ_AHEAD = 0.05
# But where the store is small, as much as this: with less, Ray Data works block by block.
LEAST_BLOCKS = 16
# Small files share a task, and so a block.
READ_BYTES = 2**20
SAMPLE_ROWS = 100
EXAMPLES_SHOWN = 3
REJECTS_SHOWN = 5
COPIED_TOGETHER = 8


# Of the data's options those that decide no pair, or that are said with what they are about.
_APART = {
    *("train", "eval", "max_reject_fraction", "ranking", "min_score_gap", "chat_template_kwargs"),
    *("weight_column", "margin_column", "score_columns", "label_selector"),
}


def _limits(config: Config) -> Limits:
    data = config.data
    return Limits(
        data.max_length,
        data.max_prompt_length,
        data.max_completion_length,
        data.prompt_truncation_side,
        data.completion_truncation_side,
    )


# Rows with their places, or why they cannot be read.
Sample = list[tuple[str, dict[str, Any] | RowError]]


@dataclass(frozen=True, slots=True)
class _Source:
    """An entry of `data.train` or `data.eval`, the part of the store that it goes to, and its files."""

    part: str
    pattern: str
    files: list[FileInfo]


def _sources(config: Config) -> list[_Source]:
    sources = [_Source(part, pattern, storage.expand(pattern)) for part, pattern in config.data.sources]
    for file in (file for source in sources for file in source.files):
        if not file.uri.endswith(rows.SUFFIXES):
            hint = (
                "; `jq -c '.[]' FILE.json > FILE.jsonl` makes lines of an array" if file.uri.endswith(".json") else ""
            )
            raise DataError(f"{file.uri}: unknown kind of file; known are {', '.join(rows.SUFFIXES)}{hint}")
    return sources


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is to do, found before anything runs on the cluster.

    Attributes:
        uri: The pair store.
        about: What it is made from.
        made: The store, where it is there already.
        job: How it will be made, otherwise.
    """

    uri: str
    about: dict[str, Any]
    made: PairStore | None
    job: Job | None


def check_reachable(config: Config) -> None:
    """Fails within seconds when a server that a run begins with cannot be reached; later ones are waited for.

    Raises:
        StorageError: Nothing answers.
    """
    models = [config.model.path, config.tokenizer_path, config.reference_path]
    for uri in dict.fromkeys([config.storage_path, *models, *(pattern for _, pattern in config.data.sources)]):
        storage.check_reachable(uri)


def survey(config: Config, watcher: Watcher | None = None) -> Survey:
    """Looks at tokenizer and data, and recognises how the data are written. Needs no Ray.

    Args:
        config: The run.
        watcher: Told how each source will be read.

    Raises:
        DataError: A file is missing, of an unknown kind, or damaged where it begins; or it has no known format.
        ConfigError: The tokenizer cannot be loaded or does not fit.
    """
    data = config.data
    tokenizer = load_tokenizer(config.tokenizer_path)
    check_vocabulary(config.model.path, tokenizer)
    vocab_size = vocabulary_size(config.model.path)
    template = data.chat_template, _limits(config), vocab_size, data.chat_template_kwargs
    pair_tokenizer = PairTokenizer(tokenizer, *template)
    sources = _sources(config)
    about = {
        "format": store.FORMAT_VERSION,
        "tokenizer": tokenizer_digest(tokenizer),
        **data.model_dump(exclude=_APART),
    }
    if data.chat_template_kwargs:
        about["chat_template_kwargs"] = data.chat_template_kwargs
    samples = [_sample(source) for source in sources]
    readings = [_recognised(config, source, sample) for source, sample in zip(sources, samples, strict=True)]
    files = _source_files(sources, readings)
    about["files"] = [[file.uri, file.identity, file.part, _about(file.reading)] for file in files]
    _check_rule(config, readings)
    if ":" in data.format:
        about["format_code"] = code_digest(data.format)
    if any(reading.format == "tokens" for reading in readings):
        about["vocab_size"] = vocab_size
    score_columns = tuple(config.reference.columns or ())
    if score_columns:
        about["score_columns"] = list(score_columns)
        for source, sample in zip(sources, samples, strict=True):
            _check_columns(source, sample, score_columns, "reference.columns")
    for source, sample in zip(sources, samples, strict=True):
        _check_columns(source, sample, data.score_columns or (), "data.score_columns")
    columns = {"weight": data.weight_column, "margin": data.margin_column}
    number_columns = {name: column for name, column in columns.items() if column is not None}
    if number_columns:
        about["number_columns"] = number_columns
        for source, sample in zip(sources, samples, strict=True):
            for name, column in number_columns.items():
                _check_columns(source, sample, [column], f"data.{name}_column")
    uri = storage.join(config.store_uri, "pairs", storage.fingerprint(about))
    made = store.open_store(uri)
    if made is not None:
        return Survey(uri, about, made, None)
    for source, sample, reading in zip(sources, samples, readings, strict=True):
        (watcher or Watcher()).source(_preview(source, sample, reading, pair_tokenizer, tokenizer.decode))
    job = Job(
        uri=uri,
        files=files,
        tokenizer_uri=config.tokenizer_path,
        tokenizer_digest=about["tokenizer"],
        chat_template=data.chat_template,
        limits=_limits(config),
        vocab_size=vocab_size,
        template_kwargs=json.dumps(data.chat_template_kwargs),
        eval_fraction=data.eval_fraction,
        score_columns=score_columns,
        number_columns=number_columns,
    )
    return Survey(uri, about, None, job)


def prepared(config: Config) -> PairStore:
    """The pair store of a run; needs no Ray.

    Raises:
        ConfigError: It is not made yet.
    """
    check_reachable(config)
    made = survey(config).made
    if made is None:
        raise ConfigError(f"{config.name}: the pairs are not prepared: run `dpo-ray prepare` first")
    return made


def prepare(config: Config, watcher: Watcher | None = None, found: Survey | None = None) -> PairStore:
    """Makes the pair store, or opens it where it is there already.

    Args:
        config: The run.
        watcher: Told how the data are read, and how far the work is.
        found: What `survey` found; when None, it is asked.

    Raises:
        DataError: A file cannot be read, too many rows are rejects, or nothing is left to train on. The rejects
            stand in `<run>/rejects/`.
    """
    watcher = watcher or Watcher()
    found = found or survey(config, watcher)
    made = found.made
    if found.job is not None:
        try:
            made = _make(config, found.job, found.about, watcher)
        except Exception:
            # Another run may have made the same store meanwhile, and removed its runs.
            made = store.open_store(found.uri)
            if made is None:
                raise
            storage.remove(storage.join(found.uri, "runs"))
    assert made is not None
    if made.counts["rejects"]:
        _check_rejects(config, made.counts, _show_rejects(config, found.uri))
    watcher.prepared(made)
    return made


def _make(config: Config, job: Job, about: dict[str, Any], watcher: Watcher) -> PairStore:
    uri = job.uri
    total: Counter[str] = Counter()
    written: dict[str, list[Run]] = {part: [] for part in (*dict(config.data.sources), "eval")}
    for record in _make_runs(config, job, watcher):
        total.update(record["counts"])
        watcher.rows({name: total[name] for name in store.COUNTS})
        for part, run in record["runs"].items():
            written[part].append(Run(**run))
    counts = {name: total[name] for name in store.COUNTS}
    if _too_many_rejects(config, counts):
        shown = _show_rejects(config, uri)
        storage.remove(storage.join(uri, "runs"))
        _check_rejects(config, counts, shown)
    good = {part: total[f"good_{part}"] for part in written}
    if empty := _without_pairs(config, good):
        storage.remove(storage.join(uri, "runs"))
        raise DataError(f"{empty}: no pair to train on; of the rows: {json.dumps(counts)}")
    chunks = _write_chunks(config, uri, written, good, watcher)
    train, held = ([chunk for part in _parts(written, split) for chunk in chunks[part]] for split in ("train", "eval"))
    counts["pairs"], counts["eval_pairs"] = (sum(chunk.num_pairs for chunk in each) for each in (train, held))
    counts["duplicates"] = sum(good.values()) - counts["pairs"] - counts["eval_pairs"]
    made = PairStore(uri, tuple(train), tuple(held), counts)
    if empty := _without_pairs(config, {part: len(own) for part, own in chunks.items()}):
        raise DataError(
            f"{empty}: every pair is held out too, or in an entry of data.train before it; {json.dumps(counts)}"
        )
    store.write_manifest(made, about)
    storage.remove(storage.join(uri, "runs"))
    return made


def _parts(parts: Iterable[str], split: str) -> list[str]:
    """The parts of a split, in the order of their numbers."""
    own = [part for part in parts if part.partition(".")[0] == split]
    return sorted(own, key=lambda part: int(part.partition(".")[2] or 0))


def _without_pairs(config: Config, numbers: Mapping[str, int]) -> str:
    """The entries of `data.train` that have nothing to train on; empty where all have."""
    empty = [part for part in _parts(numbers, "train") if not numbers[part]]
    return ", ".join(pattern for part, pattern in config.data.sources if part in empty)


def _recognised(config: Config, source: _Source, sample: Sample) -> Reading:
    """How a source is written."""
    written = [row for _, row in sample if isinstance(row, dict)]
    try:
        reading = recognise(written, config.data.format, config.data.columns)
    except DataError as error:
        raise DataError(f"{source.pattern}: {error}") from None
    min_score_gap, score_columns = config.data.min_score_gap, config.data.score_columns
    if reading.format == RANKING:
        if score_columns:
            raise ConfigError(
                f"data.score_columns is {score_columns}, but {source.pattern} has rows with a list of answers (format "
                f"{RANKING}), which brings a score for each of them: leave it out, or give these files to another run"
            )
        return replace(reading, keep=config.data.ranking, min_score_gap=min_score_gap)
    if score_columns:
        return replace(reading, min_score_gap=min_score_gap, score_columns=score_columns)
    return reading


def _about(reading: Reading) -> dict[str, Any]:
    """What of a reading decides the pairs."""
    ranking, scored = reading.format == RANKING, bool(reading.score_columns)
    decides = {"keep": ranking, "min_score_gap": ranking or scored, "score_columns": scored}
    return {name: value for name, value in asdict(reading).items() if decides.get(name, True)}


def _check_rule(config: Config, readings: Sequence[Reading]) -> None:
    mends = {"ranking": "leave it out"}
    if not config.data.score_columns:
        mends["min_score_gap"] = "leave it out, or set data.score_columns to the columns of the two answers' scores"
    for key, mend in mends.items():
        value = getattr(config.data, key)
        if value != type(config.data).model_fields[key].default and all(each.format != RANKING for each in readings):
            raise ConfigError(
                f"data.{key} is {value!r}, but no source has rows with a list of answers (format {RANKING}; these are "
                f"read as {', '.join(dict.fromkeys(each.format for each in readings))}): {mend}"
            )


def _check_columns(source: _Source, sample: Sample, columns: Sequence[str], key: str) -> None:
    there = {name for _, row in sample if isinstance(row, dict) for name in row}
    for column in columns:
        if column not in there:
            raise DataError(
                f"{source.pattern}: there is no column {column!r}, which {key} names; the rows have "
                f"{', '.join(sorted(there))}"
            )


def _source_files(sources: list[_Source], readings: list[Reading]) -> tuple[SourceFile, ...]:
    """Every file once, in the order of their URIs."""
    files: dict[str, SourceFile] = {}
    for source, reading in zip(sources, readings, strict=True):
        for file in source.files:
            entry = SourceFile(file.uri, file.num_bytes, file.identity, source.part, reading)
            known = files.setdefault(file.uri, entry)
            first, second = (f"data.{part.partition('.')[0]}" for part in (known.part, source.part))
            where = f"{first} and in {second}" if first != second else f"two entries of {first}"
            if known.part != source.part:
                raise DataError(f"{file.uri} is in {where}: keep it in one of them")
            if known.reading != reading:
                how = f"read as {known.reading.format} and as {reading.format}"
                raise DataError(f"{file.uri} is in {where}, {how}: keep it in one of them")
    return tuple(files[uri] for uri in sorted(files))


def _sample(source: _Source) -> Sample:
    """The first rows of a source, each with its file and number."""
    found = list[tuple[str, dict[str, Any] | RowError]]()
    texts = ((file.uri, part) for file in source.files for part, _ in rows.open_rows(file.uri))
    numbers: Counter[str] = Counter()
    for uri, part in texts:
        for text in part:
            numbers[uri] += 1
            if text.strip() and len(found) < SAMPLE_ROWS:
                found.append((f"{uri} row {numbers[uri]}", _object_or_error(text)))
        if len(found) == SAMPLE_ROWS:
            break
    if not any(isinstance(row, dict) for _, row in found):
        what = f"{found[0][0]}: {found[0][1]}" if found else f"{source.pattern}: there is no row in it"
        raise DataError(f"{what}; give files with a JSON object on each line, or Parquet")
    return found


def _object_or_error(text: bytes) -> dict[str, Any] | RowError:
    try:
        return rows.json_object(text)
    except RowError as error:
        return error


def _preview(
    source: _Source,
    sample: Sample,
    reading: Reading,
    tokenizer: PairTokenizer,
    decode: Callable[[Any], str],
) -> SourcePreview:
    examples, problem = list[Example](), None
    for place, row in sample:
        if len(examples) == EXAMPLES_SHOWN:
            break
        made = row if isinstance(row, RowError) else _tokenized(row, reading, tokenizer)
        if isinstance(made, TiedError):
            continue
        if isinstance(made, RowError):
            problem = problem or f"{place}: {made}"
            continue
        prompt, *answers = map(decode, made.pair.parts)
        examples.append(Example(prompt, tuple(answers), tuple(map(len, made.pair.parts))))
    num_bytes = sum(file.num_bytes for file in source.files)
    return SourcePreview(source.pattern, len(source.files), num_bytes, reading, tuple(examples), problem)


def _tokenized(row: dict[str, Any], reading: Reading, tokenizer: PairTokenizer) -> Tokenized | RowError:
    try:
        return tokenizer([parse_row(row, reading)])[0]
    except RowError as error:
        return error


def _make_runs(config: Config, job: Job, watcher: Watcher) -> Iterator[dict[str, Any]]:
    """Pass 1. Yields the record of each block."""
    files, total = range(len(job.files)), sum(file.num_bytes for file in job.files)
    tasks = min(len(files), max(1, total // READ_BYTES))
    # Reading and tokenizing differ in their resources so that they do not fuse: one large file then feeds many tasks.
    texts = ray.data.from_items(list(files), override_num_blocks=tasks).map_batches(
        rows.read, batch_size=1, num_cpus=0.5, fn_args=(job,)
    )
    # Of the tasks, and of what Ray Data asks an autoscaler for.
    texts.context.execution_options.label_selector = config.data.label_selector or None
    block_bytes = max(BLOCK_BYTES, total // MOST_RUNS)
    texts.context.target_max_block_size = block_bytes
    least = LEAST_BLOCKS * block_bytes / ray.cluster_resources().get("object_store_memory", 1)
    share = max(READ_AHEAD * block_bytes / BLOCK_BYTES, least)
    texts.context.override_object_store_memory_limit_fraction = min(0.5, share)
    made = texts.map_batches(rows.make_runs, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_args=(job,))
    done = 0
    for row in made.iter_rows():
        record = json.loads(row["record"])
        done += record["num_bytes"]
        watcher.progress("tokenizing (bytes)", done, total)
        yield record


def _write_chunks(
    config: Config, uri: str, written: dict[str, list[Run]], good: dict[str, int], watcher: Watcher
) -> dict[str, list[Chunk]]:
    """Pass 2. Returns the chunks of each part, in order."""
    merges, train = [], _parts(written, "train")
    # Without such files a pair is held out by its id, and none is in both splits.
    held_out = [run for part in _parts(written, "eval") for run in written[part]] if config.data.eval else []
    for part, its_runs in written.items():
        if not good[part]:
            continue
        chunks = store.num_chunks(good[part], config.data.chunk_pairs)
        num_bytes = sum(run.num_bytes for run in its_runs)
        tasks = min(chunks, -(-num_bytes // MERGE_BYTES), max(1, MOST_REQUESTS // len(its_runs)))
        before = [run for each in train[: train.index(part)] for run in written[each]] if part in train else []
        for task in range(tasks):
            first, stop = (chunks * bound // tasks for bound in (task, task + 1))
            ids = store.chunk_start(first, chunks), store.chunk_start(stop, chunks)
            others = runs.extents([*held_out, *before], *ids) if part in train else []
            merges.append(Merge(part, chunks, first, stop, runs.extents(its_runs, *ids), others))

    def write(batch: dict[str, Any]) -> pa.Table:
        chunks = [asdict(chunk) for item in batch["item"] for chunk in rows.write_chunks(pickle.loads(item), uri)]
        return pa.table({"chunks": [json.dumps(chunks)]})

    blocks = ray.data.from_items([pickle.dumps(merge) for merge in merges], override_num_blocks=len(merges))
    blocks.context.execution_options.label_selector = config.data.label_selector or None
    found: dict[str, list[Chunk]] = {part: [] for part in written}
    for done, row in enumerate(blocks.map_batches(write, batch_size=1, num_cpus=1).iter_rows(), start=1):
        for chunk in json.loads(row["chunks"]):
            found[chunk["name"].split("-")[0]].append(Chunk(**chunk))
        watcher.progress("writing chunks", done, len(merges))
    return {part: sorted(chunks, key=lambda chunk: chunk.name) for part, chunks in found.items()}


def _show_rejects(config: Config, uri: str) -> list[dict[str, Any]]:
    """Copies the rejects beside the run, unless they are there, and returns the first of them."""
    own, place = storage.join(config.run_uri, "rejects"), storage.join(uri, "rejects")
    # Written last.
    made_of = f"{own}.json"
    names, of = storage.list_names(place), {"pairs": storage.name_of(uri)}
    if not storage.exists(made_of) or storage.read_json(made_of) != of:
        storage.remove_file(made_of)
        storage.remove(own)

        def copy(name: str) -> None:
            storage.write_bytes(storage.join(own, name), storage.read_bytes(storage.join(place, name)))

        with ThreadPoolExecutor(COPIED_TOGETHER) as pool:
            list(pool.map(copy, names))
        storage.write_json(made_of, of)
    shown: list[dict[str, Any]] = []
    for name in names:
        if len(shown) == REJECTS_SHOWN:
            break
        lines = storage.read_bytes(storage.join(place, name)).splitlines()
        shown += [json.loads(line) for line in lines[: REJECTS_SHOWN - len(shown)]]
    return shown


def _too_many_rejects(config: Config, counts: dict[str, int]) -> bool:
    return counts["rejects"] > config.data.max_reject_fraction * counts["rows"]


def _check_rejects(config: Config, counts: dict[str, int], shown: list[dict[str, Any]]) -> None:
    if _too_many_rejects(config, counts):
        first = "\n".join(f"  {reject['source']} row {reject['row']}: {reject['reason']}" for reject in shown)
        raise DataError(
            f"{counts['rejects']} of {counts['rows']} rows cannot become a pair, more than data.max_reject_fraction "
            f"({config.data.max_reject_fraction:g}) allows:\n{first}\nAll of them: {config.run_uri}/rejects/"
        )
