"""LoRA: only the adapter is trained and kept, and the policy without it is the reference."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from helpers import plain_logps, run_ranks, steps_of, stored_scores, tiny_config, tokenized, write_pairs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray import train
from dpo_ray.config import AdapterConfig, Config, ModelConfig, OptimizerConfig
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.errors import CheckpointError, ConfigError
from dpo_ray.model.adapter import adapter_off
from dpo_ray.model.export import export
from dpo_ray.model.load import load_pretrained
from dpo_ray.model.shard import sharded_policy
from dpo_ray.objective.losses import LOSSES
from dpo_ray.orchestration.prepare import prepare
from dpo_ray.orchestration.reference_filler import open_reference_store
from dpo_ray.orchestration.stream import make_plan
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs import pack
from dpo_ray.pairs.store import read_chunk
from dpo_ray.reference.scorer import Scorer, score_pairs
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.checkpoint_tensors import tensors_of
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import ScoredPair, TokenizedPair, TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
CPU = torch.device("cpu")
RANK, ALPHA, BETA, RATE = 2, 8.0, 0.1, 1e-2
ADAPTER = AdapterConfig(rank=RANK, alpha=ALPHA)
LAYERS = 7 * 2  # Linear, in two blocks.
MATRICES = 2 * LAYERS  # A and B.


def build(model: str, adapter: AdapterConfig = ADAPTER, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    config = ModelConfig(**{"path": model, "compute_dtype": "float32", **options})
    policy = sharded_policy(config, CPU, adapter, seed)
    return policy, build_optimizer(policy, OptimizerConfig(learning_rate=RATE))


def scored_pairs(model: str, num: int = 10) -> list[ScoredPair]:
    pairs = [pair for pair in tokenized(make_pairs(num, seed=2), byte_tokenizer()) if isinstance(pair, TokenizedPair)]
    scores = Scorer(model, "float32", "sdpa", 500, CPU).score(pairs)
    return [ScoredPair(*both) for both in zip(pairs, scores, strict=True)]


def step(policy: Any, optimizer: Any, pairs: list[ScoredPair], rank: int, world: int, number: int) -> float:
    """One step without clipping: its loss."""
    loss = lambda stats: LOSSES["sigmoid"].fn(stats, beta=BETA, label_smoothing=0.0)  # noqa: E731
    rows = pack.table_of(pack.rank_batches(pairs, number, 0, world, pack.Costs())).to_pylist()
    batch = pack.global_batch(rows[rank], 500, pack.Costs())
    result = train_step(policy, optimizer, batch, Objective(loss, couples_pairs=False, beta=BETA), None)
    return float(result.sums[0]) / len(pairs)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def plain_peft(model: str, adapter: AdapterConfig, values: dict[str, torch.Tensor]) -> Any:
    """peft's own model with the same adapter."""
    kind = {"use_rslora": adapter.rslora, "use_dora": adapter.dora}
    lora = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM", **kind)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    own = {name.removeprefix("base_model.model."): p for name, p in plain.named_parameters() if p.requires_grad}
    assert own.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
    return plain, own


