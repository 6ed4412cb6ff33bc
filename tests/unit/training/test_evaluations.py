"""Evaluations beside training, by the files of a run: what waits, whose numbers count, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import read_lines, tiny_config

from dpo_ray import storage
from dpo_ray.config import Config, TrainConfig
from dpo_ray.errors import ConfigError
from dpo_ray.training import attempts, evaluations, manifest
from dpo_ray.training.evaluations import Made
from dpo_ray.training.manifest import Manifest, checkpoint_name, commit, committed, prune
from dpo_ray.training.record import Recorder
from dpo_ray.types import Attempt, TrainState

TOTAL = 25


def run_of(folder: Path, **train: Any) -> Config:
    """Evaluations beside training every ten of 25 steps."""
    options = {"max_steps": TOTAL, "eval_every_steps": 10, "eval_place": "actors", **train}
    return tiny_config(str(folder), "run", "model", "pairs.jsonl", train=options, tracking={"trackers": []})


def write(run_uri: str, step: int, attempt: int) -> None:
    commit(run_uri, Manifest(TrainState(step), attempt, 1, {}), lambda: None)


def line(step: int, loss: float = 0.5) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss}


def recorder(config: Config, attempt: Attempt, heard: list[dict[str, Any]]) -> Recorder:
    return Recorder(
        config,
        SimpleNamespace(attempt=attempt, publish=heard.append, fence=lambda: None, group=1, total_steps=TOTAL),
    )


def recorded(config: Config) -> list[dict[str, Any]]:
    return read_lines(Path(config.run_uri, "metrics.jsonl"))


def test_when_it_is_due() -> None:
    """Every ten steps, and at the end, which is no tenth."""
    config = TrainConfig(eval_every_steps=10)
    assert [step for step in range(1, TOTAL + 1) if evaluations.is_due(config, step, TOTAL)] == [10, 20, 25]
    assert not any(evaluations.is_due(TrainConfig(), step, TOTAL) for step in range(1, TOTAL + 1))


def test_what_waits(tmp_path: Path) -> None:
    """Checkpoints of due steps, oldest first, without an evaluation of the same attempt's weights."""
    config = run_of(tmp_path)
    for step, attempt in ((5, 0), (10, 0), (20, 1), (25, 1)):
        write(config.run_uri, step, attempt)

    def waiting() -> list[Made]:
        return evaluations.waiting(config.run_uri, config.train, TOTAL)

    assert waiting() == [Made(10, 0), Made(20, 1), Made(25, 1)]
    evaluations.put(config.run_uri, Made(10, 0), line(10))
    # Of the weights that an attempt before had made of the same steps.
    evaluations.put(config.run_uri, Made(20, 0), line(20))
    assert waiting() == [Made(20, 1), Made(25, 1)]
    # A manifest that cannot be read is told of; a copy that somebody made is no checkpoint.
    for name in (checkpoint_name(20), f"{checkpoint_name(25)}-best"):
        place = Path(config.run_uri, "checkpoints", name, "manifest.json")
        place.parent.mkdir(exist_ok=True)
        place.write_text("{")
    told = list[str]()
    found = evaluations.waiting(config.run_uri, config.train, TOTAL, lambda name, why: told.append(name))
    assert (found, told) == ([Made(25, 1)], [checkpoint_name(20)])
    manifest.set_aside(config.run_uri, checkpoint_name(20), "damaged")
    assert waiting() == [Made(25, 1)]
    assert evaluations.there(config.run_uri) == [Made(10, 0), Made(20, 0)]


@pytest.mark.parametrize(
    ("positions", "makers"),
    [
        ([0], {1: 0, 10: 0}),
        ([0, 10, 20], {10: 0, 11: 1, 20: 1, 21: 2}),
        # The checkpoint of step 20 was damaged: steps 11 to 20 were done again.
        ([0, 10, 20, 10], {10: 0, 11: 3, 20: 3, 21: 3}),
        ([0, 10, 20, 0], {1: 3, 10: 3, 30: 3}),
    ],
)
def test_who_made_a_step(positions: Sequence[int], makers: dict[int, int]) -> None:
    past = [Attempt(number, 1, position, None, 1, "", "") for number, position in enumerate(positions)]
    assert {step: evaluations.maker(past, step) for step in makers} == makers


