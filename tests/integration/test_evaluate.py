"""`dpo-ray evaluate`: a run's model against its reference."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plain_logps, read_lines, tiny_config, write_pairs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_ray import train
from dpo_ray.cli import app
from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.orchestration.evaluate_job import evaluate, open_run
from dpo_ray.pairs.store import read_chunk

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, local_ray: None) -> Config:
    folder = tmp_path_factory.mktemp("evaluated")
    pairs = write_pairs(folder / "pairs.jsonl", 200)
    config = tiny_config(str(folder), "run", tiny_model, pairs, data={"eval_fraction": 0.2})
    train(config)
    return config


def plain(config: Config) -> dict[str, np.ndarray]:
    """Margins and log-probabilities of the held-out pairs, an answer at a time through transformers."""
    run = open_run(config.run_uri)
    held_out = [pair for chunk in run.pairs.eval for pair in read_chunk(run.pairs.uri, chunk)]
    with torch.no_grad():
        policy, reference = (
            torch.stack([plain_logps(model, pair) for pair in held_out]).double()
            for model in (
                AutoModelForCausalLM.from_pretrained(path).eval() for path in (run.export_uri, config.model.path)
            )
        )
    rewards = config.objective.beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "loss": -torch.nn.functional.logsigmoid(margins).numpy(),
        "rewards/margins": margins.numpy(),
        "rewards/accuracies": (margins > 0).double().numpy(),
        "logps/chosen": policy[:, 0].numpy(),
        "logps/rejected_change": (policy - reference)[:, 1].numpy(),
    }


def test_held_out_pairs(trained: Config) -> None:
    """The means are transformers' and those of the run's own last evaluation; scores are made once."""
    shown = CliRunner().invoke(app, ["evaluate", trained.run_uri])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    summary = json.loads(Path(f"{trained.run_uri}/evaluation/summary.json").read_text())
    held_out, expected = summary["held_out"], plain(trained)
    assert summary["step"] == 20
    assert f"{held_out['pairs']} held-out pairs" in shown.output
    for name, values in expected.items():
        found = held_out["metrics"][name]
        assert found["value"] == pytest.approx(values.mean(), rel=1e-5, abs=1e-5)
        assert found["low"] <= found["value"] <= found["high"]
        assert found["num"] == held_out["pairs"] == len(values)
    (*_, last) = [line for line in read_lines(Path(trained.run_uri) / "metrics.jsonl") if "eval_loss" in line]
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/rejected"):
        assert held_out["metrics"][name]["value"] == pytest.approx(last[f"eval_{name}"], rel=1e-5, abs=1e-5)
    for group in held_out["groups"].values():
        assert sum(each["loss"]["num"] for each in group.values()) == held_out["pairs"]
        weighted = sum(each["loss"]["num"] * each["loss"]["value"] for each in group.values())
        assert weighted / held_out["pairs"] == pytest.approx(expected["loss"].mean(), abs=1e-5)
    stores = Path(trained.store_uri, "reference")
    before = {path: path.stat().st_mtime_ns for path in stores.rglob("*.parquet")}
    assert evaluate(trained.run_uri).held_out.metrics["loss"].value == held_out["metrics"]["loss"]["value"]
    assert {path: path.stat().st_mtime_ns for path in stores.rglob("*.parquet")} == before


def test_what_cannot_be_evaluated(trained: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the directory of a run"):
        evaluate(str(tmp_path))
    with pytest.raises(ConfigError, match=r"is a run with another configuration:\n  objective.beta: 0.1 -> 0.2"):
        evaluate(trained.run_uri, ["objective.beta=0.2"])
    exported = Path(trained.run_uri, "export", "exported.json")
    text = exported.read_text()
    try:
        exported.write_text(json.dumps({"step": 20, "merged": False}))
        with pytest.raises(ConfigError, match=r"is an adapter alone, .*adapter.merge=true"):
            evaluate(trained.run_uri)
        exported.unlink()
        with pytest.raises(ConfigError, match="has no export yet"):
            evaluate(trained.run_uri)
    finally:
        exported.write_text(text)


@pytest.mark.shared
def test_a_real_model_agrees_with_transformers(tmp_path: Path, smollm2: Path, hh_rlhf: Path, local_ray: None) -> None:
    """SmolLM2 in float32, two steps, 12 held-out pairs of hh-rlhf."""
    with gzip.open(hh_rlhf, "rt") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    short = [row for row in rows if max(map(len, row.values())) < 400]
    for name, some in (("train", short[:8]), ("eval", short[8:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    config = parse_config(
        {
            "name": "run",
            "storage_path": str(tmp_path),
            "model": {"path": str(smollm2), "compute_dtype": "float32"},
            "data": {"train": [str(tmp_path / "train.jsonl")], "eval": [str(tmp_path / "eval.jsonl")]},
            "optimizer": {"learning_rate": 1e-5},
            "train": {"global_batch_pairs": 4, "max_steps": 2},
        }
    )
    train(config)
    metrics = evaluate(config.run_uri).held_out.metrics
    for name, values in plain(config).items():
        assert metrics[name].value == pytest.approx(values.mean(), rel=1e-5, abs=1e-5)
    assert metrics["loss"].num == 12
    assert metrics["rewards/margins"].value != 0.0
