"""How far numerics alone take the policy's first scores from the reference's: |difference| per token, by answer.

The same weights both times. The reference scores in its own packs, as a replica does; the policy, float32 weights that
FSDP casts for its forward pass, in the packs of its global batches. What `checks.first_step` allows must be more.

    python benchmarks/bench_first_step.py MODEL PAIRS.jsonl.gz
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import cpu_name, versions


def gaps(arguments: argparse.Namespace, dtype: str) -> np.ndarray:
    """|policy - reference| per token, nats: Shape (answers,)."""
    from transformers import AutoTokenizer

    from dpo_ray.config import ModelConfig
    from dpo_ray.errors import RowError
    from dpo_ray.model.forward import answer_scores
    from dpo_ray.model.shard import sharded_policy
    from dpo_ray.pairs import pack
    from dpo_ray.pairs.formats import parse_row, recognise
    from dpo_ray.pairs.tokenize import Limits, PairTokenizer
    from dpo_ray.reference.scorer import Scorer
    from dpo_ray.types import ScoredPair

    with gzip.open(arguments.pairs_file, "rt") as lines:
        rows = [json.loads(line) for line in islice(lines, arguments.pairs)]
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(arguments.model), "none", Limits(512))
    reading, parsed = recognise(rows), []
    for row in rows:
        with contextlib.suppress(RowError):
            parsed.append(parse_row(row, reading))
    made = tokenize(parsed)
    pairs = [each.pair for each in made if not isinstance(each, RowError)]
    scores = Scorer(arguments.model, dtype, "packed", 8192, torch.device("cpu")).score(pairs)
    policy = sharded_policy(ModelConfig(path=arguments.model, compute_dtype=dtype), torch.device("cpu"))
    found = []
    for start in range(0, len(pairs), arguments.batch):
        span = slice(start, start + arguments.batch)
        scored = list(map(ScoredPair, pairs[span], scores[span]))
        (row,) = pack.table_of(pack.rank_batches(scored, start + 1, 0, 1, pack.Costs())).to_pylist()
        for microbatch in pack.global_batch(row, 2048, pack.Costs()).microbatches:
            assert microbatch.ref_logps is not None
            with torch.no_grad():
                gap = (answer_scores(policy, microbatch).logps - microbatch.ref_logps).abs() / microbatch.num_tokens
            found.append(gap.numpy())
    return np.concatenate(found)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="transformers directory")
    parser.add_argument("pairs_file", help="hh-rlhf transcripts, .jsonl.gz")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64, help="pairs of a global batch")
    parser.add_argument("--json", default="bench_first_step.json")
    arguments = parser.parse_args()

    import torch.distributed as dist
    from rich.console import Console
    from rich.table import Table

    from dpo_ray.training.metrics import FIRST_STEP_TOLERANCE

    table = Table(title=f"{arguments.pairs} pairs, |policy - reference| per token by answer, nats")
    for name in ("dtype", "median", "99 %", "largest", "allowed"):
        table.add_column(name)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        for dtype, allowed in FIRST_STEP_TOLERANCE.items():
            found = gaps(arguments, dtype)
            results[dtype] = {"median": np.median(found), "p99": np.quantile(found, 0.99), "max": found.max()}
            table.add_row(dtype, *(f"{value:.2g}" for value in results[dtype].values()), f"{allowed:g}")
    Console().print(table)
    about = {"arguments": vars(arguments), "hardware": cpu_name(), "versions": versions("torch", "transformers")}
    results = {dtype: {name: float(value) for name, value in each.items()} for dtype, each in results.items()}
    Path(arguments.json).write_text(json.dumps({**about, "results": results}, indent=2))


if __name__ == "__main__":
    main()
