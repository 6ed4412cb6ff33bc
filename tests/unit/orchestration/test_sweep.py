"""The runs of a sweep, from a file and lists of values."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config
from run_folders import make_run

from dpo_ray.config import to_yaml
from dpo_ray.display import sweep_table
from dpo_ray.errors import ConfigError, JudgeError, NonFiniteLossError, StoppedError
from dpo_ray.evaluation.judge import EndpointJudge
from dpo_ray.orchestration import sweep as sweeping
from dpo_ray.orchestration.early_stop import Behind
from dpo_ray.orchestration.stop import Stop
from dpo_ray.orchestration.sweep import Outcome, as_json, frontiers, points, sweep, write_page
from dpo_ray.orchestration.trainer import Result
from dpo_ray.report.charts import Interval
from dpo_ray.report.facts import Evaluated

RESULT = Result("uri", "export", 3, {"loss": 0.4}, {}, {})


@pytest.fixture
def file(tmp_path: Path) -> str:
    config = tiny_config(str(tmp_path), "run", tmp_path / "model", "pairs.jsonl")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return str(tmp_path / "run.yaml")


@pytest.fixture(params=[[], [15]], ids=["asked", "signal"])
def signals(request: pytest.FixtureRequest) -> list[int]:
    return list(request.param)


def test_all_combinations_have_names_and_settings(file: str) -> None:
    grid = ["optimizer.learning_rate=[1e-6, 2.5e-5]", "objective.loss=[sigmoid, {hinge: 0.5, sft: 1}]"]
    found = points(file, grid, ["seed=7"])
    assert [point.config.name for point in found] == [
        "run-learning_rate-1e_06-loss-sigmoid",
        "run-learning_rate-1e_06-loss-hinge_0.5_sft_1",
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
        (["objective.beta=[2026-01-01]"], r"write section\.key=\[value, value, \.\.\.\]"),
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


def test_models_are_evaluated_alike_by_one_judge(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it may cost is the command's. It fails for the first run, and the second is evaluated."""
    options = ["data.eval_fraction=0.1", "evaluation.judge=endpoint", "evaluation.endpoint=http://127.0.0.1:9/v1"]
    options.append("evaluation.endpoint_model=judge")
    with pytest.raises(ConfigError, match="with --evaluate all runs are evaluated alike: leave keys of evaluation out"):
        list(sweep(points(file, ["evaluation.max_requests=[1, 2]"], options), evaluated=True))
    judges = list[object]()

    def evaluate(uri: str, overrides: object, watcher: object, judge: object) -> object:
        judges.append(judge)
        if len(judges) == 1:
            raise JudgeError("it does not answer: 2 of 40 replies are there\nand kept")
        return None

    monkeypatch.setattr(sweeping, "finished_run", lambda *_: RESULT)
    monkeypatch.setattr(sweeping, "train", lambda *_: RESULT)
    monkeypatch.setattr(sweeping.evaluate_job, "evaluate", evaluate)
    monkeypatch.setattr(sweeping.evaluate_job, "as_json", lambda _: {})
    first, second = sweep(points(file, ["seed=[1, 2]"], options), evaluated=True)
    assert first.error == "not evaluated: it does not answer: 2 of 40 replies are there"
    assert (first.result, second.result, second.error) == (RESULT, RESULT, None)
    assert judges[0] is judges[1]
    assert isinstance(judges[0], EndpointJudge)


def test_a_start_of_each_run_is_refused(file: str) -> None:
    with pytest.raises(ConfigError, match=r"run `dpo-ray sft` once, set model\.path to .*run-sft/export"):
        points(file, ["seed=[1]"], ["sft.epochs=1"])


