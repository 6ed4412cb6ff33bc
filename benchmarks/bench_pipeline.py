"""Memory and speed of the pipeline on short pairs: does its peak memory depend on the size of the data?

Each size runs `dpo-ray prepare`, and then the stream of one epoch, in batches of 256 pairs, to two ranks that do
nothing with it, each in a process of its own, on local Ray with the demo's byte-level tokenizer. Memory is sampled
twice a second, and the peak is kept by role:

- driver, tasks (the largest one, and all of Ray's workers together), the stream's coordinator, its consumers, and Ray's
  services (raylet, GCS, agents): what the processes have allocated themselves, that is anonymous memory;
- object store: shared memory, a cache that Ray bounds;
- everything: the proportional set size (PSS) of the whole process tree, with the libraries that it has mapped.

With `--real`, the rate of tokenizing real pairs in one process is held against the bare `tokenizers` library, which
encodes the same two texts per pair, on one core.

    python benchmarks/bench_pipeline.py --pairs 10000 100000 1000000 10000000
    python benchmarks/bench_pipeline.py --pairs --real MODEL PAIRS.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from hardware import cpu_name, versions
from rich.console import Console
from rich.table import Table

from dpo_ray.config import parse_config, to_yaml
from dpo_ray.demo_data import byte_tokenizer, tiny_llama_config

FILES = 10
BATCH_PAIRS = 256
ROLES = ("driver", "largest task", "tasks", "coordinator", "consumers", "object store", "services", "everything")


def write_model(folder: Path) -> None:
    """A model's folder: `prepare` reads its tokenizer and its configuration."""
    from transformers import LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = tiny_llama_config(len(tokenizer), hidden_size=32, num_layers=1, num_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(folder: Path, num_pairs: int) -> int:
    """Short pairs, all different, in ten files. Returns their bytes."""
    folder.mkdir()
    rng = random.Random(0)
    for part in range(FILES):
        with (folder / f"{part:02d}.jsonl").open("w") as file:
            for number in range(num_pairs * part // FILES, num_pairs * (part + 1) // FILES):
                left, right = number, rng.randrange(1000)
                row = {"prompt": f"{left} + {right} ?", "chosen": f"{left + right}.", "rejected": f"{left - right}!"}
                file.write(json.dumps(row) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def role_of(command: str) -> str:
    """What a process below the driver is, by its command line, which Ray makes the name of what it runs."""
    if not command.startswith("ray::") and "default_worker.py" not in command:
        return "services"
    if "SplitCoordinator" in command:
        return "coordinator"
    return "consumers" if command.startswith("ray::count") else "tasks"


def memory(driver: psutil.Process) -> dict[str, int]:
    """Bytes in use by role, now: see the top of this file."""
    found = dict.fromkeys(ROLES, 0)
    for member in [driver, *driver.children(recursive=True)]:
        try:
            command = "driver" if member == driver else " ".join(member.cmdline())
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
        except (OSError, psutil.Error):
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        role = "driver" if member == driver else role_of(command)
        found[role] += sizes["Pss_Anon"]
        if role == "tasks":
            found["largest task"] = max(found["largest task"], sizes["Pss_Anon"])
        found["object store"] += sizes["Pss_Shmem"]
        found["everything"] += sizes["Pss"]
    return found


def watched(command: list[str]) -> tuple[float, dict[str, int]]:
    """Seconds of a command, and the peak of each role's memory."""
    started, peak = time.perf_counter(), dict.fromkeys(ROLES, 0)
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        now = memory(process)
        peak = {role: max(peak[role], now[role]) for role in ROLES}
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - started, peak


def run(folder: Path, num_pairs: int, chat_template: str) -> dict[str, Any]:
    """One size."""
    num_bytes = write_pairs(folder / "pairs", num_pairs)
    config = parse_config(
        {
            "name": "bench",
            "storage_path": str(folder),
            "model": {"path": str(folder.parent / "model")},
            "data": {
                "train": [str(folder / "pairs")],
                "max_length": 128,
                "eval_fraction": 0.01,
                "chat_template": chat_template,
            },
        }
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", "from dpo_ray.cli import main; main()", "prepare", str(folder / "config.yaml")]
    prepare_s, prepare_peak = watched(command)
    (manifest,) = (folder / "store" / "pairs").glob("*/manifest.json")
    counts = json.loads(manifest.read_text())["counts"]
    assert counts["pairs"] + counts["eval_pairs"] == num_pairs, counts
    stored = sum(path.stat().st_size for path in manifest.parent.rglob("*") if path.is_file())
    stream_s, stream_peak = watched([sys.executable, __file__, "--stream", str(manifest.parent), str(counts["pairs"])])
    return {
        "pairs": num_pairs,
        "input_bytes": num_bytes,
        "stored_bytes_per_pair": stored / num_pairs,
        "prepare": {"seconds": prepare_s, "pairs_per_s": num_pairs / prepare_s, "peak_bytes": prepare_peak},
        "stream": {"seconds": stream_s, "pairs_per_s": counts["pairs"] / stream_s, "peak_bytes": stream_peak},
    }


def show(results: list[dict[str, Any]]) -> None:
    """A table per command: peak MiB of each role, and what it has grown by since the smallest size."""
    console = Console(width=160)
    for name in ("prepare", "stream"):
        table = Table(title=f"{name}: peak MiB (growth since {results[0]['pairs']:,} pairs)")
        for column in ("pairs", "seconds", "pairs/s", *ROLES):
            table.add_column(column, justify="right")
        first = results[0][name]["peak_bytes"]
        for result in results:
            found = result[name]
            sizes = [
                f"{size / 2**20:,.0f} ({100 * (size / first[role] - 1):+.0f} %)" if first[role] else "-"
                for role, size in found["peak_bytes"].items()
            ]
            table.add_row(f"{result['pairs']:,}", f"{found['seconds']:,.0f}", f"{found['pairs_per_s']:,.0f}", *sizes)
        console.print(table)
    for result in results:
        stored, given = result["stored_bytes_per_pair"], result["input_bytes"] / result["pairs"]
        console.print(f"{result['pairs']:,} pairs: {stored:.0f} bytes a pair on storage, {given:.0f} in the input")


def stream_all(store_uri: str, num_pairs: int, ranks: int = 2, batch: int = BATCH_PAIRS) -> None:
    """Streams one epoch to ranks that only count."""
    import ray

    from dpo_ray.orchestration.stream import close_streams, stream
    from dpo_ray.pairs.pack import ID_BYTES, Costs
    from dpo_ray.pairs.plan import plan_of
    from dpo_ray.pairs.store import open_store
    from dpo_ray.training.feed import Feed

    ray.init(num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    store = open_store(store_uri)
    assert store is not None
    plan = plan_of(store.train, 0, batch, 1, None)
    feed = Feed(plan, store_uri, None, lambda: None, Costs())
    streams = stream(feed, 0, ranks).streaming_split(ranks, equal=True)

    @ray.remote(num_cpus=0)
    def count(part: ray.data.DataIterator) -> int:
        tables = part.iter_batches(batch_size=1, batch_format="pyarrow")
        return sum(len(table["pair_ids"][0].as_py()) // ID_BYTES for table in tables)

    found = ray.get([count.remote(part) for part in streams])
    assert found == [num_pairs] * ranks, f"{found} pairs came of {num_pairs}"
    close_streams(streams)


def real_rates(model: str, file: str) -> dict[str, float]:
    """Pairs per second on one core: parsing, rendering and tokenizing as `prepare` does, and `tokenizers` alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    from dpo_ray.errors import RowError
    from dpo_ray.pairs.formats import parse_row, recognise
    from dpo_ray.pairs.tokenize import Limits, PairTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rates: dict[str, list[float]] = {"pipeline": [], "tokenizers": []}
    for _ in range(3):
        started = time.perf_counter()
        tokenize, reading = PairTokenizer(tokenizer, "tokenizer", Limits(1024)), recognise(rows)
        parsed = []
        for row in rows:
            with suppress(RowError):
                parsed.append(parse_row(row, reading))
        tokenize(parsed)
        rates["pipeline"].append(len(rows) / (time.perf_counter() - started))
        started = time.perf_counter()
        tokenizer.backend_tokenizer.encode_batch([row[side] for row in rows for side in ("chosen", "rejected")])
        rates["tokenizers"].append(len(rows) / (time.perf_counter() - started))
    return {name: max(found) for name, found in rates.items()}


def main() -> None:
    """Runs all sizes, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="*", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--chat-template", choices=["tokenizer", "none"], default="tokenizer")
    parser.add_argument("--real", nargs=2, metavar=("MODEL", "PAIRS"), help="transformers directory, .jsonl.gz")
    parser.add_argument("--output", default="bench_pipeline.json")
    parser.add_argument("--stream", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        stream_all(arguments.stream[0], int(arguments.stream[1]))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="dpo_ray-bench-") as root:
        write_model(Path(root) / "model")
        for num_pairs in arguments.pairs:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                results.append(run(Path(folder), num_pairs, arguments.chat_template))
            print(json.dumps(results[-1]), flush=True)
    if results:
        show(results)
    rates = real_rates(*arguments.real) if arguments.real else {}
    for name, rate in rates.items():
        print(f"{name}: {rate:,.0f} pairs/s on one core")
    about = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        **versions("ray", "torch", "pyarrow", "tokenizers", "transformers"),
        "chat_template": arguments.chat_template,
        "results": results,
        "real_pairs_per_s": rates,
    }
    Path(arguments.output).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
