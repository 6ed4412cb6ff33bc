"""What evaluation costs training: in actors of its own, in the workers, and none at all.

One policy worker with a core for itself on all sides; the actor that evaluates, and everything else of Ray's, are kept
on the other cores. All sides write a checkpoint at the same steps, which are those of the evaluations; the pairs are
prepared and scored beforehand. The sides take turns. The actor starts, which takes some ten seconds, with the first
evaluation.

Measured are seconds per step by the worker's own clock, from the end of one step to the end of the next: evaluation and
checkpoint in between count. Two cores of one chip slow each other down by themselves, which counts here too.

    python benchmarks/bench_evaluation.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_overhead import TOLERANCE, config_of, in_process, make_inputs
from hardware import cpu_name

TARGET = 0.03
SIDES = ("none", "actors", "workers")


def side_of(side: str, folder: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run of one side."""
    raw = config_of(folder, name, arguments)
    raw["data"]["eval"] = [f"{folder}/held_out.jsonl"]
    raw["train"] |= {"checkpoint_every_steps": arguments.every}
    raw["reference"] = {"tokens_per_microbatch": 4096}
    if side != "none":
        raw["train"] |= {"eval_every_steps": arguments.every, "eval_place": side}
    return raw


def evaluations_of(raw: dict[str, Any]) -> list[dict[str, float]]:
    """Of a run that is finished."""
    metrics = Path(raw["storage_path"], raw["name"], "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, metrics) if "eval_loss" in line]


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=8, help="steps from one evaluation to the next")
    parser.add_argument("--held-out", type=int, default=256, help="pairs of an evaluation")
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="bench_evaluation.json")
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from dpo_ray.demo_data import make_pairs

    runs: dict[str, list[list[dict[str, float]]]] = {side: [] for side in SIDES}
    evaluations: dict[str, list[list[dict[str, float]]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(folder, arguments)
        rows = make_pairs(arguments.held_out, seed=1, held_out=True)
        Path(f"{folder}/held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        first = side_of("workers", folder, "first", arguments)  # Prepares and scores.
        first["train"] |= {"eval_every_steps": 10**6, "checkpoint_every_steps": 10**6}
        in_process("ray", first)
        for turn in range(arguments.repeats):
            for side, found in runs.items():
                raw = side_of(side, folder, f"{side}-{turn}", arguments)
                found.append(in_process("ray", raw))
                evaluations[side].append(evaluations_of(raw))
    # From the first evaluation on.
    timed = {side: [lines[arguments.every :] for lines in found] for side, found in runs.items()}
    step_s = {
        side: [statistics.fmean(line["perf/step_s"] for line in lines) for lines in found]
        for side, found in timed.items()
    }
    mean_s = {side: statistics.fmean(each) for side, each in step_s.items()}
    seconds = {
        side: statistics.fmean(line["eval_perf/seconds"] for lines in evaluations[side] for line in lines)
        for side in SIDES[1:]
    }
    # Of the time from one to the next; above 1 checkpoints wait.
    busy = seconds["actors"] / (arguments.every * mean_s["actors"])
    loss_gap = max(
        abs(a["loss"] - b["loss"])
        for side in SIDES[1:]
        for one, other in zip(runs["none"], runs[side], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    eval_gap = max(
        abs(value - b[name])
        for one, other in zip(evaluations["workers"], evaluations["actors"], strict=True)
        for a, b in zip(one, other, strict=True)
        for name, value in a.items()
        if name != "eval_perf/seconds"
    )
    slower = {side: mean_s[side] / mean_s["none"] - 1 for side in SIDES[1:]}
    table = Table(title=f"{arguments.repeats} turns of {arguments.steps} steps, one core for the worker")
    for column in ("evaluation", "seconds per step", "pairs/s", "slower", "target", "seconds of an evaluation"):
        table.add_column(column, justify="right")
    names = {"none": "none", "actors": "in an actor of its own", "workers": "in the worker"}
    for side, name in names.items():
        table.add_row(
            name,
            f"{mean_s[side]:.3f}",
            f"{arguments.batch / mean_s[side]:.1f}",
            f"{slower[side]:+.1%}" if side in slower else "",
            f"at most {TARGET:.0%}" if side == "actors" else "",
            f"{seconds[side]:.1f}" if side in seconds else "",
        )
    table.caption = (
        f"an evaluation takes its actor {busy:.0%} of the time to the next; losses differ by at most "
        f"{loss_gap:.1e}, numbers of the evaluations by {eval_gap:.1e}"
    )
    Console(width=120).print(table)
    results = {"step_s": step_s, "slower": slower, "evaluation_s": seconds, "busy": busy, "evaluation_gap": eval_gap}
    hardware = {"cpu": cpu_name(), "cores": os.cpu_count()}
    document = {"arguments": vars(arguments), "hardware": hardware, "results": results, "runs": runs}
    Path(arguments.json).write_text(json.dumps(document, indent=1))
    if loss_gap > TOLERANCE:
        parser.exit(1, f"losses differ by up to {loss_gap:.2g}\n")


if __name__ == "__main__":
    main()
