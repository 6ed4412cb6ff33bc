"""What checkpoints cost: how long training stands still, what throughput is lost, and how commits grow with the model.

A random Llama is trained by the project's own step at several ranks (gloo, one thread each), on this machine's disk.

- blocking: how long `save()` holds training up, against copying the same state from memory to memory; for the first
  save, and for those after it, whose buffers are there.
- throughput: steps with a checkpoint every so many, against as many without, in turns.
- commit: from `save()` until the manifest is there, for a model and for one with twice the layers.

    python benchmarks/bench_checkpoint.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hardware import cpu_name, versions
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW

from dpo_ray.demo_data import tiny_llama_config
from dpo_ray.model.shard import shard
from dpo_ray.objective.losses import sigmoid
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.checkpoint_tensors import tensors_of
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import GlobalBatch, Microbatch, TrainState

TARGETS = {"blocking_ratio": "at most 1.5", "throughput_ratio": "at least 0.97", "commit_ratio": "at most 2.2"}
VOCABULARY, PROMPT, ANSWER = 512, 64, 64


def build(arguments: argparse.Namespace, layers: int) -> tuple[Any, torch.optim.Optimizer]:
    """A sharded random model and its optimizer."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    heads = arguments.hidden // 64 or 1
    config = tiny_llama_config(VOCABULARY, hidden_size=arguments.hidden, num_layers=layers, num_heads=heads)
    model = LlamaForCausalLM(config)
    shard(model, "float32", torch.device("cpu"))
    gc.freeze()  # As a worker does.
    return model, AdamW(model.parameters(), lr=1e-5)


def batch_of(pairs: int, world: int, step: int) -> GlobalBatch:
    """One microbatch of random pairs per rank."""
    tokens = torch.randint(VOCABULARY, (pairs * (PROMPT + 2 * ANSWER),))
    microbatch = Microbatch(
        tokens=tokens,
        lengths=[[PROMPT, ANSWER, ANSWER]] * pairs,
        num_tokens=torch.full((2 * pairs,), ANSWER),
        ref_logps=torch.full((2 * pairs,), -ANSWER * 6.0),
    )
    return GlobalBatch(step, 0, pairs * world, [], [microbatch], [[]])


def train(model: Any, optimizer: torch.optim.Optimizer, arguments: argparse.Namespace, step: int) -> None:
    """One step."""
    objective = Objective(partial(sigmoid, beta=0.1, label_smoothing=0.0), couples_pairs=False, beta=0.1)
    train_step(model, optimizer, batch_of(arguments.pairs, dist.get_world_size(), step), objective, 1.0)


def slowest(seconds: float) -> float:
    """The longest time over all ranks."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def blocking(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds that `save()` and a plain copy take, in turns; and the seconds until commit."""
    model, optimizer = build(arguments, arguments.layers)
    train(model, optimizer, arguments, 1)
    state = [t.to_local() if hasattr(t, "to_local") else t for t in tensors_of(model, optimizer).values()]
    copies: list[torch.Tensor] = []
    found: dict[str, list[float]] = {"copy": [], "save": []}
    with Checkpointer(str(folder / "blocking"), model, optimizer, 0, keep=1) as checkpoints:
        for step in range(1, arguments.saves + 2):
            dist.barrier()
            started = time.perf_counter()
            with torch.no_grad():
                if not copies:
                    copies = [torch.empty_like(tensor) for tensor in state]
                for to, tensor in zip(copies, state, strict=True):
                    to.copy_(tensor)
            found["copy"].append(slowest(time.perf_counter() - started))
            dist.barrier()
            started = time.perf_counter()
            checkpoints.save(TrainState(step))
            found["save"].append(slowest(time.perf_counter() - started))
            checkpoints.wait()
    copy_s, save_s = (statistics.median(found[name][1:]) for name in ("copy", "save"))
    return {
        "state_mib_per_rank": sum(tensor.nbytes for tensor in state) / 2**20,
        "tensors": len(state),
        "first_copy_s": found["copy"][0],
        "first_save_s": found["save"][0],
        "copy_s": copy_s,
        "save_s": save_s,
        "blocking_ratio": save_s / copy_s,
        "all_s": found,
    }