def trained(rank: int, world: int, model: str, adapter: AdapterConfig, folder: str) -> None:
    policy, optimizer = build(model, adapter)
    pairs = scored_pairs(model)
    assert type(policy).__name__.endswith("LlamaForCausalLM")
    ours = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(ours) == MATRICES + LAYERS * adapter.dora
    assert all("lora_" in name for name in ours)
    before = whole(dict(policy.named_parameters()))
    original = load_pretrained(model, "float32", "sdpa").state_dict()
    frozen = {name.replace(".base_layer", "") for name in before if name not in ours}
    assert frozen == original.keys() - {"lm_head.weight"}  # Which is tied to the embedding.
    for name, value in before.items():
        if "lora_A" in name:
            # Kaiming's uniform bound, as peft has it; hardly any of it is within a tenth of the middle.
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.6 * bound < value.abs().max() <= bound
        elif "lora_B" in name:
            assert not value.any()
        elif "lora_magnitude_vector" in name:
            weight = original[name.replace(".lora_magnitude_vector.default", "")]
            torch.testing.assert_close(value, weight.square().sum(1).sqrt(), msg=name)
        else:
            assert torch.equal(value, original[name.replace(".base_layer", "")]), name
    other_seed = whole(dict(build(model, adapter, seed=1)[0].named_parameters()))
    assert all(torch.equal(other_seed[name], before[name]) == ("lora_A" not in name) for name in before)

    # Away from the start, where the gradient of A is zero: the step that peft and autograd give.
    generator = torch.Generator().manual_seed(7)
    values = {
        name: 0.1 * torch.randn(value.shape, generator=generator) + (value if value.ndim == 1 else 0)
        for name, value in before.items()
        if name in ours
    }
    with torch.no_grad():
        for name, parameter in ours.items():
            parts = torch.chunk(values[name], world)
            if rank < len(parts):
                parameter.to_local().copy_(parts[rank])
    plain, own = plain_peft(model, adapter, values)
    losses = []
    for scored in pairs:
        chosen, rejected = plain_logps(plain, scored.pair)
        assert scored.ref_logps is not None
        losses.append(-logsigmoid(BETA * (chosen - rejected - float(scored.ref_logps[0] - scored.ref_logps[1]))))
    expected = torch.stack(losses).mean()
    expected.backward()
    grads: dict[str, torch.Tensor] = {}
    update = optimizer.step
    optimizer.step = lambda: (grads.update(whole({name: p.grad for name, p in ours.items()})), update())[1]
    assert step(policy, optimizer, pairs, rank, world, 1) == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in own.items():
        assert parameter.grad.abs().max() > 5e-5, name
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        # Adam's first step goes by the sign of a gradient, and rounding may turn the sign of a small one.
        parameter.grad = grads[name]
    torch.optim.AdamW(own.values(), lr=RATE, weight_decay=0.0).step()
    for name, value in whole(dict(policy.named_parameters())).items():
        if name in own:
            assert not torch.equal(value, values[name]), name
            torch.testing.assert_close(value, own[name].detach(), rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(value, before[name]), name

    # Off, it is the reference again; and on again what it was.
    with torch.no_grad():
        on = policy.token_scores(*laid_out(pairs))[0].logps
        with adapter_off(policy):
            off = scored_by(policy, pairs)
        assert torch.equal(policy.token_scores(*laid_out(pairs))[0].logps, on)
    for found, scored in zip(off, pairs, strict=True):
        np.testing.assert_allclose(found, scored.ref_logps, rtol=1e-5)
    assert all(p.requires_grad == (name in ours) for name, p in policy.named_parameters())

    if adapter.dora:
        exported(policy, adapter, pairs, model, folder, rank)
    with Checkpointer(folder, policy, optimizer, attempt=0, keep=2) as checkpoints:
        checkpoints.save(TrainState(1, 10))
    held = whole(tensors_of(policy, optimizer))
    loss = step(policy, optimizer, pairs, rank, world, 2)
    if rank == 0:
        save_file(held, f"{folder}/held-{world}.safetensors")
        Path(folder, f"loss-{world}.json").write_text(json.dumps(loss))


def scored_by(model: Any, pairs: list[ScoredPair]) -> list[np.ndarray]:
    return score_pairs(model, [each.pair for each in pairs], 500, torch.distributed.group.WORLD, lambda: None)


def laid_out(pairs: list[ScoredPair]) -> tuple[torch.Tensor, list[list[int]]]:
    batch = pack.microbatch(pairs)
    return batch.tokens, batch.lengths


def exported(policy: Any, adapter: AdapterConfig, pairs: list[ScoredPair], model: str, folder: str, rank: int) -> None:
    """Merged, and alone, it scores as it does here; and in bfloat16 it begins as the reference, to the bit."""
    with torch.no_grad():
        scores = scored_by(policy, pairs)
        fresh, _ = build(model, adapter, compute_dtype="bfloat16")
        begins = scored_by(fresh, pairs)
        with adapter_off(fresh):
            assert all(map(np.array_equal, scored_by(fresh, pairs), begins))
    for merge in (True, False):
        described = {**adapter.model_dump(), "merge": merge}
        export(policy, tiny_config(folder, "exported", Path(model), "pairs", adapter=described), 1, rank, lambda: None)
        if rank == 0:
            place = f"{folder}/exported/export"
            there = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)]
            if not merge:
                base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
                there.append(PeftModel.from_pretrained(base, place))
            with torch.no_grad():
                for found, scored in zip(scores, pairs, strict=True):
                    for each in there:
                        np.testing.assert_allclose(found, plain_logps(each.eval(), scored.pair), rtol=1e-5)