def test_a_run_that_fails_by_its_settings_stops_no_other(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first diverges, the second ends; log-ratios are rewards over beta."""
    found = points(file, ["objective.beta=[0.5, 0.1]"])
    ended = Result("uri", "export", 3, {"loss": 0.4, "rewards/margins": 0.3}, {"eval_rewards/margins": 0.2}, {})

    def train(config: object, *_: object) -> Result:
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


def test_a_run_that_is_behind_is_stopped_once(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: list[int]
) -> None:
    """Three runs of margins s / 10; the fourth stays at 0, and at its second evaluation the median is 2.

    Given again, it is not trained on; without --stop-early it is. A signal ends the whole sweep.
    """
    found = points(file, ["seed=[1, 2, 3, 4]"])
    for point in found[:3]:
        make_run(tmp_path, point.config.name)
    trained = list[str]()

    def train(config: Any, watcher: object, stop: Stop | None) -> Result:
        trained.append(config.name)
        for step in (10, 20) if stop is not None and config == found[3].config else ():
            stop.hear({"step": step, "eval_rewards/margins": 0.0, "eval_loss": 0.7})
        if stop is not None and stop.asked:
            raise StoppedError(stop.asked, *signals)
        return Result("uri", "export", 3, {"loss": 0.4}, {"eval_loss": 0.2}, {})

    monkeypatch.setattr(sweeping, "train", train)
    monkeypatch.setattr(sweeping, "start_ray", lambda config: None)
    if signals:
        with pytest.raises(StoppedError):
            list(sweep(found, stop_early="eval_rewards/margins"))
        return
    for _ in range(2):
        outcomes = list(sweep(found, stop_early="eval_rewards/margins"))
        *others, last = as_json(outcomes)
        assert [each["stopped"] for each in others] == [None] * 3
        assert (last["stopped"]["step"], last["metrics"]["loss"], last["error"]) == (20, 0.7, None)
        assert "after step 20" in last["stopped"]["reason"]
        assert [column.header for column in sweep_table(outcomes).columns][-1] == "stopped"
    assert trained.count("run-seed-4") == 1
    assert list(sweep(found))[3].result is not None
    assert trained.count("run-seed-4") == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.eval_fraction=0", "train.eval_every_steps=null"], "nothing is held out"),
        (["adapter.rank=4", "adapter.merge=false"], "set adapter.merge: true"),
        (["evaluation.prompts=0"], r"set evaluation\.prompts above 0"),
        (["evaluation.temperature=0.7"], r"evaluation\.temperature and evaluation\.top_p to 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(file: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        next(sweep(points(file, ["seed=[1]"], overrides), evaluated=True))


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def test_the_frontier(file: str) -> None:
    """By accuracy the second beats the third, which has the larger margin; the first is nearest to the reference."""
    found = points(file, ["seed=[1, 2, 3, 4, 5]"])
    ended = Result("uri", "export", 3, {"loss": 0.4, "rewards/margins": 0.3, "rewards/accuracies": 0.5}, {}, {})
    numbers = [(1.0, 0.6, 1.0), (2.0, 0.7, 3.0), (3.0, 0.65, 4.0), (3.5, 0.7, 2.0)]
    outcomes = [
        *(
            Outcome(point, ended, evaluated=Evaluated(*map(exactly, each)))
            for point, each in zip(found, numbers, strict=False)
        ),
        Outcome(found[4], None, stopped=Behind(20, "too slow", {"eval_loss": 0.7})),
    ]
    both = ["accuracy", "margin"]
    assert frontiers(outcomes) == [both, both, ["margin"], [], []]
    plain = as_json(outcomes)
    assert plain[2]["evaluated"]["kl"] == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert json.loads(json.dumps(plain))[4]["stopped"] == {
        "step": 20,
        "reason": "too slow",
        "metrics": {"eval_loss": 0.7},
    }
    table = sweep_table(outcomes)
    cells = {column.header: [str(cell) for cell in column.cells] for column in table.columns}
    assert cells["KL to the reference"] == ["1 (1 to 1)", "2 (2 to 2)", "3 (3 to 3)", "3.5 (3.5 to 3.5)", ""]
    assert cells["frontier"] == ["accuracy, margin", "accuracy, margin", "margin", "", ""]
    assert cells["stopped"] == ["", "", "", "", "too slow"]


def test_the_page_of_a_sweep(file: str, tmp_path: Path) -> None:
    found = points(file, ["seed=[1, 2]"])
    for point in found:
        make_run(tmp_path, point.config.name)
    assert write_page(found) == f"{tmp_path}/run-sweep.html"
    assert "2 runs compared" in (tmp_path / "run-sweep.html").read_text()
    assert write_page(found[:1]) is None
