"""`dpo-ray evaluate`: a run's model against its reference."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import JudgeServer, plain_logps, read_lines, tiny_config, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from dpo_ray import train
from dpo_ray.cli import app
from dpo_ray.config import Config, parse_config
from dpo_ray.demo_data import byte_tokenizer, tiny_llama_config
from dpo_ray.errors import ActorsLostError, ConfigError, DataError, JudgeError
from dpo_ray.evaluation import statistics
from dpo_ray.orchestration import evaluate_job
from dpo_ray.orchestration.evaluate_job import evaluate, open_run
from dpo_ray.orchestration.parts import make_parts
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.store import read_chunk

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

# Pairs, without answers.
ALONE = ["evaluation.prompts=0"]
# Not every prompt names one.
LANGUAGE = re.compile(r"\bin (German|Italian|Spanish)")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, local_ray: None) -> Config:
    folder = tmp_path_factory.mktemp("evaluated")
    rows = read_lines(Path(write_pairs(folder / "pairs.jsonl", 200)))
    for row in rows:
        row |= {"length": len(row["prompt"]), "tags": []}
        if language := LANGUAGE.search(row["prompt"]):
            row["language"] = language[1]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(str(folder), "run", tiny_model, str(pairs), data={"eval_fraction": 0.2})
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
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                for path in (run.export_uri, config.model.path)
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
    shown = CliRunner().invoke(app, ["evaluate", trained.run_uri, "--set", "evaluation.prompts=0"])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    summary = json.loads(Path(f"{trained.run_uri}/evaluation/summary.json").read_text())
    held_out, expected = summary["held_out"], plain(trained)
    (*_, last) = [line for line in read_lines(Path(trained.run_uri) / "metrics.jsonl") if "eval_loss" in line]
    assert summary["step"] == last["step"]
    assert f"{held_out['pairs']} held-out pairs" in shown.output
    for name, values in expected.items():
        found = held_out["metrics"][name]
        assert found["value"] == pytest.approx(values.mean(), rel=1e-5, abs=1e-5)
        assert found["low"] <= found["value"] <= found["high"]
        assert found["num"] == held_out["pairs"] == len(values)
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/rejected"):
        assert held_out["metrics"][name]["value"] == pytest.approx(last[f"eval_{name}"], rel=1e-5, abs=1e-5)
    assert f"On {held_out['pairs']} held-out pairs" in Path(f"{trained.run_uri}/export/README.md").read_text()
    for group in held_out["groups"].values():
        assert sum(each["loss"]["num"] for each in group.values()) == held_out["pairs"]
        weighted = sum(each["loss"]["num"] * each["loss"]["value"] for each in group.values())
        assert weighted / held_out["pairs"] == pytest.approx(expected["loss"].mean(), abs=1e-5)
    stores = Path(trained.store_uri, "reference")
    before = {path: path.stat().st_mtime_ns for path in stores.rglob("*.parquet")}
    assert evaluate(trained.run_uri, ALONE).held_out.metrics["loss"].value == held_out["metrics"]["loss"]["value"]
    assert {path: path.stat().st_mtime_ns for path in stores.rglob("*.parquet")} == before


def test_groups_by_columns_of_the_data(trained: Config) -> None:
    """What the rows say of a pair is what can be read from its own tokens; each pair is in one group of each column."""
    command = ["evaluate", trained.run_uri, "--set", "evaluation.group_columns=[language, length]", "--set", *ALONE]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    run, tokenizer = open_run(trained.run_uri), AutoTokenizer.from_pretrained(trained.model.path)
    margins, expected = plain(trained)["rewards/margins"], defaultdict[str, list[float]](list)
    held_out = [pair for chunk in run.pairs.eval for pair in read_chunk(run.pairs.uri, chunk)]
    for pair, margin in zip(held_out, margins, strict=True):
        language = LANGUAGE.search(tokenizer.decode(pair.prompt))
        expected[language[1] if language else "(no value)"].append(margin)
    groups = json.loads(Path(trained.run_uri, "evaluation", "summary.json").read_text())["held_out"]["groups"]
    found = groups["column language"]
    assert list(found) == ["German", "Italian", "Spanish", "(no value)"]
    assert found.keys() == expected.keys()
    for name, its_margins in expected.items():
        assert found[name]["rewards/margins"]["num"] == len(its_margins)
        assert found[name]["rewards/margins"]["value"] == pytest.approx(np.mean(its_margins), abs=1e-5)
    assert sum(each["loss"]["num"] for each in groups["column length"].values()) == len(held_out)
    assert "column language" in shown.output
    assert "Italian" in Path(trained.run_uri, "report.html").read_text()


def test_columns_that_no_pairs_can_be_grouped_by(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before anything is scored."""

    def score(*arguments: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(evaluate_job, "_score", score)

    def refused(column: str, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            evaluate(trained.run_uri, [*ALONE, f"evaluation.group_columns=[{column}]"])

    refused("topic", ConfigError, r"no held-out pair has a 'topic'; the rows have chosen, language, length, prompt,")
    refused("tags", DataError, r"pairs.jsonl row \d+: tags is a list: evaluation.group_columns takes columns of texts")
    with monkeypatch.context() as fewer:
        fewer.setattr(statistics, "MOST_GROUPS", 9)
        refused("prompt", ConfigError, r"evaluation.group_columns: prompt has \d+ different values, more than 9")
    refused("tags, tags", ConfigError, "names a column twice: tags, tags")
    pairs = Path(trained.data.train[0])
    as_it_was = pairs.rename(pairs.with_suffix(".before"))
    try:
        refused("language", DataError, r"pairs.jsonl: gone, or changed since pairs were made of it")
        pairs.write_text(as_it_was.read_text() + "\n")
        refused("language", DataError, r"pairs.jsonl: gone, or changed since pairs were made of it.*restore the file")
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="no held-out prompt can be asked: their files are gone or have changed"):
            evaluate(trained.run_uri)
    finally:
        as_it_was.replace(pairs)


class Dies:
    """An actor whose process ends over its second part."""

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if batch["item"][0] == "b":
            os._exit(1)
        return batch


def test_an_actor_that_dies_again_and_again(trained: Config) -> None:
    """It is started again as often as the limit says, not for ever."""
    recovery = trained.recovery.model_copy(update={"max_reference_failures": 1})
    config = trained.model_copy(update={"recovery": recovery})
    message = (
        r"answering: an actor's process died 2 times, .* is 1\. .* lower evaluation.actors, or raise evaluation.cpus"
    )
    with pytest.raises(ActorsLostError, match=message):
        make_parts(config, config.evaluation, ["a", "b"], Dies, (), "answering", Watcher())


def test_an_actor_that_no_node_can_hold(trained: Config) -> None:
    for key, text in (("cpus_per_actor=999", r"\{CPU: 999\}"), ("gpus_per_actor=1", r"\{CPU: 1, GPU: 1\}")):
        with pytest.raises(
            ConfigError, match=rf"evaluation.cpus_per_actor and gpus_per_actor: no node has {text}, or can"
        ):
            evaluate(trained.run_uri, [f"evaluation.{key}"])


def test_what_cannot_be_evaluated(trained: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the directory of a run"):
        evaluate(str(tmp_path))
    with pytest.raises(ConfigError, match=r"is a run with a different configuration:\n  objective.beta: 0.1 -> 0.2"):
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
@pytest.mark.faults  # Not for what fails: tests/unit/evaluation shows the same without Ray in a third of the time.
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
    metrics = evaluate(config.run_uri, ALONE).held_out.metrics
    for name, values in plain(config).items():
        assert metrics[name].value == pytest.approx(values.mean(), rel=1e-5, abs=1e-5)
    assert metrics["loss"].num == 12
    assert metrics["rewards/margins"].value != 0.0


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A further language model and a reward model; both untrained."""
    tokenizer, made = byte_tokenizer(), {}
    for seed, kind in enumerate((LlamaForCausalLM, LlamaForSequenceClassification), start=5):
        torch.manual_seed(seed)
        config = tiny_llama_config(len(tokenizer), hidden_size=32, num_heads=2)
        config.initializer_range, config.num_labels = 0.1, 1
        made[kind.__name__] = folder = tmp_path_factory.mktemp("other")
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return made


def test_answers_side_by_side(trained: Config, others: dict[str, Path]) -> None:
    """KL estimates and rewards are transformers'; a part that is lost is made again, to the byte."""
    other, judge = (str(others[name]) for name in ("LlamaForCausalLM", "LlamaForSequenceClassification"))
    options = ["prompts=10", "prompts_per_part=4", "max_new_tokens=12", f"models=[{other}]"]
    options = [
        f"evaluation.{each}" for each in (*options, "judge=reward_model", f"reward_model={judge}", "prior_std=1")
    ]
    found = evaluate(trained.run_uri, options)
    assert found.answers is not None
    folder = Path(trained.run_uri, "evaluation")
    rows = read_lines(folder / "side_by_side.jsonl")
    assert len(rows) == found.answers.prompts == 10
    assert all([turn["role"] for turn in row["prompt"]] == ["user"] for row in rows)
    parts = sorted(folder.glob("answers/*/part-*.jsonl"))
    assert len(parts) == 9
    lines = [line for part in parts for line in read_lines(part)]
    export = f"{trained.run_uri}/export"
    own = {line["pair_id"]: line for line in lines if line["model"] == export}
    tokenizer = AutoTokenizer.from_pretrained(export)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (export, trained.model.path))
    reward = LlamaForSequenceClassification.from_pretrained(judge).eval()
    k1, k3, won = [], [], []
    for row in rows:
        asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(asked, add_special_tokens=False).input_ids
        line = own[row["pair_id"]]
        assert row["answers"]["policy"] == line["answer"]
        assert tokenizer.decode(line["token_ids"], skip_special_tokens=True) == line["answer"]
        whole, start = torch.tensor([[*prompt, *line["token_ids"]]]), len(prompt)
        with torch.no_grad():
            ours, its = (
                model(whole).logits[0, start - 1 : -1].log_softmax(-1).gather(1, whole[0, start:, None]).double()
                for model in (policy, reference)
            )
        k1.append((ours - its).sum().item())
        k3.append(((its - ours).exp() - 1 - (its - ours)).sum().item())
        for name, each in (("kl_k1", k1), ("kl_k3", k3)):
            assert line[name] == pytest.approx(each[-1], rel=1e-4, abs=1e-4)
        scores = []
        for name in ("policy", "reference"):
            turns = [*row["prompt"], {"role": "assistant", "content": row["answers"][name]}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
            with torch.no_grad():
                scores.append(reward(torch.tensor([ids])).logits.item())
        won.append(float(scores[0] > scores[1]) if row["answers"]["policy"] != row["answers"]["reference"] else 0.5)
        assert row["outcomes"]["policy against reference"] == won[-1]
    assert found.answers.win_rates["reference"].rate.value == pytest.approx(np.mean(won))
    assert found.answers.kl["k3"].value == pytest.approx(np.mean(k3), rel=1e-4)
    assert found.answers.kl["k3"].value > 0
    assert found.answers.ranking is not None
    assert set(found.answers.ranking.strengths) == {"policy", "reference", other}
    before = parts[4].read_bytes()
    parts[4].unlink()
    assert evaluate(trained.run_uri, options) == found
    assert parts[4].read_bytes() == before


def test_an_endpoint_judges(trained: Config, tmp_path: Path) -> None:
    """The server goes down in the middle: the message says what is kept; given again the command asks the rest."""
    with JudgeServer(tmp_path) as server:
        options = {"prompts": 6, "max_new_tokens": 12, "judge": "endpoint", "endpoint": f"{server.url}/v1"}
        sets = [f"evaluation.{key}={value}" for key, value in {**options, "endpoint_model": "judge"}.items()]
        command = ["evaluate", trained.run_uri, *(part for each in sets for part in ("--set", each))]
        summary = Path(trained.run_uri, "evaluation", "summary.json")
        summary.unlink(missing_ok=True)
        limited = CliRunner().invoke(app, [*command, "--set", "evaluation.max_requests=3"])
        assert isinstance(limited.exception, JudgeError)
        assert len(server.seen()) == 3
        # What was found before the judge was asked is there.
        assert json.loads(summary.read_text())["held_out"]["pairs"]
        assert json.loads(summary.read_text())["answers"] is None
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 0, (shown.output, shown.exception)
        assert "length-controlled" in shown.output
        seen = len(server.seen())
        assert seen <= 12
        found = evaluate(trained.run_uri, sets).answers
        assert len(server.seen()) == seen
        assert len(list(Path(trained.store_uri, "judgements").iterdir())) == seen
        # Another judge that fails takes nothing away.
        with pytest.raises(JudgeError):
            evaluate(trained.run_uri, [*sets, "evaluation.endpoint_model=other", "evaluation.max_requests=1"])
    assert found is not None
    rate = found.win_rates["reference"]
    assert rate.wins + rate.ties + rate.losses == 6
    assert json.loads(summary.read_text())["answers"]["win_rates"]["reference"]["ties"] == rate.ties


@pytest.mark.faults  # Not for what fails: the harness is large and takes half a minute to start.
def test_benchmarks_before_and_after(trained: Config, tmp_path: Path) -> None:
    """Accuracy of a task of one's own: how often transformers find the right continuation the likelier one."""
    pytest.importorskip("lm_eval", reason="needs the extra `lm-eval`")
    rows = [
        {"question": f"{at} and {at}", "choices": [f" is {2 * at}", f" or {at + 3}"], "answer": at % 2}
        for at in range(8)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    arguments = ["--tasks", "sums", "--include_path", str(tmp_path)]
    options = [*ALONE, f"evaluation.lm_eval={json.dumps(arguments)}"]
    found = evaluate(trained.run_uri, options)
    tokenizer = AutoTokenizer.from_pretrained(trained.model.path)
    for name, path in (("policy", open_run(trained.run_uri).export_uri), ("reference", trained.model.path)):
        model, right = AutoModelForCausalLM.from_pretrained(path).eval(), []
        for row in rows:
            prompt = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            logps = []
            for choice in row["choices"]:
                answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
                ids = torch.tensor([prompt + answer])
                with torch.no_grad():
                    of_all = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
                logps.append(float(of_all[-len(answer) :].sum()))
            right.append(int(np.argmax(logps)) == row["answer"])
        each = found.benchmarks["sums acc"][name]
        assert each.value == pytest.approx(np.mean(right))
        # The harness' standard error is that of a mean of 8.
        assert each.high - each.value == pytest.approx(
            1.959964 * np.std(right, ddof=1) / np.sqrt(8), rel=1e-5, abs=1e-9
        )
        assert each.num == 8


@pytest.mark.faults
def test_what_the_harness_said_when_it_failed(trained: Config) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `lm-eval`")
    with pytest.raises(
        ConfigError, match=r"evaluation.lm_eval: the command failed for (policy|reference), .*:\n(.|\n)*nowhere"
    ):
        evaluate(trained.run_uri, [*ALONE, 'evaluation.lm_eval=["--tasks", "nowhere"]'])