def resumed(rank: int, world: int, model: str, adapter: AdapterConfig, folder: str, loss: float) -> None:
    policy, optimizer = build(model, adapter, seed=5)
    with Checkpointer(folder, policy, optimizer, attempt=1, keep=2) as checkpoints:
        assert checkpoints.load("step-00000001") == TrainState(1, 10)
    here = whole(tensors_of(policy, optimizer))
    (there,) = (load_file(path) for path in Path(folder).glob("held-*.safetensors"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert step(policy, optimizer, scored_pairs(model), rank, world, 2) == pytest.approx(loss, rel=1e-5)
    other = build(model, AdapterConfig(rank=RANK + 1, alpha=ALPHA, dora=adapter.dora))
    with pytest.raises(CheckpointError, match=r"another model, adapter or optimizer: model\..*lora_A"):
        Checkpointer(folder, *other, attempt=1, keep=2).load("step-00000001")


@pytest.mark.parametrize(
    ("world", "others", "kind"),
    [
        # With the long tests: what it shows of one worker, the next shows in passing.
        pytest.param(1, [2, 3], {}, id="1", marks=[pytest.mark.slow, pytest.mark.faults]),
        pytest.param(2, [1, 3], {}, id="2"),
        pytest.param(2, [1], {"rslora": True, "dora": True}, id="rslora-dora"),
    ],
)
def test_only_the_adapter_is_trained_and_kept(
    tmp_path: Path, tiny_model: Path, world: int, others: list[int], kind: dict[str, bool]
) -> None:
    """The base model at the start, peft's gradients in the step, and checkpoints for other world sizes."""
    adapter = AdapterConfig(rank=RANK, alpha=ALPHA, **kind)
    run_ranks(trained, world, tmp_path, str(tiny_model), adapter, str(tmp_path))
    (layout,) = (tmp_path / "checkpoints").glob("*/attempt-0000/layout.json")
    saved = json.loads(layout.read_text())["tensors"]
    # Each with two moments and a count of steps.
    assert len(saved) == 4 * (MATRICES + LAYERS * adapter.dora)
    assert all(".lora_" in name for name in saved)
    loss = json.loads((tmp_path / f"loss-{world}.json").read_text())
    for other in others:
        run_ranks(resumed, other, tmp_path, str(tiny_model), adapter, str(tmp_path), loss)


def variants(rank: int, world: int, model: str) -> None:
    pairs = scored_pairs(model)
    plain = build(model)
    expected = [step(*plain, pairs, rank, world, n) for n in (1, 2, 3)]
    assert expected[0] == pytest.approx(math.log(2), abs=1e-5)
    assert expected[2] < expected[0] - 1e-3
    for options in ({"gradient_checkpointing": True}, {"gradient_checkpointing": "offload"}, {"cpu_offload": True}):
        other = build(model, **options)
        assert [step(*other, pairs, rank, world, n) for n in (1, 2, 3)] == pytest.approx(expected, rel=1e-6), options
    # Frozen weights as the reference has them, beside an adapter whose small updates are kept.
    mixed = build(model, compute_dtype="bfloat16")
    rounded = Scorer(model, "bfloat16", "packed", 500, CPU).score([each.pair for each in pairs])
    with adapter_off(mixed[0]):
        own = scored_by(mixed[0], pairs)
    for found, scores in zip(own, rounded, strict=True):
        np.testing.assert_allclose(found, scores, rtol=2e-3)
    rounded_pairs = [ScoredPair(each.pair, scores) for each, scores in zip(pairs, rounded, strict=True)]
    assert [step(*mixed, rounded_pairs, rank, world, n) for n in (1, 2, 3)] == pytest.approx(expected, abs=0.02)
    for parameter in mixed[0].parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_no_number_depends_on_how_it_is_computed(tmp_path: Path, tiny_model: Path) -> None:
    """Blocks computed again, with inputs that have no gradient; weights of two dtypes in one block."""
    run_ranks(variants, 2, tmp_path, str(tiny_model))


def compiled(rank: int, world: int, model: str) -> None:
    pairs = scored_pairs(model)
    expected, found = build(model), build(model, compile=True)
    for number in (1, 2):
        loss = step(*expected, pairs, rank, world, number)
        assert step(*found, pairs, rank, world, number) == pytest.approx(loss, rel=1e-6)
    with adapter_off(found[0]):
        off = scored_by(found[0], pairs)
    for scores, scored in zip(off, pairs, strict=True):
        np.testing.assert_allclose(scores, scored.ref_logps, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.faults  # By its length.
def test_a_compiled_adapter(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(compiled, 1, tmp_path, str(tiny_model))


def renamed(rank: int, world: int, model: str, expected: str) -> None:
    """The weights come through transformers, as the files name them otherwise."""
    policy, _ = build(model)
    original = load_pretrained(expected, "float32", "sdpa").state_dict()
    for name, value in whole(dict(policy.named_parameters())).items():
        if "lora_" not in name:
            assert torch.equal(value, original[name.replace(".base_layer", "")]), name
        elif "lora_B" in name:
            assert not value.any()


def test_weights_under_other_names(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    # As a file of the body alone has them.
    save_file(
        {name.removeprefix("model."): value for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    run_ranks(renamed, 2, tmp_path, str(folder), str(tiny_model))


def refused(rank: int, world: int, model: str) -> None:
    for target, message in (
        (["q_proj", "p_proj"], r"adapter.target_modules is \['q_proj', 'p_proj'\], but \w+ has no layer p_proj: write"),
        ("q_proj", "adapter.target_modules is 'q_proj': .*not found.*Write names"),
        (["lm_head"], "but lm_head is tied to the embedding, which would not change with it: leave it out"),
        (["embed_tokens"], "but model.embed_tokens is an embedding, and only linear layers"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build(model, AdapterConfig(rank=2, target_modules=target))
        assert "\n" not in str(caught.value)


def test_layers_that_can_have_none(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(refused, 1, tmp_path, str(tiny_model))


NUM_PAIRS = 150


class Listener(Watcher):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings = list[str]()

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def line(self, line: dict[str, Any]) -> None:
        """Those of workers come among the metrics."""
        if "warning" in line:
            self.warnings.append(line["warning"])


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS)


def config_of(tmp_path: Path, name: str, model: Path, pairs_file: str, **sections: dict[str, Any]) -> Config:
    """Chunks of few pairs, so that steps come to new ones."""
    given = {
        "data": {"train": [pairs_file], "eval_fraction": 0.1, "chunk_pairs": 16},
        "adapter": {"rank": 4},
        "reference": {"place": "adapter_off"},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 4, "schedule": "constant_with_warmup"},
    }
    return tiny_config(str(tmp_path / "storage"), name, model, pairs_file, **{**given, **sections})


def losses_of(result: Any) -> list[float]:
    return [line["loss"] for line in steps_of(Path(result.run_uri))]


def replicas_started() -> int:
    return sum("ReferenceReplica" in actor["ActorClassName"] for actor in ray._private.state.actors().values())


def test_the_policy_is_its_own_reference(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """The scores of the plain model and the losses of a reference in actors, without a replica; once for all betas."""
    before = replicas_started()
    config = config_of(tmp_path, "own", tiny_model, pairs_file, scaling={"workers": 2})
    result = train(config)
    pairs = prepare(config)
    stored = stored_scores(config, pairs)
    assert len(stored) == NUM_PAIRS
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        for chunk in (*pairs.train, *pairs.eval):
            for pair in read_chunk(pairs.uri, chunk):
                expected = [float(score) for score in plain_logps(plain, pair)]
                assert stored[pair.pair_id] == pytest.approx(expected, rel=1e-5)
    steps = steps_of(Path(result.run_uri))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.01
    # The first step waits for its chunks, and later ones for theirs.
    waited = [line["step"] for line in steps if line["perf/reference_wait_s"] > 0]
    assert waited[0] == 1
    assert len(waited) > 1
    assert all(line["perf/reference_wait_s"] <= line["perf/data_wait_s"] for line in steps)
    assert result.reference == {}

    # Another beta scores nothing, to the file's time.
    folder = Path(open_reference_store(config, pairs.uri).uri)
    files = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    other = train(config_of(tmp_path, "beta", tiny_model, pairs_file, objective={"beta": 0.5}))
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")} == files
    assert losses_of(other)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(line["perf/reference_wait_s"] for line in steps_of(Path(other.run_uri))) == 0.0
    assert replicas_started() == before

    # The same run beside a reference in actors, which makes the scores itself.
    shutil.rmtree(folder)
    beside = train(config_of(tmp_path, "beside", tiny_model, pairs_file, reference={"place": "actors"}))
    assert beside.reference["scored_pairs"] == NUM_PAIRS
    assert losses_of(beside) == pytest.approx(losses_of(result), abs=1e-5)
    assert beside.eval_metrics["eval_loss"] == pytest.approx(result.eval_metrics["eval_loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.faults
def test_damaged_scores_are_made_again(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """Where all are there, the stream finds the damaged ones for the next attempt."""
    whole_run = train(config_of(tmp_path, "whole", tiny_model, pairs_file))
    assert whole_run.steps == 12
    config = config_of(tmp_path, "damaged", tiny_model, pairs_file)
    folder = Path(open_reference_store(config, prepare(config).uri).uri)
    first, second, third, *_ = sorted(folder.glob("*.parquet"))
    scores = {path: pq.read_table(path) for path in (first, second)}
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(third.read_bytes())
    listener = Listener()
    result = train(config, listener)
    said = "\n".join(listener.warnings)
    assert re.search(rf"({first.name}|{second.name}): the scores are refused.*starting again", said)
    assert f"{first.name}: damaged" in said
    assert f"{second.name}: holds scores of other pairs" in said
    assert not list((folder / "refused").iterdir())
    attempts = (tmp_path / "storage" / "damaged" / "attempts.jsonl").read_text().splitlines()
    assert len(attempts) == 2  # Both are mended after the first is met.
    assert losses_of(result) == pytest.approx(losses_of(whole_run), abs=1e-5)
    for path, table in scores.items():
        made = pq.read_table(path)
        assert made["pair_id"].equals(table["pair_id"])
        for ours, theirs in zip(made["ref_logps"].to_pylist(), table["ref_logps"].to_pylist(), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), path


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_goes_on(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """With more steps, in a store where some of the scores that are still to come have been lost meanwhile."""
    train(config_of(tmp_path, "parts", tiny_model, pairs_file, train={"max_steps": 6}))
    config = config_of(tmp_path, "parts", tiny_model, pairs_file)
    pairs = prepare(config)
    reference = open_reference_store(config, pairs.uri)
    last = make_plan(config, pairs).takes(0)[-1].chunk
    Path(reference.place(last.key)).unlink(missing_ok=True)
    Path(reference.place(pairs.eval[0].key)).write_bytes(b"")
    parts = train(config)
    assert reference.has(last)
    whole_run = train(config_of(tmp_path, "whole", tiny_model, pairs_file))
    assert (parts.steps, whole_run.steps) == (12, 12)
    assert losses_of(parts) == pytest.approx(losses_of(whole_run), abs=1e-5)
    assert parts.eval_metrics["eval_loss"] == pytest.approx(whole_run.eval_metrics["eval_loss"], abs=1e-5)


def test_exports(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """Merged, and alone: the same log-probabilities, of the policy that was trained."""
    steps = {"max_steps": 6, "eval_every_steps": 6}
    one = train(config_of(tmp_path, "one", tiny_model, pairs_file, train=steps))
    alone = {"rank": 4, "merge": False}
    two = train(config_of(tmp_path, "two", tiny_model, pairs_file, train=steps, adapter=alone))
    assert losses_of(one) == pytest.approx(losses_of(two), abs=1e-6)
    assert sorted(name for name in os.listdir(two.export_uri) if "model" in name or "config" in name) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer_config.json",
    ]
    saved = load_file(f"{two.export_uri}/adapter_model.safetensors")
    assert len(saved) == MATRICES
    assert all("lora_A" in name or "lora_B" in name for name in saved)
    described = json.loads(Path(two.export_uri, "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    models = {
        "merged": AutoModelForCausalLM.from_pretrained(one.export_uri, dtype=torch.float32),
        "peft": PeftModel.from_pretrained(base, two.export_uri),
        "transformers": AutoModelForCausalLM.from_pretrained(two.export_uri, dtype=torch.float32),
    }
    assert not any("lora" in name for name in models["merged"].state_dict())
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = config_of(tmp_path, "one", tiny_model, pairs_file)
    pairs = prepare(config)
    held = [pair for chunk in pairs.eval for pair in read_chunk(pairs.uri, chunk)]
    found: dict[str, list[list[float]]] = {}
    with torch.no_grad():
        for name, model in {**models, "start": start}.items():
            found[name] = [[float(score) for score in plain_logps(model.eval(), pair)] for pair in held]
    for name in ("peft", "transformers"):
        for ours, theirs in zip(found[name], found["merged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
    # The margins of the last evaluation, which the run has measured with the sharded policy.
    margins = [
        0.1 * (chosen - rejected - (start_chosen - start_rejected))
        for (chosen, rejected), (start_chosen, start_rejected) in zip(found["merged"], found["start"], strict=True)
    ]
    assert abs(np.mean(margins)) > 1e-3
    assert one.eval_metrics["eval_rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert AutoTokenizer.from_pretrained(two.export_uri).get_vocab()
    assert "LoRA adapter | rank 4, alpha 16, on all-linear; here" in Path(two.export_uri, "README.md").read_text()
    assert "merged into the weights" in Path(one.export_uri, "README.md").read_text()