def test_each_line_once(tmp_path: Path) -> None:
    """What comes is recorded, told, and recorded once over all attempts, but not what was made of steps undone."""
    config, heard = run_of(tmp_path), list[dict[str, Any]]()
    run_uri = config.run_uri
    first = attempts.begin(run_uri, 1, 1, "start")
    with recorder(config, first, heard) as recording:
        recording.line({"step": 10, "loss": 0.7})
        evaluations.put(run_uri, Made(10, 0), line(10))
        recording.line({"step": 11, "loss": 0.6})
        recording.promise(TrainState(11))
        recording.flush()
        assert recorded(config) == heard == [{"step": 10, "loss": 0.7}, {"step": 11, "loss": 0.6}, line(10)]
    write(run_uri, 10, 0)
    write(run_uri, 20, 0)
    evaluations.put(run_uri, Made(20, 0), line(20))
    # Killed before it took it in; then the checkpoint turns out to be damaged.
    manifest.set_aside(run_uri, checkpoint_name(20), "damaged")
    second, heard = attempts.begin(run_uri, 2, 1, "damaged"), []
    assert second.position == 10
    with recorder(config, second, heard) as recording:
        recording.flush()
        assert heard == []
        assert recorded(config) == [{"step": 10, "loss": 0.7}, line(10)]
        evaluations.put(run_uri, Made(20, 1), line(20, 0.25))
    assert heard == [line(20, 0.25)]
    assert recorded(config) == [{"step": 10, "loss": 0.7}, line(10), line(20, 0.25)]


def test_what_is_kept(tmp_path: Path) -> None:
    """A checkpoint that waits, however old; then the best, which the next one's state names; no other."""
    config = run_of(tmp_path, keep_best="eval_loss", keep_checkpoints=1)
    run_uri = config.run_uri

    with recorder(config, attempts.begin(run_uri, 1, 1, "start"), []) as recording:

        def saved(step: int) -> tuple[TrainState, list[int]]:
            state = TrainState(step)
            commit(run_uri, Manifest(state, 0, 1, {}), lambda: recording.promise(state))
            prune(run_uri, 1, 0, needed=recording.needs)
            return state, [manifest.step_of(name) for name in committed(run_uri)]

        assert saved(5)[1] == [5]
        assert saved(10)[1] == [10]
        assert saved(15)[1] == [10, 15]
        assert saved(20)[1] == [10, 20]
        evaluations.put(run_uri, Made(10, 0), line(10, 0.3))
        # It has come, and nobody has looked yet.
        prune(run_uri, 1, 0, needed=recording.needs)
        assert len(committed(run_uri)) == 2
        evaluations.put(run_uri, Made(20, 0), line(20, 0.4))
        state, there = saved(21)
        assert there == [10, 21]
        assert (state.best_metric, state.best_step, state.best_value) == ("eval_loss", 10, 0.3)
    # Another driver knows it from what is recorded.
    with recorder(config, attempts.begin(run_uri, 2, 1, "continue"), []) as recording:
        evaluations.put(run_uri, Made(25, 1), line(25, 0.2))
        state = TrainState(25)
        commit(run_uri, Manifest(state, 1, 1, {}), lambda: recording.promise(state))
        assert (state.best_step, state.best_value) == (25, 0.2)
        assert [recording.needs(step) for step in (10, 20, 25)] == [False, False, True]
    # The best stays where evaluations are due at other steps now.
    often = run_of(tmp_path, keep_best="eval_loss", keep_checkpoints=1, eval_every_steps=7)
    with recorder(often, attempts.begin(run_uri, 3, 1, "continue"), []) as recording:
        recording.flush()
        assert [recording.needs(step) for step in (20, 21, 25)] == [False, True, True]


def test_workers_need_nothing_kept(tmp_path: Path) -> None:
    config = run_of(tmp_path, eval_place="workers")
    evaluations.put(config.run_uri, Made(10, 0), line(10))
    with recorder(config, attempts.begin(config.run_uri, 1, 1, "start"), []) as recording:
        recording.flush()
        assert not recording.needs(10)
    assert storage.read_json_lines(storage.join(config.run_uri, "metrics.jsonl")) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"eval_every_steps": None}}, "train.eval_place is actors, but nothing is ever evaluated: set "),
        (
            {"reference": {"place": "none"}, "objective": {"loss": "sft"}},
            "reference.place: none nothing says what they are to have .*: leave reference.place out, or use ",
        ),
        ({"reference": {"sync_steps": 4}}, "reference.sync_steps: 4 the reference moves on .* use train.eval_place: w"),
    ],
)
def test_what_cannot_be(tmp_path: Path, sections: dict[str, dict[str, Any]], message: str) -> None:
    train = {"eval_place": "actors", **sections.pop("train", {})}
    with pytest.raises(ConfigError, match=message):
        tiny_config(str(tmp_path), "run", "model", "pairs.jsonl", train=train, **sections)