def throughput(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds per step with and without checkpoints, in turns of one checkpoint's steps."""
    model, optimizer = build(arguments, arguments.layers)
    for step in range(2):
        train(model, optimizer, arguments, step)
    found: dict[str, list[float]] = {"with": [], "without": []}
    with Checkpointer(str(folder / "throughput"), model, optimizer, 0, keep=1) as checkpoints:
        for turn in range(2 * arguments.turns + 1):
            saving = turn % 2 == 1 if turn else True  # The first is not counted: it makes the buffers.
            dist.barrier()
            started = time.perf_counter()
            for step in range(arguments.every):
                if step == 0 and saving:
                    checkpoints.save(TrainState(turn + 1))
                train(model, optimizer, arguments, step)
            # Of a save that outlasts its turn, the rest counts too.
            checkpoints.wait()
            seconds = slowest(time.perf_counter() - started) / arguments.every
            if turn:
                found["with" if saving else "without"].append(seconds)
                if dist.get_rank() == 0:
                    print(f"{'with' if saving else 'without'} checkpoints: {seconds:.3f} s per step", flush=True)
    with_s, without_s = (statistics.fmean(found[name]) for name in ("with", "without"))
    return {
        "with_s_per_step": with_s,
        "without_s_per_step": without_s,
        "throughput_ratio": without_s / with_s,
        "all_s": found,
    }


def commits(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds from `save()` to the commit, for a model and one with twice the layers, in turns."""
    sizes = {name: build(arguments, arguments.layers * factor) for name, factor in (("one", 1), ("two", 2))}
    found: dict[str, list[float]] = {name: [] for name in sizes}
    savers = {}
    for name, (model, optimizer) in sizes.items():
        train(model, optimizer, arguments, 1)
        savers[name] = Checkpointer(str(folder / name), model, optimizer, 0, keep=1)
    for step in range(arguments.saves + 1):
        for name, saver in savers.items():
            dist.barrier()
            started = time.perf_counter()
            saver.save(TrainState(step + 1))
            saver.wait()
            if step:
                found[name].append(slowest(time.perf_counter() - started))
    mib = {
        name: sum(t.nbytes for t in tensors_of(model, optimizer).values()) / 2**20
        for name, (model, optimizer) in sizes.items()
    }
    one_s, two_s = (statistics.median(found[name]) for name in ("one", "two"))
    return {
        "one_mib": mib["one"],
        "two_mib": mib["two"],
        "one_s": one_s,
        "two_s": two_s,
        "commit_ratio": two_s / one_s,
        "all_s": found,
    }


def rank_main(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """All measurements on one rank; rank 0 writes what was found."""
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=arguments.ranks)
    found = {}
    for measure in (blocking, throughput, commits):
        if measure.__name__ in arguments.only:
            found[measure.__name__] = measure(arguments, Path(folder))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Runs the ranks, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=4, help="per rank and step")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--turns", type=int, default=5, help="with and without checkpoints")
    parser.add_argument("--saves", type=int, default=7)
    names = ["blocking", "throughput", "commits"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--output", default="bench_checkpoint.json")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="dpo_ray-bench-", dir=arguments.folder)
    try:
        torch.multiprocessing.spawn(rank_main, (arguments, folder), nprocs=arguments.ranks)
        found = json.loads(Path(folder, "found.json").read_text())
    finally:
        shutil.rmtree(folder)
    table = Table("measure", "value", "target", title=f"checkpoints, {arguments.ranks} ranks")
    for name, values in found.items():
        for key, value in values.items():
            if key != "all_s":
                table.add_row(f"{name}: {key}", f"{value:,.3f}", TARGETS.get(key, ""))
    Console().print(table)
    about = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        **versions("torch"),
        "arguments": vars(arguments),
        "results": found,
    }
    Path(arguments.output).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
