"""The command line as a user has it."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import dpo_ray_command, tiny_config, write_pairs
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.config import to_yaml

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_help_template_and_schema() -> None:
    def said(*arguments: str) -> str:
        found = CliRunner(env={"COLUMNS": "120"}).invoke(app, arguments)
        assert found.exit_code == 0
        return found.output

    shown = dpo_ray_command("--help").stdout
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f" {name} " in shown
        assert "Example: dpo-ray" in said(name, "--help")
    assert yaml.safe_load(said("config", "--template"))["objective"]["loss"] == "sigmoid"
    assert "properties" in json.loads(said("config", "--schema"))


def test_the_wrong_reference_is_noticed_at_the_first_step(tmp_path: Path, tiny_model: Path) -> None:
    """Another model's scores: the loss could still look right, the gap per answer does not."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(AutoConfig.from_pretrained(tiny_model)).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60)
    config = tiny_config(
        str(tmp_path / "s"),
        "run",
        tiny_model,
        pairs,
        reference={"path": str(tmp_path / "other")},
        train={"max_steps": 2},
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    done = dpo_ray_command("train", str(tmp_path / "c.yaml"))
    assert done.returncode == 2, done.stderr
    assert "first step: policy and reference differ" in done.stderr
    assert "checks.first_step: false" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    # The run's folder says so too.
    ended = json.loads((tmp_path / "s" / "run" / "outcome.json").read_text())
    assert (ended["outcome"], ended["error"]) == ("failed", "FirstStepError")
    assert "first step: policy and reference differ" in (tmp_path / "s" / "run" / "report.html").read_text()


def test_broken_files_and_models(tmp_path: Path, tiny_model: Path) -> None:
    """What breaks inside a task or an actor still ends with one message."""
    import gzip

    text = Path(write_pairs(tmp_path / "pairs.jsonl", 60)).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-200])
    config = tiny_config(str(tmp_path / "s"), "run", tiny_model, str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    done = dpo_ray_command("train", str(tmp_path / "c.yaml"))
    assert done.returncode == 2, done.stderr
    assert "cut.jsonl.gz: cannot read past row" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 2000 if path.suffix == ".safetensors" else None])
    config = tiny_config(
        str(tmp_path / "s"), "run", tiny_model, str(tmp_path / "pairs.jsonl"), reference={"path": str(broken)}
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    done = dpo_ray_command("train", str(tmp_path / "c.yaml"))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "the reference stopped" in done.stderr
    assert "broken: cannot load a causal language model" in done.stderr
