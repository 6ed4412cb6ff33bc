"""The runs of a sweep, from a file and lists of values."""

from pathlib import Path

import pytest
from helpers import tiny_config

from dpo_ray.config import to_yaml
from dpo_ray.errors import ConfigError, NonFiniteLossError
from dpo_ray.orchestration import sweep as sweeping
from dpo_ray.orchestration.sweep import Outcome, points
from dpo_ray.orchestration.trainer import Result


@pytest.fixture
def file(tmp_path: Path) -> str:
    config = tiny_config(str(tmp_path), "run", tmp_path / "model", "pairs.jsonl")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return str(tmp_path / "run.yaml")


def test_all_combinations_have_names_and_settings(file: str) -> None:
    grid = ["optimizer.learning_rate=[1e-6, 2.5e-5]", "objective.loss=[sigmoid, {hinge: 0.5, sft: 1}]"]
    found = points(file, grid, ["seed=7"])
    assert [point.config.name for point in found] == [
        "run-learning_rate-1e_6-loss-sigmoid",
        "run-learning_rate-1e_6-loss-hinge_0.5_sft_1",
        "run-learning_rate-2.5e-05-loss-sigmoid".replace("e-05", "e_05"),
        "run-learning_rate-2.5e_05-loss-hinge_0.5_sft_1",
    ]
    assert [point.config.optimizer.learning_rate for point in found] == [1e-6, 1e-6, 2.5e-5, 2.5e-5]
    assert found[1].config.objective.shares == {"hinge": 0.5, "sft": 1.0}
    assert {point.config.seed for point in found} == {7}


def test_keys_that_end_alike_are_told_apart(file: str) -> None:
    (point,) = points(file, ["model.path=[a]", "reference.path=[b]"])
    assert point.config.name == "run-model.path-a-reference.path-b"


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (["objective.beta"], r"write section\.key=\[value, value, \.\.\.\]"),
        (["objective.beta=0.1"], r"write section\.key=\[value, value, \.\.\.\]"),
        (["objective.beta=[]"], r"write section\.key=\[value, value, \.\.\.\]"),
        (["objective.beta=[0.1", "seed=[1]"], r"write section\.key"),
        (["seed=[1]", "seed=[2]"], "names seed twice"),
        (["name=[a, b]"], "gets a name by its settings"),
        (["objective.beta=[0.1, -1]"], r"objective\.beta"),
        (["objective.bta=[0.1]"], "did you mean objective.beta"),
        (["seed=[1, 1]"], "two combinations would both be called run-seed-1"),
    ],
)
def test_what_is_no_grid(file: str, grid: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        points(file, grid)


def test_a_start_of_each_run_is_refused(file: str) -> None:
    with pytest.raises(ConfigError, match=r"run `dpo-ray sft` once, set model\.path to .*run-sft/export"):
        points(file, ["seed=[1]"], ["sft.epochs=1"])


def test_a_run_that_fails_by_its_settings_stops_no_other(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first diverges, the second ends; log-ratios are rewards over beta."""
    found = points(file, ["objective.beta=[0.5, 0.1]"])
    ended = Result("uri", "export", 3, {"loss": 0.4, "rewards/margins": 0.3}, {"eval_rewards/margins": 0.2}, {})

    def train(config: object, _: object) -> Result:
        if config == found[0].config:
            raise NonFiniteLossError("loss is nan\nand more")
        return ended

    monkeypatch.setattr(sweeping, "train", train)
    monkeypatch.setattr(sweeping, "finished_run", lambda _: ended)
    outcomes = list(sweeping.sweep(found))
    assert [outcome.error for outcome in outcomes] == ["loss is nan", None]
    assert outcomes[0].log_ratios("margins") is None
    assert outcomes[1].log_ratios("margins") == pytest.approx(0.2 / 0.1)
    assert Outcome(found[1], None).metrics == {}
