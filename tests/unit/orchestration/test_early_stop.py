"""When a run of a sweep is behind those before it: medians by hand."""

from pathlib import Path
from typing import Any

import pytest
from run_folders import make_run

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.early_stop import Race, check_metric, is_behind, read_stopped, write_stopped
from dpo_ray.orchestration.stop import Stop

# Means of the second and third evaluation: 0.65, 0.75, 0.55; their median is 0.65.
OTHERS = [{10: 0.1, 20: 0.6, 30: 0.7}, {10: 0.1, 20: 0.7, 30: 0.8}, {10: 0.9, 20: 0.5, 30: 0.6}]


@pytest.mark.parametrize(
    ("own", "behind"),
    [
        ({10: 0.5, 20: 0.5, 30: 0.64}, True),
        ({10: 0.5, 20: 0.5, 30: 0.65}, False),
        # Its best counts, though it has got worse.
        ({10: 0.5, 20: 0.66, 30: 0.1}, False),
        # After step 20 the median is 0.6.
        ({10: 0.5, 20: 0.59}, True),
        ({10: 0.5, 20: 0.61}, False),
        # A first evaluation says too little.
        ({10: 0.0}, False),
        # None of the others came so far.
        ({10: 0.0, 20: 0.0, 40: 0.0}, False),
    ],
)
def test_the_median_rule(own: dict[int, float], behind: bool) -> None:
    assert is_behind("eval_rewards/accuracies", own, OTHERS) is behind
    mirrored = [{step: -value for step, value in each.items()} for each in (own, *OTHERS)]
    assert is_behind("eval_loss", mirrored[0], mirrored[1:]) is behind
    assert not is_behind("eval_rewards/accuracies", own, OTHERS[:2])


def config(folder: Path, name: str) -> Config:
    own: dict[str, Any] = {"model": {"path": "model"}, "data": {"train": ["pairs.jsonl"]}}
    return parse_config({"name": name, "storage_path": str(folder), "train": {"max_steps": 40}, **own})


def test_a_race(tmp_path: Path) -> None:
    """Others have margin s / 10 after step s: 1, 2, 3, 4; after step 30 the mean of the last two is 2.5."""
    others = [make_run(tmp_path, name) for name in "abc"]
    race = Race("eval_rewards/margins", config(tmp_path, "late"), others)
    stop = Stop(race.hear)
    lines = [{"step": 10, "eval_rewards/margins": 0.0}, {"step": 20, "eval_rewards/margins": 2.4}, {"warning": "text"}]
    for line in (*lines, {"step": 25, "loss": 0.5}, {"checkpoint": 25}):
        stop.hear(line)
    assert stop.asked is None
    # A worker died: steps are done again, and what was known of them counts once.
    stop.hear(lines[1])
    stop.hear({"step": 30, "eval_rewards/margins": 2.4, "eval_loss": 0.6})
    assert stop.asked == (
        "after step 30 its best eval_rewards/margins so far, 2.4, is worse than the median of the 3 runs before it "
        "that came so far"
    )
    assert race.lost is not None
    assert (race.lost.step, race.lost.metrics["eval_loss"]) == (30, 0.6)
    write_stopped(str(tmp_path / "late"), race.lost)
    assert read_stopped(str(tmp_path / "late")) == race.lost
    assert read_stopped(others[0]) is None


def test_steps_that_are_done_again_are_judged_by_what_was_before_them(tmp_path: Path) -> None:
    """After step 20 the others' median is 2; what the run was like after step 30 is of an attempt that is over."""
    others = [make_run(tmp_path, name) for name in "abc"]
    race = Race("eval_rewards/margins", config(tmp_path, "late"), others)
    for step, margin in ((10, 0.0), (20, 2.4), (30, 2.6), (10, 0.0)):
        assert race.hear({"step": step, "eval_rewards/margins": margin}) is None
    assert (race.hear({"step": 20, "eval_rewards/margins": 0.0}) or "").startswith("after step 20")


def test_what_is_on_record_is_judged_again(tmp_path: Path) -> None:
    """A driver died between evaluation and stop. Losses fall with the margin: log(1 + exp(-s / 10))."""
    others = [make_run(tmp_path, name) for name in "abc"]
    lines = (Path(others[0]) / "metrics.jsonl").read_text().replace('"eval_loss": 0.', '"eval_loss": 1.')
    make_run(tmp_path, "late", steps=20, ended=False)
    (tmp_path / "late" / "metrics.jsonl").write_text(lines)
    race = Race("eval_loss", config(tmp_path, "late"), others)
    assert (race.hear_recorded() or "").startswith("after step 20 its best eval_loss so far, 1.127, is worse")


def test_a_run_that_has_done_its_last_step_is_behind_nobody(tmp_path: Path) -> None:
    others = [make_run(tmp_path, name, total=20, steps=20) for name in ("a", "b", "c", "late")]
    race = Race("eval_rewards/margins", config(tmp_path, "late"), others[:3])
    assert race.hear({"step": 10, "eval_rewards/margins": 0.0}) is None
    assert race.hear({"step": 20, "eval_rewards/margins": 0.0}) is None


@pytest.mark.parametrize(
    ("metric", "keys", "sections", "said"),
    [
        ("accuracy", [], {}, "can be compared by eval_loss, eval_rewards/accuracies, eval_rewards/margins"),
        ("eval_loss", ["seed", "objective.beta"], {}, "a grid over objective.beta it is not the same measure"),
        ("eval_rewards/margins", ["objective.beta"], {}, "use eval_rewards/accuracies"),
        ("eval_loss", ["seed"], {"train": {"max_steps": 4}}, r"set train\.eval_every_steps"),
        ("eval_rewards/margins", ["seed"], {"objective": {"loss": "orpo"}}, "no reference and so no rewards"),
    ],
)
def test_what_runs_cannot_be_compared_by(metric: str, keys: list[str], sections: dict[str, Any], said: str) -> None:
    raw = {"name": "run", "storage_path": "s", "model": {"path": "m"}, "train": {"eval_every_steps": 10}}
    own = parse_config({**raw, "data": {"train": ["p"], "eval_fraction": 0.1}, **sections})
    with pytest.raises(ConfigError, match=said):
        check_metric(metric, keys, [own])
