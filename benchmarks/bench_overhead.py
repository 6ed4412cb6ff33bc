"""What the way through Ray costs: `dpo-ray train` against the same steps in a plain loop.

One policy worker, one core for it on all sides; everything else of Ray's runs on the other cores. The pairs are
prepared and, but for the last measure, scored beforehand. The plain loop reads the same batches from memory. The sides
take turns.

- overhead: seconds per step by both sides' own clocks, from the end of one step to the end of the next.
- data wait: the share of those seconds in which the train loop waited for its next batch.
- scoring beside: seconds per step while one replica of the reference scores what the next steps need, against the same
  steps with a full store. The replica takes a fixed time for a pair, a little less than the trainer, and no core: two
  cores of one chip slow each other down, which is not what is asked here.

    python benchmarks/bench_overhead.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from hardware import cpu_name

# Both sides compute the same numbers in the same order.
TOLERANCE = 1e-6
# The replica's time for a pair, by the trainer's.
LATENCY = 0.9
TARGETS = {"overhead": "at most 3 %", "data_wait": "below 1 %", "beside": "at most 5 %"}


def config_of(folder: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run whose steps take a second or more on one core."""
    return {
        "name": name,
        "storage_path": f"{folder}/storage",
        "model": {"path": f"{folder}/model", "compute_dtype": "float32"},
        "data": {"train": [f"{folder}/pairs.jsonl"]},
        "optimizer": {"learning_rate": 1e-5, "schedule": "constant"},
        "train": {
            "global_batch_pairs": arguments.batch,
            "tokens_per_microbatch": 4096,
            "max_steps": arguments.steps,
            "checkpoint_every_steps": 10**6,
        },
        "tracking": {"trackers": []},
    }


