"""Objectives through the whole system: rankings, mixtures, scores of tokens, and a start by likelihood."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command_here, plain_logps, read_lines, steps_of, tiny_config, write_pairs
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from dpo_ray import train
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.pairs.store import open_store, read_chunk
from dpo_ray.training.manifest import read_manifest
from dpo_ray.types import TokenizedPair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
BETA, LD_ALPHA, RATE, STEPS = 0.3, 0.25, 1e-3, 4


def write_rankings(path: Path) -> str:
    """Two to four scored answers of a prompt, not in order, two of them equal in some rows."""
    rows = []
    for number in range(60):
        answers = [f"{'yes ' * (1 + (number + k) % 5)}{number % (k + 3)}" for k in range(2 + number % 3)]
        scores = [(7 * (number + k)) % 3 for k in range(len(answers))] if number % 10 else [1] * len(answers)
        rows.append({"prompt": f"Question {number}?", "answers": answers, "scores": scores, "counts": number % 4 / 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(tmp_path: Path, model: Path, pairs: str, steps: int, workers: int) -> Config:
    return tiny_config(
        str(tmp_path),
        "run",
        model,
        pairs,
        data={"eval_fraction": 0.0, "chunk_pairs": 16, "weight_column": "counts"},
        objective={"loss": {"plackett_luce": 1.0, "bco_pair": 0.5}, "beta": BETA, "ld_alpha": LD_ALPHA},
        optimizer={"learning_rate": RATE, "warmup_steps": 0, "schedule": "constant"},
        train={"ledger": "full", "max_steps": steps, "eval_every_steps": None},
        scaling={"workers": workers},
    )


def desensitized(model: torch.nn.Module, pair: TokenizedPair) -> torch.Tensor:
    """Of each answer, an answer at a time: what is beyond the shortest one counts a quarter. Shape (answers,)."""
    shared, found = min(map(len, pair.answers)), []
    for answer in pair.answers:
        whole = torch.tensor([*pair.prompt, *answer])
        logps = model(whole[None]).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
        tokens = logps.gather(1, whole[len(pair.prompt) :, None])[:, 0]
        found.append(tokens[:shared].sum() + LD_ALPHA * tokens[shared:].sum())
    return torch.stack(found)


def plain_losses(model: Path, batches: list[list[TokenizedPair]]) -> list[float]:
    """The same training in a few lines of PyTorch."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    losses, seen = list[float](), list[float]()
    for batch in batches:
        shift, rewards, total = sum(seen) / len(seen) if seen else 0.0, [], torch.zeros(())
        for pair in batch:
            with torch.no_grad():
                known = desensitized(reference, pair)
            r = BETA * (desensitized(policy, pair) - known)
            ranking = sum(r[k:].logsumexp(0) - r[k] for k in range(len(r) - 1))
            bco = torch.stack([-logsigmoid(r[0] - shift) - logsigmoid(shift - other) for other in r[1:]]).mean()
            total = total + pair.weight * (ranking + 0.5 * bco)
            rewards.append(float(r[0].detach() + r[1:].mean().detach()) / 2)
        seen += rewards
        loss = total / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_rankings_mixtures_and_scores_of_tokens(local_ray: None, tmp_path: Path, tiny_model: Path) -> None:
    """The losses of a plain loop; the running mean goes on in a second attempt, with another number of workers."""
    pairs = write_rankings(tmp_path / "rankings.jsonl")
    for steps, workers in ((2, 1), (STEPS, 2)):
        result = train(config_of(tmp_path, tiny_model, pairs, steps, workers))
    store = open_store(str(next((tmp_path / "store" / "pairs").rglob("manifest.json")).parent))
    assert store is not None
    every = [pair for chunk in store.train for pair in read_chunk(store.uri, chunk)]
    assert store.counts["rows"] == 60 == len(every) + store.counts["tied"] + store.counts["identical"]
    assert store.counts["tied"] == 6
    assert {len(pair.answers) for pair in every} == {2, 3}
    assert {pair.weight for pair in every} == {0.0, 0.5, 1.0, 1.5}
    pair_of = {pair.pair_id.hex(): pair for pair in every}
    ledger = read_lines(Path(result.run_uri) / "ledger.jsonl")
    batches = [[pair_of[pair_id] for pair_id in entry["pair_ids"]] for entry in ledger]
    found = [line["loss"] for line in steps_of(Path(result.run_uri))]
    expected = plain_losses(tiny_model, batches)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
    # At the start the policy is the reference: K answers have K! equal rankings, and bco's sigmoids are 1/2.
    at_start = [pair.weight * (math.log(math.factorial(len(pair.answers))) + math.log(2)) for pair in batches[0]]
    start = sum(at_start) / len(at_start)
    assert found[0] == pytest.approx(start, abs=1e-5)
    state = read_manifest(result.run_uri, f"step-{STEPS:08d}").state
    assert state.num_pairs == sum(map(len, batches))
    assert state.mean_reward != 0.0


