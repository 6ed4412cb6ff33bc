"""Folders of runs as training leaves them, without the training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from helpers import chunk_table, tokenized

from dpo_ray.config import parse_config
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.evaluation.held_out import HeldOut
from dpo_ray.evaluation.statistics import (
    Comparison,
    Estimate,
    calibration,
    mean_estimate,
    rank,
    share_estimate,
    win_rate,
)
from dpo_ray.orchestration.evaluate_job import Answers, Evaluation, as_json
from dpo_ray.pairs import store
from dpo_ray.training import outcome
from dpo_ray.types import Attempt, TokenizedPair

BETA = 0.1
PAIRS_PER_STEP = 8


@dataclass(frozen=True)
class Began:
    """A start of the worker group: steps done before it, why, and the driver's generation."""

    position: int
    reason: str
    generation: int = 1


def make_run(
    folder: Path,
    name: str = "run",
    steps: int = 40,
    total: int = 40,
    began: Sequence[Began] = (Began(0, "start"),),
    error: BaseException | None = None,
    ended: bool = True,
    chosen_falls: bool = True,
    **sections: dict[str, Any],
) -> str:
    """A run of `steps` steps, evaluated every ten, that loses ten seconds with each attempt.

    Step s has reward margin s / 10; the chosen answers' log-probability starts at -20 and falls, or rises, by 0.05 a
    step, and its reward is BETA times that change.

    Args:
        folder: Its storage path.
        name: The run's.
        steps: That are done.
        total: Where it ends.
        began: Its attempts.
        error: What ended its last driver; None: nothing, it is finished.
        ended: Whether that is on record.
        chosen_falls: Whether the chosen answers become less likely.
        sections: More of the configuration.
    """
    run = folder / name
    run.mkdir(parents=True)
    raw = {"name": name, "storage_path": str(folder), "model": {"path": "model"}, "data": {"train": ["pairs.jsonl"]}}
    own = {"train": {"max_steps": total, "global_batch_pairs": PAIRS_PER_STEP}, "objective": {"beta": BETA}}
    config = parse_config({**raw, **own, **sections})
    pairs, counts = _pair_store(folder)
    about = {"versions": {"dpo_ray": "0.1.0"}, "pairs": pairs, "steps_per_epoch": total, "counts": counts, "code": {}}
    (run / "config.yaml").write_text(yaml.safe_dump({"config": config.model_dump(mode="json"), "about": about}))
    starts = [each.position for each in began]
    times = [(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)).isoformat() for number in range(len(began))]
    attempts = [
        Attempt(number, each.generation, each.position, None, 2, each.reason, time)
        for number, (each, time) in enumerate(zip(began, times, strict=True))
    ]
    _write_lines(run / "attempts.jsonl", [asdict(each) for each in attempts])
    metrics, ledger = list[dict[str, Any]](), list[dict[str, Any]]()
    for step in range(1, steps + 1):
        change = (-0.05 if chosen_falls else 0.05) * step
        line = _metrics(step, change)
        metrics.append(
            {
                "step": step,
                "epoch": step / total,
                **line,
                "grad_norm": 1.0 + math.sin(step),
                "learning_rate": 1e-6,
                "num_tokens": 1000 * step,
                "perf/step_s": 1.0 + 10.0 * (step - 1 in starts),
                "perf/data_wait_s": 0.25 + 10.0 * (step - 1 in starts),
                "perf/reference_wait_s": 0.125,
                "perf/between_steps_s": 0.25 if step % 10 == 1 and step > 1 else 0.0,
                "perf/pairs_per_s": PAIRS_PER_STEP / (1.0 + 10.0 * (step - 1 in starts)),
                "perf/tokens_per_s": 1000.0,
                "perf/mfu": 0.25,
            }
        )
        if step % 10 == 0:
            held = {f"eval_{key}": value for key, value in line.items()}
            metrics.append({"step": step, **held, "eval_perf/seconds": 0.125})
        attempt = max(number for number, start in enumerate(starts) if start < step)
        ledger.append({"step": step, "digest": "0", "num_pairs": PAIRS_PER_STEP, "attempt": attempt, "world_size": 2})
    _write_lines(run / "metrics.jsonl", metrics)
    _write_lines(run / "ledger.jsonl", ledger)
    if ended:
        outcome.write_outcome(str(run), began[-1].generation, error)
    return str(run)


