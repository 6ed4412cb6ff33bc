"""How training scales: measured with a few workers here, and modelled for many devices.

Measured: the project's step with sharded weights over gloo, one thread per rank, the same global batch for each number
of ranks (strong scaling) and a batch that grows with it (weak scaling). More ranks than cores share them.

Modelled: what communication leaves of a device's speed. The assumptions, all of which can be given as options:

- a step computes 6 N T operations at a share `--utilisation` of a device's peak, T tokens a device;
- per microbatch each device gathers the others' weights twice (forward, backward), 2 bytes a weight; it scatters the
  gradient's sums, 4 bytes a weight, once per step, or, where the gradient of the whole model takes more than 15 % of
  `--memory-gb`, per microbatch, as training does;
- a device sends and receives at `--near-gb-s` within a node and at `--far-gb-s` beyond it, where all devices of a node
  take part with the links of all of them, as NCCL's rings do (the node's whole bandwidth), and each collective takes
  `--latency-us` for every node that it reaches beyond the first, once per block of the model;
- what fits beside computation is free: a microbatch takes the longer of the two;
- with a copy of the weights on each node (`scaling.shard_over: node`, the second row) they are gathered within it, and
  once per step each device sums its shard of the gradient with those of the other nodes, after all else.

    python benchmarks/bench_scaling.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from dpo_ray.training.budget import GRADIENT_SHARE
from dpo_ray.training.sizing import Network

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
# Weights and blocks.
MODELS = {"1.5B": (1.5e9, 28), "8B": (8e9, 32), "70B": (70e9, 80)}


def rank_main(rank: int, world: int, arguments: argparse.Namespace, pairs: int, folder: str) -> None:
    """Times steps on one rank."""
    from transformers import LlamaForCausalLM

    from dpo_ray.demo_data import tiny_llama_config
    from dpo_ray.model.shard import shard
    from dpo_ray.objective.losses import sigmoid
    from dpo_ray.pairs import pack
    from dpo_ray.training.step import Objective, train_step
    from dpo_ray.types import ScoredPair, TokenizedPair

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(512, hidden_size=256, num_layers=6, num_heads=4))
    shard(model, "float32", torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    objective = Objective(partial(sigmoid, beta=0.1, label_smoothing=0.0), False, 0.1)
    lengths = torch.randint(32, 128, (pairs, 3), generator=torch.Generator().manual_seed(0)).tolist()
    scored = []
    for index, (prompt, *answers) in enumerate(lengths):
        parts = [torch.full((length,), index % 512, dtype=torch.int32).numpy() for length in (prompt, *answers)]
        pair = TokenizedPair(index.to_bytes(16, "big"), parts[0], tuple(parts[1:]))
        scored.append(ScoredPair(pair, torch.zeros(2).numpy()))
    (row,) = [each for each in pack.rank_batches(scored, 1, 0, world, pack.Costs()) if each["rank"] == rank]
    times = []
    for _ in range(arguments.steps + 1):
        dist.barrier()
        started = time.perf_counter()
        train_step(model, optimizer, pack.global_batch(row, 2048, pack.Costs()), objective, 1.0)
        times.append(time.perf_counter() - started)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times[1:]))
    dist.barrier()
    dist.destroy_process_group()


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs per second for each number of ranks."""
    found = []
    for world in arguments.ranks:
        rates = {}
        for name, pairs in (("strong", arguments.pairs), ("weak", arguments.pairs * world // max(arguments.ranks))):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(rank_main, (world, arguments, pairs, folder), nprocs=world)
                times = json.loads(Path(folder, "times.json").read_text())
            rates[name] = pairs / statistics.median(times)
        found.append({"ranks": world, **rates})
    return found


def modelled(
    weights: float, blocks: int, devices: int, group: int, tokens: int, arguments: argparse.Namespace
) -> float:
    """Share of a device's speed that is left beside communication: 1 where all of it is hidden."""
    network = Network(arguments.devices_per_node, arguments.near_gb_s, arguments.far_gb_s, arguments.latency_us)
    compute_s = 6 * weights * tokens / (arguments.peak_tflops * 1e12 * arguments.utilisation)
    count, reduce_each = arguments.microbatches, 4 * weights > GRADIENT_SHARE * arguments.memory_gb * 1e9
    sizes = 2 * weights, 4 * weights
    return count * compute_s / network.step_s(devices, group, compute_s, *sizes, blocks, count, reduce_each)


def main() -> None:
    """Measures and models, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--pairs", type=int, default=48, help="of a global batch, with the most ranks")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--utilisation", type=float, default=0.5)
    parser.add_argument("--tokens-per-microbatch", type=int, nargs="*", default=[2048, 4096, 8192, 16_384])
    parser.add_argument("--memory-gb", type=float, default=141.0)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--devices-per-node", type=int, default=8)
    parser.add_argument("--near-gb-s", type=float, default=450.0)
    parser.add_argument("--far-gb-s", type=float, default=50.0)
    parser.add_argument("--latency-us", type=float, default=5.0)
    parser.add_argument("--json", default="bench_scaling.json")
    arguments = parser.parse_args()
    console, found = Console(), measured(arguments) if arguments.ranks else []
    if found:
        table = Table("ranks", "pairs/s, the same batch", "of ideal", "pairs/s, a batch that grows", "of ideal")
        table.title = f"measured, {os.cpu_count()} cores"
        first = found[0]
        for each in found:
            ideal = min(each["ranks"], os.cpu_count() or 1)
            cells = [(each[name], each[name] / (first[name] * ideal)) for name in ("strong", "weak")]
            table.add_row(str(each["ranks"]), *(text for rate, of in cells for text in (f"{rate:.1f}", f"{of:.0%}")))
        console.print(table)
    model = []
    table = Table("model", "tokens of a microbatch", "sharded over", *map(str, DEVICES))
    table.title = "modelled, not measured: share of a device's speed that is left, by devices"
    for name, (weights, blocks) in MODELS.items():
        for tokens in arguments.tokens_per_microbatch:
            for over, most in (("all", max(DEVICES)), ("node", arguments.devices_per_node)):
                shares = [modelled(weights, blocks, n, min(n, most), tokens, arguments) for n in DEVICES]
                table.add_row(name, f"{tokens:,}", over, *(f"{share:.0%}" for share in shares))
                about = {"model": name, "tokens_per_microbatch": tokens, "shard_over": over}
                model.append({**about, "devices": DEVICES, "shares": shares})
    console.print(table)
    document = {"arguments": vars(arguments), "cores": os.cpu_count(), "measured": found, "modelled": model}
    Path(arguments.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
