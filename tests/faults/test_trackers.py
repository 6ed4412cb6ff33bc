"""A tracker of one's own in a real run: it stops it, and what it raises ends it."""

import json
import sys
from pathlib import Path

import pytest
from helpers import dpo_ray_command, read_lines, steps_of, tiny_config, write_pairs

from dpo_ray.config import to_yaml

pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

OWN = """
from dpo_ray.errors import StopTraining
from dpo_ray.training.trackers import Tracker

class Once(Tracker):
    def checkpoint(self, step, uri):
        raise StopTraining(f"enough after {step}")

class Broken(Tracker):
    def log(self, points):
        assert points[0].step < 3, "three"
"""


def test_a_run_that_its_tracker_stops_and_one_that_it_breaks(tmp_path: Path, tiny_model: Path) -> None:
    """Stopped within about a second of step 5's checkpoint, and at its end after the last step without the tracker."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60)
    train = {"max_steps": 2000, "epochs": 1000, "eval_every_steps": None}
    own = {"tracking": {"trackers": ["mine:Once"]}, "scaling": {"workers": 2}}
    config = tiny_config(str(tmp_path), "run", tiny_model, pairs, train=train, **own)
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command, run = ["train", str(tmp_path / "run.yaml")], Path(config.run_uri)
    path = {"PYTHONPATH": ":".join([str(tmp_path), *sys.path])}
    stopped = dpo_ray_command(*command, **path)
    assert stopped.returncode == 1, stopped.stderr
    assert "was stopped: mine:Once: enough after 5; its newest checkpoint is of step" in stopped.stderr
    last = steps_of(run)[-1]["step"]
    assert 5 <= last < 2000
    assert (run / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "stopped"

    broken = dpo_ray_command(*command, "--set", "tracking.trackers=[mine:Broken]", **path)
    assert broken.returncode == 2
    assert f"error: tracking.trackers: mine:Broken has failed ({tmp_path}/mine.py, line 11)" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert len(read_lines(run / "attempts.jsonl")) == 2, "it was not tried again"

    ended = dpo_ray_command(*command, "--set", "tracking.trackers=[]", "--set", f"train.max_steps={last + 4}", **path)
    assert ended.returncode == 0, ended.stderr
    assert steps_of(run)[-1]["step"] == last + 4
