"""Held-out pairs: what the scores of two models say is what plain transformers say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import chunk_table, plain_logps, tiny_config, tokenized, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.evaluation.held_out import HeldOut, evaluate_pairs, warnings_of
from dpo_ray.evaluation.statistics import Calibration, Estimate
from dpo_ray.pairs import store
from dpo_ray.pairs.store import PairStore, read_chunk
from dpo_ray.reference.scorer import Scorer
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.types import TokenizedPair


def moved(path: Path, folder: Path, by: float) -> Path:
    """The model with weights that differ a little: a policy that was trained."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def scored(folder: Path, pairs: PairStore, path: Path) -> ReferenceStore:
    found, scorer = ReferenceStore(str(folder)), Scorer(str(path), "float32", "packed", 2000, torch.device("cpu"))
    for chunk in pairs.eval:
        its_pairs = read_chunk(pairs.uri, chunk)
        found.put(chunk, [pair.pair_id for pair in its_pairs], scorer.score(its_pairs))
    return found


def store_of(folder: Path, rows: list[dict[str, Any]], model: Path) -> PairStore:
    """A store whose held-out pairs are in two chunks."""
    made = tokenized(rows, AutoTokenizer.from_pretrained(model))
    pairs = sorted((pair for pair in made if isinstance(pair, TokenizedPair)), key=lambda pair: pair.pair_id)
    assert len(pairs) == len(rows)
    parts = [pairs[: len(pairs) // 3], pairs[len(pairs) // 3 :]]
    chunks = [
        store.write_chunk(str(folder), store.chunk_name("eval", number), chunk_table(part))
        for number, part in enumerate(parts)
    ]
    return PairStore(str(folder), (), tuple(chunks), dict.fromkeys(store.COUNTS, 0))


def check(tmp_path: Path, rows: list[dict[str, Any]], reference: Path, by: float) -> HeldOut:
    """Evaluates a model that differs by so much from the reference, and compares every mean within 1e-5."""
    policy = moved(reference, tmp_path / "policy", by)
    pairs = store_of(tmp_path / "pairs", rows, reference)
    config = tiny_config(str(tmp_path), "run", reference, "pairs.jsonl")
    stores = (scored(tmp_path / path.name, pairs, path) for path in (policy, reference))
    found = evaluate_pairs(config, pairs, *stores)
    held_out = [pair for chunk in pairs.eval for pair in read_chunk(pairs.uri, chunk)]
    models = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (policy, reference))
    with torch.no_grad():
        ours, its = (torch.stack([plain_logps(model, pair) for pair in held_out]).double() for model in models)
    rewards = 0.1 * (ours - its)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "loss": -torch.nn.functional.logsigmoid(margins),
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).double(),
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "logps/chosen": ours[:, 0],
        "logps/rejected": ours[:, 1],
        "logps/chosen_change": (ours - its)[:, 0],
        "logps/rejected_change": (ours - its)[:, 1],
    }
    assert found.pairs == len(rows)
    assert found.metrics.keys() == expected.keys()
    for name, values in expected.items():
        each = found.metrics[name]
        assert each.value == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-5), name
        assert each.low <= each.value <= each.high
    lengths = np.array([len(pair.answers[0]) for pair in held_out])
    for name, metrics in found.groups["tokens of the chosen answer"].items():
        low, _, high = name.removesuffix(" tokens").partition(" to ")
        inside = (int(low) <= lengths) & (lengths <= int(high))
        assert metrics["loss"].num == inside.sum()
        assert metrics["loss"].value == pytest.approx(expected["loss"].numpy()[inside].mean(), abs=1e-5)
    return found


def test_scores_of_two_models(tmp_path: Path, tiny_model: Path) -> None:
    rows = [json.loads(line) for line in Path(write_pairs(tmp_path / "pairs.jsonl", 40)).read_text().splitlines()]
    found = check(tmp_path, rows, tiny_model, by=0.3)
    assert set(found.groups) == {"tokens of the chosen answer", "tokens that the chosen answer has more"}


def test_a_chosen_answer_that_falls_is_warned_of() -> None:
    """Only where its whole interval is below 0."""

    def said(low: float, high: float) -> list[str]:
        return warnings_of(HeldOut(9, {"logps/chosen_change": Estimate(-2.0, low, high, 9)}, {}, Calibration(0.0, [])))

    (warning,) = said(-3.0, -1.0)
    assert "less likely than the reference does, by 2 nats each (1 to 3)" in warning
    assert not said(-3.0, 0.5)


@pytest.mark.shared
def test_a_real_model_agrees_with_transformers(tmp_path: Path, smollm2: Path, hh_rlhf: Path) -> None:
    """SmolLM2-135M in float32 on 12 short pairs of hh-rlhf."""
    with gzip.open(hh_rlhf, "rt") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    check(tmp_path, [row for row in rows if max(map(len, row.values())) < 400][:12], smollm2, by=0.02)
