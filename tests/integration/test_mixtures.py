"""A mixture of sources, and held-out sets with names, through the whole system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import plain_logps, read_lines, tiny_config
from transformers import AutoModelForCausalLM

from dpo_ray import train
from dpo_ray.config import Config
from dpo_ray.demo_data import make_pairs
from dpo_ray.orchestration.prepare import prepared
from dpo_ray.orchestration.reference_filler import open_reference_store
from dpo_ray.orchestration.verify import verify
from dpo_ray.pairs.store import read_chunk

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
BATCH = 8


def config_of(tmp_path: Path, model: Path, steps: int, workers: int) -> Config:
    place = {name: str(tmp_path / f"{name}.jsonl") for name in ("many", "few", "x", "y")}
    return tiny_config(
        str(tmp_path),
        "run",
        model,
        "",
        data={
            "train": {place["many"]: 0.25, place["few"]: 2.0},
            "eval": {"x": [place["x"]], "y": [place["y"]]},
            "eval_fraction": 0.0,
            "chunk_pairs": 16,
        },
        train={"ledger": "full", "max_steps": steps, "eval_every_steps": 100, "global_batch_pairs": BATCH},
        scaling={"workers": workers},
    )


def test_a_mixture_and_named_held_out_sets(local_ray: None, tmp_path: Path, tiny_model: Path) -> None:
    """32 of 128 pairs and twice 20 are an epoch of 72: 9 steps; in the middle the number of workers changes."""
    rows = list(dict.fromkeys(json.dumps(row) for row in make_pairs(400, seed=9)))
    for name, (start, stop) in {"many": (0, 128), "few": (128, 148), "x": (148, 153), "y": (153, 168)}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows[start:stop]))
    train(config_of(tmp_path, tiny_model, 4, workers=1))
    config = config_of(tmp_path, tiny_model, 9, workers=2)
    result = train(config)
    verdict = verify(result.run_uri)
    assert verdict.line == "exact: 9 of 9 steps, every pair as often as its source's weight says"
    assert verdict.pairs_trained == 32 + 2 * 20

    pairs = prepared(config)
    trained = [bytes.fromhex(i) for line in read_lines(tmp_path / "run" / "ledger.jsonl") for i in line["pair_ids"]]
    few, many = ({p.pair_id for c in pairs.train if c.source == n for p in read_chunk(pairs.uri, c)} for n in (0, 1))
    assert (len(few), len(many)) == (20, 128)
    assert sorted(i for i in trained if i in few) == sorted([*few, *few])
    assert len({i for i in trained if i in many}) == 32
    # The reference has scored the chunks of the larger source that the epoch came to, and no others.
    missing = open_reference_store(config, pairs.uri).missing([*pairs.train, *pairs.eval])
    assert {chunk.source for chunk in missing} == {1}
    untouched = {p.pair_id for chunk in missing for p in read_chunk(pairs.uri, chunk)}
    assert len(untouched) > 128 / 2
    assert not untouched & set(trained)

    model = AutoModelForCausalLM.from_pretrained(result.export_uri, dtype=torch.float32)
    means = []
    for number, name in enumerate(("x", "y")):
        held = [p for c in pairs.eval if c.source == number for p in read_chunk(pairs.uri, c)]
        with torch.no_grad():
            means.append(sum(float(plain_logps(model, pair)[0]) for pair in held) / len(held))
        assert len(held) == (5, 15)[number]
        assert result.eval_metrics[f"eval_{name}_logps/chosen"] == pytest.approx(means[number], rel=1e-5)
    together = (5 * means[0] + 15 * means[1]) / 20
    assert result.eval_metrics["eval_logps/chosen"] == pytest.approx(together, rel=1e-5)