def test_a_start_by_likelihood_comes_first(local_ray: None, tmp_path: Path, tiny_model: Path) -> None:
    """One command makes both runs over one pair store; the second begins where the first has ended."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60)
    options: dict[str, Any] = {"sft": {"epochs": 2, "max_steps": 6, "learning_rate": 3e-3}}
    options["train"] = {"ledger": "full", "max_steps": 2, "eval_every_steps": None}
    config = tiny_config(str(tmp_path), "run", tiny_model, pairs, **options)
    result = train(config)
    likelihood = [line["loss"] for line in steps_of(tmp_path / "run-sft")]
    assert len(likelihood) == 6
    assert likelihood[-1] < likelihood[0] - 0.3
    # Of the rejected answers nothing is computed.
    line = steps_of(tmp_path / "run-sft")[0]
    assert "logps/rejected" not in line
    (pairs_uri,) = (tmp_path / "store" / "pairs").iterdir()
    store, first = open_store(str(pairs_uri)), steps_of(tmp_path / "run")[0]
    assert store is not None
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    pair_of = {pair.pair_id.hex(): pair for chunk in store.train for pair in read_chunk(store.uri, chunk)}
    at_start = [pair_of[pair_id] for pair_id in read_lines(tmp_path / "run-sft" / "ledger.jsonl")[0]["pair_ids"]]
    assert line["num_tokens"] == sum(len(pair.prompt) + len(pair.answers[0]) for pair in at_start)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        per_token = [-float(plain_logps(untrained, pair)[0]) / len(pair.answers[0]) for pair in at_start]
    assert line["loss"] == pytest.approx(sum(per_token) / len(at_start), abs=1e-5)
    batch = [pair_of[pair_id] for pair_id in read_lines(tmp_path / "run" / "ledger.jsonl")[0]["pair_ids"]]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run-sft" / "export", dtype=torch.float32)
    with torch.no_grad():
        chosen = sum(float(plain_logps(plain, pair)[0]) for pair in batch) / len(batch)
    assert first["logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert train(config) == result
    shown = command_here("sft", config, tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "run-sft is finished: nothing to do" in shown.output
    assert f"model    {tmp_path}/run-sft/export\n" in shown.output
    # What follows has begun: nothing touches its start any more.
    exported = tmp_path / "run-sft" / "export" / "exported.json"
    before = exported.read_bytes()
    longer = tiny_config(
        str(tmp_path), "run", tiny_model, pairs, **{**options, "sft": {**options["sft"], "max_steps": 8}}
    )
    for command in ("train", "sft"):
        refused = command_here(command, longer, tmp_path).exception
        assert isinstance(refused, ConfigError)
        assert "sft.max_steps: 6 -> 8" in str(refused)
    assert exported.read_bytes() == before
    exported.unlink()
    refused = command_here("sft", config, tmp_path).exception
    assert isinstance(refused, ConfigError)
    assert re.search("has begun with the model of .*run-sft, which is not there any more", str(refused))
    exported.write_bytes(before)
    # Nor does anybody with other weights of a reference, whose scores would be others from there on.
    weights = exported.parent / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    four = tiny_config(str(tmp_path), "run", tiny_model, pairs, **{**options, "train": {"max_steps": 4}})
    with pytest.raises(ConfigError, match="run-sft/export: its weights are others than when .*/run began"):
        train(four)
    weights.write_bytes(whole)
    # A row more makes another order of pairs, in the middle of which nobody goes on.
    Path(pairs).write_text(Path(pairs).read_text() + json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(ConfigError, match="was trained on the pairs in .*, which are not those that the data give now"):
        train(four)
