"""The model card: what it says of a run whose numbers are known, and what the Hub reads of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from run_folders import make_run

from dpo_ray.config import Config, parse_config
from dpo_ray.model.card import model_card, write_card

PAIRS = "hf://datasets/owner/pairs/data/*.parquet"


def run_of(folder: Path, **sections: dict[str, Any]) -> Config:
    """The configuration of a run, whose folder is there."""
    make_run(folder, "card", **sections)
    return parse_config(yaml.safe_load((folder / "card" / "config.yaml").read_text())["config"])


def rows(card: str) -> dict[str, str]:
    """The tables of a card."""
    cells = [line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and " | " in line[2:-2]]
    return {name: value for name, value in cells}


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | int | None]:
    return {"value": value, "low": low, "high": high, "num": 9}


def summary(step: int) -> dict[str, Any]:
    """What `dpo-ray evaluate` leaves."""
    metrics = {"rewards/accuracies": estimate(0.75, 0.6, 0.85), "rewards/margins": estimate(1.25, 1.0, 1.5)}
    rate = {"rate": estimate(0.625, 0.5, 0.75), "length_controlled": estimate(0.6, 0.5, 0.7)}
    answers = {
        "prompts": 16,
        "kl": {"k1": estimate(3.0, 2.0, 4.0), "k3": estimate(2.5, 2.0, 3.0)},
        "win_rates": {"reference": rate, "/models/other": rate},
        "tokens": {"policy": estimate(30.0)},
    }
    held_out = {"pairs": 50, "metrics": metrics}
    benchmarks = {"arc_easy: acc": {"policy": estimate(0.5, 0.25, 0.75), "reference": estimate(0.25)}}
    about = {"step": step, "benchmarks": benchmarks, "warnings": ["look at the answers"]}
    return {**about, "held_out": held_out, "answers": answers}


def test_a_card_before_and_after_an_evaluation(tmp_path: Path) -> None:
    """40 steps of 1 s, 10 s more for the first; margin 4 after the last; then the summary's own numbers."""
    config = run_of(tmp_path, data={"train": {PAIRS: 0.5, "more.jsonl": 2.0}, "eval_fraction": 0.125}, seed=7)
    card = model_card(config, 40)
    assert card == model_card(config, 40)
    found = rows(card)
    assert found["objective"] == "sigmoid, beta 0.1, label smoothing 0"
    assert (found["steps"], found["seed"], found["workers"], found["epochs"]) == ("40", "7", "2", "1")
    assert found["time of all steps"] == f"{50 / 3600:.4g} h"
    assert (found["pairs to train on"], found["rejects"], found["held out"]) == (
        "32",
        "1",
        "0.125 of the pairs, by content",
    )
    assert f"| source | `{PAIRS}`, weight 0.5 |" in card
    assert found["reward margin, nats"] == "4"
    assert "Made with dpo_ray 0.1.0." in card
    assert str(tmp_path) not in card

    place = tmp_path / "card" / "evaluation" / "summary.json"
    place.parent.mkdir()
    place.write_text(json.dumps(summary(30)))
    assert model_card(config, 40) == card, "an evaluation of another step's model"
    place.write_text(json.dumps(summary(40)))
    (tmp_path / "card" / "export").mkdir()
    write_card(config, 40)
    loaded = ModelCard.load(tmp_path / "card" / "export" / "README.md")
    found = rows(loaded.text)
    assert found["accuracy of the implicit reward"] == "0.75 (0.6 to 0.85)"
    assert found["KL to the reference, nats an answer (k3)"] == "2.5 (2 to 3)"
    assert found["win rate against other"] == "0.625 (0.5 to 0.75)"
    assert found["tokens of an answer of policy"] == "30"
    assert found["arc_easy: acc, policy"] == "0.5 (0.25 to 0.75)"
    assert found["arc_easy: acc, reference"] == "0.25"
    assert "**Note:** look at the answers" in loaded.text
    metadata = loaded.data
    assert (metadata.library_name, metadata.datasets, metadata.model_name) == ("transformers", ["owner/pairs"], "card")
    assert [(each.metric_type, each.metric_value) for each in metadata.eval_results] == [
        ("accuracy", 0.75),
        ("reward_margin", 1.25),
    ]


def test_the_settings_of_a_card_make_the_same_run(tmp_path: Path) -> None:
    sections = {"adapter": {"rank": 4, "merge": False}, "optimizer": {"learning_rate": 3e-5, "betas": [0.9, 0.95]}}
    config = run_of(tmp_path, **sections)
    card = model_card(config, 40)
    settings = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert parse_config({**settings, "storage_path": config.storage_path}) == config
    assert settings["optimizer"].keys() == sections["optimizer"].keys()
    assert card.startswith(f"---\nbase_model: {config.model.path}\n")
    assert "library_name: peft" in card


@pytest.mark.parametrize("loss", ["sigmoid", "sft"])
def test_a_card_without_a_folder(loss: str) -> None:
    """What is not on record is left out; a start by likelihood is called so."""
    raw = {"name": "run", "storage_path": "nowhere", "model": {"path": "some/model"}, "data": {"train": ["a|b.jsonl"]}}
    card = model_card(parse_config({**raw, "objective": {"loss": loss}}), 3)
    assert ("by the likelihood of the chosen answers" in card) == (loss == "sft")
    assert ("| reference | the start" in card) == (loss != "sft")
    assert "/a\\|b.jsonl` |" in card
    assert "## Results" not in card
    assert "model-index" not in card


def test_an_evaluation_of_fewer_steps_is_not_given_for_the_model_s(tmp_path: Path) -> None:
    """The last one of training is after step 40; the text says so, and what the Hub reads has none."""
    config = run_of(tmp_path, data={"train": ["hf://datasets/owner/pairs@0123/a.parquet"]})
    assert ModelCard(model_card(config, 40)).data.eval_results
    card = ModelCard(model_card(config, 45))
    assert card.data.eval_results is None
    assert "after step 40:" in card.text
    assert card.data.datasets == ["owner/pairs"]


def test_exports_are_told_apart(tmp_path: Path) -> None:
    config, found = run_of(tmp_path), summary(40)
    (rate,) = {id(each): each for each in found["answers"]["win_rates"].values()}.values()
    found["answers"]["win_rates"] = {"runs/a/export": rate, "runs/b/export/": rate, "export": rate}
    (tmp_path / "card" / "evaluation").mkdir()
    (tmp_path / "card" / "evaluation" / "summary.json").write_text(json.dumps(found))
    names = [name for name in rows(model_card(config, 40)) if name.startswith("win rate")]
    assert names == ["win rate against a/export", "win rate against b/export", "win rate against /export"]
