"""Memory and speed of `dpo-ray prepare` on short pairs: does its peak memory depend on the size of the data?

Each size runs `dpo-ray prepare` in a process of its own, on local Ray with the demo's byte-level tokenizer. Peak memory
is the proportional set size (PSS) of the whole process tree, Ray's processes and its object store included, sampled
twice a second.

    python benchmarks/bench_prepare.py --pairs 100000 1000000 10000000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from dpo_ray.config import parse_config, to_yaml
from dpo_ray.demo_data import byte_tokenizer, tiny_llama_config

FILES = 10


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


def pss_bytes(process: psutil.Process) -> int:
    """Proportional set size of a process and all below it."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def run(folder: Path, num_pairs: int, chat_template: str) -> dict[str, float]:
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
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(
        [sys.executable, "-c", "from dpo_ray.cli import main; main()", "prepare", str(folder / "config.yaml")],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        peak = max(peak, pss_bytes(process))
        time.sleep(0.5)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"prepare of {num_pairs} pairs ended with {process.returncode}")
    (manifest,) = (folder / "store" / "pairs").glob("*/manifest.json")
    counts = json.loads(manifest.read_text())["counts"]
    assert counts["pairs"] + counts["eval_pairs"] == num_pairs, counts
    return {
        "pairs": num_pairs,
        "input_mib": num_bytes / 2**20,
        "seconds": seconds,
        "pairs_per_s": num_pairs / seconds,
        "peak_pss_mib": peak / 2**20,
    }


def main() -> None:
    """Runs all sizes, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--chat-template", choices=["tokenizer", "none"], default="tokenizer")
    parser.add_argument("--output", default="bench_prepare.json")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="dpo_ray-bench-") as root:
        write_model(Path(root) / "model")
        for num_pairs in arguments.pairs:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                results.append(run(Path(folder), num_pairs, arguments.chat_template))
            print(json.dumps(results[-1]), flush=True)
    table = Table(title="dpo-ray prepare")
    for name in results[0]:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*(f"{value:,.0f}" for value in result.values()))
    Console().print(table)
    about = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "chat_template": arguments.chat_template,
        "results": results,
    }
    Path(arguments.output).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