def make_inputs(folder: str, arguments: argparse.Namespace) -> None:
    """A random Llama and the demo's pairs."""
    from transformers import LlamaForCausalLM

    from dpo_ray.demo_data import byte_tokenizer, make_pairs, tiny_llama_config

    tokenizer = byte_tokenizer()
    shape = {"hidden_size": arguments.hidden, "num_layers": arguments.layers, "num_heads": arguments.hidden // 64}
    LlamaForCausalLM(tiny_llama_config(len(tokenizer), **shape)).save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    rows = make_pairs(arguments.batch * arguments.steps, seed=0)
    Path(f"{folder}/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def through_ray(raw: dict[str, Any]) -> list[dict[str, float]]:
    """The whole run; the worker's process is kept on the first core, all others on the rest."""
    from dpo_ray import Config, train
    from dpo_ray.orchestration.watch import Watcher

    config, done, scoring = Config.model_validate(raw), threading.Event(), threading.Event()
    found = []

    class Reader(Watcher):
        def line(self, line: dict[str, Any]) -> None:
            if "perf/step_s" in line:
                found.append({**line, "beside": float(scoring.is_set())})

    threading.Thread(target=_keep_apart, args=(done, scoring), daemon=True).start()
    train(config, Reader())
    done.set()
    return found


def beside(raw: dict[str, Any]) -> list[dict[str, float]]:
    """The whole run, from an empty reference store; what was there is what the replica gives after its time."""
    from dpo_ray.orchestration import replicas
    from dpo_ray.pairs.store import Chunk, read_chunk
    from dpo_ray.reference.store import ReferenceStore

    latency_s, full = raw.pop("latency_s"), Path(raw["storage_path"], "store", "reference")
    shutil.copytree(full, full.with_name("kept"), dirs_exist_ok=True)
    shutil.rmtree(full)

    class FixedReferenceReplica(replicas.ReferenceReplica):
        def load(self, rendezvous: str) -> None:
            pass

        def score(self, chunk: Chunk) -> int:
            ids = [pair.pair_id for pair in read_chunk(self._pairs_uri, chunk)]
            time.sleep(latency_s * len(ids))
            kept = ReferenceStore(self._reference.uri.replace("/store/reference/", "/store/kept/"))
            self._reference.put(chunk, ids, kept.get(chunk, ids))
            return len(ids)

    replicas.ReferenceReplica = FixedReferenceReplica
    return through_ray(raw)


def _keep_apart(done: threading.Event, scoring: threading.Event) -> None:
    import psutil

    every = os.cpu_count() or 1
    while not done.wait(0.5):
        names = []
        for process in psutil.Process().children(recursive=True):
            try:
                names.append(" ".join(process.cmdline()))
                worker = "RayTrainWorker" in names[-1]
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {0} if worker else set(range(1, every)))
            except (psutil.Error, OSError):
                continue
        (scoring.set if any("ReferenceReplica" in name for name in names) else scoring.clear)()
        for thread in psutil.Process().threads():
            os.sched_setaffinity(thread.id, set(range(1, every)))


def plainly(raw: dict[str, Any]) -> list[dict[str, float]]:
    """The same batches, step and metrics, in one process on the first core, without Ray."""
    os.sched_setaffinity(0, {0})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from dpo_ray import Config
    from dpo_ray.model.files import relative_costs
    from dpo_ray.model.shard import sharded_policy
    from dpo_ray.orchestration.reference_filler import open_reference_store
    from dpo_ray.orchestration.stream import Places, make_feed
    from dpo_ray.pairs.pack import Costs
    from dpo_ray.training.optimizer import build_optimizer
    from dpo_ray.training.step import objective_of, train_step
    from dpo_ray.types import Attempt

    config = Config.model_validate(raw)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        (pairs_uri,) = map(str, Path(config.store_uri, "pairs").iterdir())
        costs = Costs(*relative_costs(config.model.path))
        places = Places(pairs_uri, open_reference_store(config, pairs_uri).uri, costs, f"{folder}/none")
        feed, _ = make_feed(config, places, Attempt(0, 1, 0, None, 1, "plainly", ""))
        batches = list(feed.rank_batches(0, 0, 1, 4096))
        model = sharded_policy(config.model, torch.device("cpu"))
        optimizer, objective = build_optimizer(model, config.optimizer), objective_of(config.objective)
        lines, ended = [], time.perf_counter()
        for batch in batches:
            result = train_step(model, optimizer, batch, objective, config.optimizer.max_grad_norm, reduce_each=True)
            loss = float(result.sums[0]) / batch.num_pairs
            before, ended = ended, time.perf_counter()
            lines.append({"loss": loss, "perf/step_s": ended - before, "perf/data_wait_s": 0.0})
    return lines


def in_process(side: str, raw: dict[str, Any]) -> list[dict[str, float]]:
    """One side, in a process of its own."""
    command = [sys.executable, __file__, "--one", side, json.dumps(raw)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="pairs of an optimizer step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5, help="first steps, which do not count")
    parser.add_argument("--json", default="bench_overhead.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, raw = arguments.one
        print(json.dumps({"ray": through_ray, "plain": plainly, "beside": beside}[side](json.loads(raw))))
        return

    from rich.console import Console
    from rich.table import Table

    runs: dict[str, list[list[dict[str, float]]]] = {"ray": [], "plain": [], "beside": []}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(folder, arguments)
        first = in_process("ray", config_of(folder, "first", arguments))  # Prepares and scores.
        pair_s = statistics.median(line["perf/step_s"] for line in first) / arguments.batch
        for turn in range(arguments.repeats):
            for side, found in runs.items():
                raw = config_of(folder, f"{side}-{turn}", arguments)
                latency = {"latency_s": LATENCY * pair_s} if side == "beside" else {}
                found.append(in_process(side, raw | latency))
    timed = {side: [lines[arguments.warmup :] for lines in found] for side, found in runs.items()}
    step_s = {
        side: [statistics.fmean(line["perf/step_s"] for line in lines) for lines in found]
        for side, found in timed.items()
    }
    waits = [
        sum(line["perf/data_wait_s"] for line in lines) / sum(line["perf/step_s"] for line in lines)
        for lines in timed["ray"]
    ]
    # Over all turns: processes differ by more than what is looked for.
    overhead = statistics.fmean(step_s["ray"]) / statistics.fmean(step_s["plain"]) - 1
    pairs = zip(runs["ray"] * 2, runs["plain"] + runs["beside"], strict=True)
    gap = max(abs(a["loss"] - b["loss"]) for one, other in pairs for a, b in zip(one, other, strict=True))
    scored_beside = [
        (with_it["perf/step_s"], without["perf/step_s"])
        for one, other in zip(timed["beside"], timed["ray"], strict=True)
        for with_it, without in zip(one, other, strict=True)
        if with_it["beside"]
    ]
    both = [sum(seconds) for seconds in zip(*scored_beside, strict=True)]
    slower = both[0] / both[1] - 1 if both else float("nan")
    results = {
        "overhead": overhead,
        "data_wait": statistics.median(waits),
        "step_s": step_s,
        "waits": waits,
        "slower_while_scoring": slower,
        "steps_while_scoring": len(scored_beside),
    }
    table = Table(title=f"{arguments.repeats} turns of {arguments.steps} steps, one core for the worker")
    for column in ("", "measured", "target"):
        table.add_column(column)
    table.add_row("seconds per step, plain loop", f"{statistics.median(step_s['plain']):.3f}", "1 or more")
    table.add_row("seconds per step, through Ray", f"{statistics.median(step_s['ray']):.3f}", "")
    table.add_row("overhead", f"{overhead:.1%}", TARGETS["overhead"])
    table.add_row("waiting for data", f"{results['data_wait']:.2%}", TARGETS["data_wait"])
    table.add_row(f"slower while scoring beside ({len(scored_beside)} steps)", f"{slower:.1%}", TARGETS["beside"])
    table.add_row("largest difference of a loss", f"{gap:.1e}", "")
    Console().print(table)
    hardware = {"cpu": cpu_name(), "cores": os.cpu_count()}
    document = {"arguments": vars(arguments), "hardware": hardware, "results": results, "runs": runs}
    Path(arguments.json).write_text(json.dumps(document, indent=1))
    if gap > TOLERANCE:
        parser.exit(1, f"losses differ by up to {gap:.2g}\n")


if __name__ == "__main__":
    main()
