"""`dpo-ray sweep`: runs that share pairs and scores, whatever becomes of the driver."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import steps_of, tiny_config, write_pairs

from dpo_ray.config import to_yaml
from dpo_ray.display import sweep_table
from dpo_ray.orchestration.sweep import as_json, frontiers, points, sweep, write_page
from dpo_ray.orchestration.watch import Watcher

pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(600)]
NUM_PAIRS = 150


class Listener(Watcher):
    """Keeps phases."""

    def __init__(self) -> None:
        self.phases = list[str]()

    def phase(self, name: str) -> None:
        self.phases.append(name)


@pytest.mark.slow
def test_the_driver_is_killed_in_the_second_run(local_ray: None, tmp_path: Path, tiny_model: Path) -> None:
    """Six combinations: each pair is scored once in all, and first steps are as derived: ln 2, or for IPO (1/2 beta)^2.

    An exploding learning rate would be noticed as a failure of its run alone; here none fails.
    """
    data = {"train": [write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS)], "eval_fraction": 0.1, "chunk_pairs": 16}
    train = {"max_steps": None, "epochs": 1, "global_batch_pairs": 24, "eval_every_steps": 10}
    config = tiny_config(str(tmp_path / "s"), "all", tiny_model, data["train"][0], data=data, train=train)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    grid = ["objective.beta=[0.05, 0.1, 0.3]", "objective.loss=[sigmoid, ipo]"]
    found = points(str(tmp_path / "run.yaml"), grid)
    code = "from dpo_ray.cli import main; main()"
    command = [sys.executable, "-c", code, "sweep", str(tmp_path / "run.yaml"), *(f"--grid={each}" for each in grid)]
    with subprocess.Popen(command, start_new_session=True) as driver:
        while not (Path(found[1].config.run_uri) / "metrics.jsonl").exists():
            assert driver.poll() is None
            time.sleep(0.1)
        os.killpg(driver.pid, signal.SIGKILL)
    listener = Listener()
    outcomes = list(sweep(found, listener))
    assert [outcome.error for outcome in outcomes] == [None] * 6
    assert f"{found[0].config.run_uri} is finished: nothing to do" in listener.phases
    for outcome in outcomes:
        beta, loss = outcome.point.values["objective.beta"], outcome.point.values["objective.loss"]
        expected = math.log(2) if loss == "sigmoid" else (1 / (2 * beta)) ** 2
        assert steps_of(Path(outcome.point.config.run_uri))[0]["loss"] == pytest.approx(expected, rel=1e-4)
    filled = [outcome.result.reference for outcome in outcomes if outcome.result is not None]
    assert [int(each["scored_pairs"]) for each in filled] == [NUM_PAIRS, 0, 0, 0, 0, 0]
    assert [row.style for row in sweep_table(outcomes).rows].count("bold") >= 1


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_what_kl_buys_and_a_run_that_is_behind(local_ray: None, tmp_path: Path, tiny_model: Path) -> None:
    """Three learning rates, then one at which nothing moves: it ends early, and is left alone when given again."""
    data = {"train": [write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS)], "eval_fraction": 0.1}
    train = {"max_steps": 120, "epochs": 20, "eval_every_steps": 4, "checkpoint_every_steps": 40}
    own = {"evaluation": {"prompts": 6, "max_new_tokens": 8}}
    config = tiny_config(str(tmp_path / "s"), "run", tiny_model, data["train"][0], data=data, train=train, **own)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    found = points(str(tmp_path / "run.yaml"), ["optimizer.learning_rate=[1e-3, 5e-4, 2e-3, 1e-9]"])
    outcomes = list(sweep(found, evaluated=True, stop_early="eval_rewards/margins"))
    *others, last = outcomes
    assert last.stopped is not None
    # The first evaluation says nothing; the last lines come twice a second.
    assert 8 <= last.stopped.step < 120
    folder = Path(last.point.config.run_uri)
    stopped_at = steps_of(folder)[-1]["step"]
    assert last.stopped.step <= stopped_at < 120
    assert not (folder / "export").exists()
    assert "was stopped: after step 8 its best" in json.loads((folder / "outcome.json").read_text())["message"]
    for outcome in others:
        assert outcome.result is not None
        assert outcome.result.steps == 120
        assert outcome.evaluated is not None
        assert outcome.evaluated.kl.value > 0
        # The same pairs as in training's last evaluation.
        assert outcome.evaluated.accuracy.value == pytest.approx(outcome.metrics["rewards/accuracies"])
        assert outcome.evaluated.margin.value == pytest.approx(outcome.log_ratios("margins"), rel=1e-3)
    assert any(frontiers(outcomes))
    before = (folder / "attempts.jsonl").read_text()
    again = list(sweep(found, evaluated=True, stop_early="eval_rewards/margins"))
    assert as_json(again) == as_json(outcomes)
    assert (folder / "attempts.jsonl").read_text() == before
    page = Path(write_page(found) or "").read_text()
    assert "What KL buys" in page
    assert "■ Stopped" in page
