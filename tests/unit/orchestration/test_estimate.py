"""`dpo-ray plan`, from a configuration to what is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import chunk_table, tiny_config
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.config import to_yaml
from dpo_ray.orchestration import estimate as estimating
from dpo_ray.pairs import store
from dpo_ray.pairs.store import PairStore
from dpo_ray.types import TokenizedPair

SECTIONS: dict[str, dict[str, Any]] = {
    "scaling": {"gpus_per_worker": 1, "workers": 2},
    "reference": {"gpus_per_replica": 1},
    "train": {"tokens_per_microbatch": "auto"},
}


def plan(path: Path, model: Path, *options: str, **sections: dict[str, Any]) -> str:
    config = tiny_config(str(path / "s"), "run", model, str(path / "none.jsonl"), **{**SECTIONS, **sections})
    (path / "c.yaml").write_text(to_yaml(config))
    done = CliRunner().invoke(app, ["plan", str(path / "c.yaml"), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_what_is_said(tmp_path: Path, tiny_model: Path) -> None:
    said = plan(tmp_path, tiny_model)
    assert "a worker of 2: GiB at each moment of a step" in said
    assert "fits on 1 worker or more" in said
    assert "a pair has 1,024 tokens" in said
    assert "none.jsonl" in said  # Why nothing better is known.


def test_another_number_of_workers_and_what_would_need_fewer(tmp_path: Path, tiny_model: Path) -> None:
    """1 GiB is plenty; what a million of tokens leave is not. Checkpoints leave a twentieth."""
    options = "--pair-tokens", "400000", "--device-memory-gib", "4", "--workers", "4", "--json"
    found = json.loads(plan(tmp_path, tiny_model, *options, train={"tokens_per_microbatch": 2_000_000}))
    assert found["workers"] == 4
    assert [scale["workers"] for scale in found["scales"]] == [2**power for power in range(11)]
    peaks = [scale["peak_bytes"] for scale in found["scales"]]
    assert peaks == sorted(peaks, reverse=True)
    assert max(sum(parts.values()) for parts in found["moments"].values()) == peaks[2]
    assert found["least_workers"] > found["remedies"]["model.gradient_checkpointing: true"]
    assert found["assumptions"][0].endswith("67% of them the answers'")


def test_pairs_that_are_prepared(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of 30 and 50 tokens: 40 in the mean, 3/4 of them the answers'."""
    parts = [[10, 5, 15], [10, 20, 20]]
    pairs = [
        TokenizedPair(
            bytes([index]) * 16, np.ones(prompt, np.int32), tuple(np.ones(each, np.int32) for each in answers)
        )
        for index, (prompt, *answers) in enumerate(parts)
    ]
    chunk = store.write_chunk(str(tmp_path), store.chunk_name("train", 0), chunk_table(pairs))
    monkeypatch.setattr(estimating, "prepared", lambda _: PairStore(str(tmp_path), (chunk,), (), {}))
    config = tiny_config(str(tmp_path), "run", tiny_model, "none.jsonl")
    assert estimating._mean_pair(config, None)[0] == (40.0, 30.0)
    assert estimating._mean_pair(config, 100)[0][0] == 100.0


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no config.json there"):
        plan(tmp_path, tmp_path)