def add_evaluation(run: str, num_prompts: int = 14) -> None:
    """What `dpo-ray evaluate` leaves, of 200 pairs and of answers of three models, the policy's always better."""
    rng = np.random.default_rng(0)
    margins = rng.normal(1.0, 1.0, 200)

    def of(values: np.ndarray) -> dict[str, Estimate]:
        return {"rewards/accuracies": share_estimate((values > 0) * 1.0), "rewards/margins": mean_estimate(values)}

    groups = {"tokens of the chosen answer": {"1 to 9 tokens": of(margins[:100]), "10 to 20 tokens": of(margins[100:])}}
    held_out = HeldOut(200, of(margins), groups, calibration(margins))
    names, wins = ("policy", "reference", "models/other"), np.ones(num_prompts)
    longer = np.arange(num_prompts) * 1.0
    pairs = [(one, two, prompt) for one, two in ((0, 1), (0, 2), (1, 2)) for prompt in range(num_prompts)]
    ranking = rank([Comparison(prompt, names[one], names[two], prompt % 2) for one, two, prompt in pairs])
    answers = Answers(
        prompts=num_prompts,
        tokens={name: mean_estimate(longer) for name in names},
        ended={name: share_estimate(wins) for name in names},
        kl={"k1": mean_estimate(longer / 10), "k3": mean_estimate(longer / 9)},
        win_rates={name: win_rate(wins, longer) for name in names[1:]},
        ranking=ranking,
        open=1,
        disagreed=2,
    )
    benchmarks = {"colour acc": {"policy": Estimate(0.5, 0.25, 0.75, 6), "reference": Estimate(0.25, 0.125, 0.375, 6)}}
    told = ["chosen answers are <less> likely"]
    found = Evaluation(run, 40, f"{run}/export", "reference", held_out, answers, benchmarks, told)
    folder = Path(run, "evaluation")
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(as_json(found)))
    lines = [
        {
            "pair_id": f"{prompt:032x}",
            "prompt": [{"role": "user", "content": f"prompt {prompt}"}],
            "answers": {"policy": "The cat sat <b>here</b>.", "reference": "The dog sat.", "models/other": "z" * 4000},
            "outcomes": {"policy against reference": 1.0, "policy against models/other": None},
        }
        for prompt in range(num_prompts)
    ]
    _write_lines(folder / "side_by_side.jsonl", lines)


def _metrics(step: int, change: float) -> dict[str, float]:
    margin = step / 10
    return {
        "loss": math.log1p(math.exp(-margin)),
        "logps/chosen": -20.0 + change,
        "logps/rejected": -30.0 + change - margin / BETA,
        "rewards/chosen": BETA * change,
        "rewards/rejected": BETA * change - margin,
        "rewards/margins": margin,
        "rewards/accuracies": 0.75,
    }


def _pair_store(folder: Path) -> tuple[str, dict[str, int]]:
    """A store of 32 pairs and one reject, made once in a folder."""
    uri = str(folder / "store" / "pairs" / "0123456789abcdef")
    counts = {**dict.fromkeys(store.COUNTS, 0), "rows": 33, "pairs": 32, "rejects": 1}
    if not Path(uri, "manifest.json").exists():
        made = tokenized(list(make_pairs(32, seed=1)), byte_tokenizer())
        pairs = [each for each in made if isinstance(each, TokenizedPair)]
        chunk = store.write_chunk(uri, store.chunk_name("train", 0), chunk_table(pairs))
        store.write_manifest(store.PairStore(uri, (chunk,), (), counts), {})
        Path(uri, "rejects").mkdir()
        reject = {"source": "pairs.jsonl", "row": 3, "reason": "the answer <script>alert(1)</script> is empty"}
        _write_lines(Path(uri, "rejects", "part.jsonl"), [reject])
    return uri, counts


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
