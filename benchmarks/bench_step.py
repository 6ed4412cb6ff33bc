"""A training step against TRL's: the same model, the same pairs in the same batches, the same update.

Each measurement is a process of its own, and the two sides take turns. Needs the extra `bench`; Ray is not used.

- mixed: float32 weights and bfloat16 compute (TRL: `bf16=True`, its default). float32: all of it in float32.
- reference: its forward pass in each step on both sides, or its scores computed before (not timed) on both sides.
- sorted: TRL is fed pairs sorted by length, so that it pads little; ours gets the same batches.

Rates count the pairs of all timed steps; the first steps of a process are not timed. Memory is the process's peak.
Utilisation is 6 N floating-point operations per different token (8 N with the reference's forward pass) against the
rate of matrix products of the model's own shapes in the same process: in bfloat16 where the processor has instructions
for it, else in float32. On a processor that has not, PyTorch's bfloat16 products are several times slower than float32;
ours go through float32, TRL's do not: there the float32 case is the one that compares trainers. TRL's time leaves out
collating the batch, and holds a metric that ours does not compute (token accuracy).

    python benchmarks/bench_step.py MODEL PAIRS.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hardware import cpu_name, versions

# How far the losses of the two sides may be apart, at any step: else they did not do the same work.
TOLERANCE = {"float32": 1e-4, "mixed": 0.05}
TARGETS = {"mixed online": 6.0, "mixed precomputed": 5.0, "mixed online, sorted": 2.5, "float32 online": 4.0}
RATE, BETA = 1e-5, 0.1


def rows_of(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Pairs as text: prompt, chosen, rejected; those that fit, in the file's order."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(arguments.model), []
    with gzip.open(arguments.pairs_file, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            turn = "\n\nAssistant:"
            prompt, chosen = row["chosen"].rsplit(turn, 1)
            other, rejected = row["rejected"].rsplit(turn, 1)
            prompt += turn
            longest = max(len(tokenizer(prompt + answer).input_ids) for answer in (chosen, rejected))
            if other + turn == prompt and chosen and rejected and longest < arguments.max_length:
                found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            if len(found) == arguments.pairs:
                break
    if arguments.sorted:
        found.sort(key=lambda row: len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])))
    return found


def matmul_rate(model: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the model's own matrix products, on 4,096 tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    states = torch.randn(4096, config.hidden_size).to(dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size).to(dtype)
    torch.nn.functional.linear(states, weight)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        times.append(time.perf_counter() - started)
    return 2.0 * states.numel() * weight.shape[0] / min(times)


def ours(arguments: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    """The project's own step on one rank."""
    import torch.distributed as dist
    from transformers import AutoTokenizer

    from dpo_ray.config import ModelConfig, OptimizerConfig
    from dpo_ray.model.shard import sharded_policy
    from dpo_ray.objective.losses import sigmoid
    from dpo_ray.objective.rewards import finish_metrics
    from dpo_ray.pairs import pack
    from dpo_ray.pairs.formats import parse_row, recognise
    from dpo_ray.pairs.tokenize import Limits, PairTokenizer
    from dpo_ray.reference.scorer import Scorer
    from dpo_ray.training.optimizer import build_optimizer
    from dpo_ray.training.step import Objective, train_step
    from dpo_ray.types import ScoredPair

    dtype = "bfloat16" if arguments.precision == "mixed" else "float32"
    device, budget = torch.device("cpu"), arguments.tokens_per_microbatch
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        tokenize = PairTokenizer(AutoTokenizer.from_pretrained(arguments.model), "none", Limits(arguments.max_length))
        pairs = [made.pair for made in tokenize([parse_row(row, recognise(rows)) for row in rows])]
        scorer = Scorer(arguments.model, dtype, "packed", budget, device)
        scores = None if arguments.reference == "online" else scorer.score(pairs)
        if scores is not None:
            del scorer
        model = sharded_policy(
            ModelConfig(path=arguments.model, compute_dtype=dtype, compile=arguments.compile), device
        )
        optimizer = build_optimizer(model, OptimizerConfig(learning_rate=RATE, schedule="constant"))
        objective = Objective(partial(sigmoid, beta=BETA, label_smoothing=0.0), False, BETA)
        times, losses = [], []
        for step in range(len(pairs) // arguments.batch):
            started = time.perf_counter()
            span = slice(step * arguments.batch, (step + 1) * arguments.batch)
            known = scores[span] if scores is not None else scorer.score(pairs[span])
            scored = list(map(ScoredPair, pairs[span], known))
            (row,) = pack.table_of(pack.rank_batches(scored, step + 1, 0, 1, pack.Costs())).to_pylist()
            batch = pack.global_batch(row, budget, pack.Costs())
            # As training has it with one rank.
            result = train_step(model, optimizer, batch, objective, 1.0, reduce_each=True)
            losses.append(finish_metrics(result.sums)["loss"])
            times.append(time.perf_counter() - started)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = [
        sum(pair.num_tokens for pair in pairs[at : at + arguments.batch])
        for at in range(0, len(pairs), arguments.batch)
    ]
    return {"times": times, "losses": losses, "tokens": tokens, "parameters": num_parameters}


def trl(arguments: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    """TRL's `DPOTrainer`."""
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.times, self.started = list[float](), 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter() - self.started)

    clock = Clock()
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, arguments.model, dtype=torch.float32)
    online = arguments.reference == "online"
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=arguments.precision == "mixed",
            gradient_checkpointing=arguments.checkpointing,
            max_length=arguments.max_length,
            disable_tqdm=True,
            beta=BETA,
            per_device_train_batch_size=arguments.batch,
            max_steps=len(rows) // arguments.batch,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            precompute_ref_log_probs=not online,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
        )
        trainer = DPOTrainer(
            model=load(),
            ref_model=load(),
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(arguments.model),
            callbacks=[clock],
        )
        if not online:
            # What it does in its constructor is not timed; the second model would count as memory.
            trainer.ref_model = None
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {"times": clock.times, "losses": [line["loss"] for line in lines]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    torch.set_num_threads(arguments.threads)
    from dpo_ray.model.linear import widens

    dtype = torch.bfloat16 if arguments.precision == "mixed" else torch.float32
    dtype = torch.float32 if widens(dtype, torch.device("cpu")) else dtype
    rate = matmul_rate(arguments.model, dtype)
    found = {"ours": ours, "trl": trl}[arguments.side](arguments, rows_of(arguments))
    timed = found["times"][arguments.warmup :]
    return {
        **found,
        "pairs_per_s": arguments.batch * len(timed) / sum(timed),
        "matmul_gflops": rate / 1e9,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def in_process(arguments: argparse.Namespace, **case: Any) -> dict[str, Any]:
    """One side, in a process of its own."""
    given = json.dumps({**vars(arguments), **case})
    done = subprocess.run(
        [sys.executable, __file__, "--one", given], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ}
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """Both sides of a case in turns."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for turn, side in itertools.product(range(arguments.repeats), runs):
        runs[side].append(in_process(arguments, side=side, **case))
        print(f"{case} {side} {turn + 1}: {runs[side][-1]['pairs_per_s']:.3f} pairs/s", file=sys.stderr)
    rate = {side: statistics.median(run["pairs_per_s"] for run in found) for side, found in runs.items()}
    mine = runs["ours"][0]
    timed = mine["tokens"][arguments.warmup :]
    tokens_per_pair = sum(timed) / (arguments.batch * len(timed))
    flops = (8 if case["reference"] == "online" else 6) * mine["parameters"] * tokens_per_pair
    matmul = statistics.median(run["matmul_gflops"] for found in runs.values() for run in found) * 1e9
    peak = {side: max(run["peak_gib"] for run in found) for side, found in runs.items()}
    gaps = [abs(a - b) for a, b in zip(mine["losses"], runs["trl"][0]["losses"], strict=True)]
    return {
        **case,
        "pairs_per_s": rate,
        "tokens_per_s": {side: value * tokens_per_pair for side, value in rate.items()},
        "speedup": rate["ours"] / rate["trl"],
        "speedups": [a["pairs_per_s"] / b["pairs_per_s"] for a, b in zip(*runs.values(), strict=True)],
        "peak_gib": peak,
        "memory_ratio": peak["ours"] / peak["trl"],
        "utilisation": {side: value * flops / matmul for side, value in rate.items()},
        "matmul_gflops": matmul / 1e9,
        "largest_loss_difference": max(gaps),
        "runs": runs,
    }


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="transformers directory")
    parser.add_argument("pairs_file", nargs="?", help="hh-rlhf transcripts, .jsonl.gz")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--compile", action="store_true", help="model.compile: true on our side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2, help="steps of a process that are not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="*", default=[], help="only these, by name")
    parser.add_argument("--json", default="bench_step.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(argparse.Namespace(**json.loads(arguments.one)))))
        return

    from rich.console import Console
    from rich.table import Table

    plain = {"reference": "online", "sorted": False, "checkpointing": False}
    kinds = {
        "online": plain,
        "precomputed": {**plain, "reference": "precomputed"},
        "online, sorted": {**plain, "sorted": True},
        "online, TRL checkpointing": {**plain, "checkpointing": True},
    }
    cases = {f"{dtype} {kind}": {"precision": dtype, **case} for dtype in TOLERANCE for kind, case in kinds.items()}
    chosen = {name: case for name, case in cases.items() if name in (arguments.cases or cases)}
    results = {name: compare(arguments, case) for name, case in chosen.items()}
    table = Table(
        title=f"{Path(arguments.model).name}, batches of {arguments.batch} pairs, {arguments.threads} threads"
    )
    for column in ("case", "ours, pairs/s", "TRL", "speed-up", "target", "memory", "of TRL's", "utilisation", "TRL's"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found['pairs_per_s']['ours']:.2f}",
            f"{found['pairs_per_s']['trl']:.2f}",
            f"{found['speedup']:.2f}",
            f"{TARGETS[name]:g}" if name in TARGETS else "",
            f"{found['peak_gib']['ours']:.1f} GiB",
            f"{found['memory_ratio']:.0%}",
            f"{found['utilisation']['ours']:.0%}",
            f"{found['utilisation']['trl']:.0%}",
        )
    Console().print(table)
    for name, found in results.items():
        if found["largest_loss_difference"] > TOLERANCE[found["precision"]]:
            parser.exit(1, f"{name}: losses differ by up to {found['largest_loss_difference']:.2g}\n")
    hardware = {"cpu": cpu_name(), "threads": arguments.threads}
    document = {
        "arguments": vars(arguments),
        "versions": versions("torch", "transformers", "trl"),
        "hardware": hardware,
        "results": results,
    }
    Path(arguments.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
