"""Trackers: what they are given, and that training never waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import tiny_config

from dpo_ray.config import TRACKER_NAMES, Config
from dpo_ray.errors import ConfigError, TrackerError
from dpo_ray.training import trackers
from dpo_ray.training.record import Recorder
from dpo_ray.training.trackers import TRACKERS, Background, Point, TrackedRun, Tracker, check_trackers
from dpo_ray.types import Attempt

BRISK_S = 1.0
READY_S = 60.0


def configured(folder: Path, *names: str, **sections: dict[str, Any]) -> Config:
    """A run that is tracked by `names`."""
    tracking = {"trackers": list(names)}
    if {"wandb", "mlflow"} & set(names):
        tracking["project"] = "a project"
    return tiny_config(str(folder), "my-run", Path("model"), "pairs.jsonl", tracking=tracking, **sections)


def recorder(config: Config, position: int = 0, heard: list[dict[str, Any]] | None = None) -> Recorder:
    """The recorder of a start of the worker group."""
    attempt = Attempt(int(position > 0), 1, position, None, 1, "test", "now")
    publish = (lambda line: None) if heard is None else heard.append
    about = SimpleNamespace(attempt=attempt, publish=publish, fence=lambda: None, group=1, total_steps=8)
    return Recorder(config, about)


def line(step: int) -> dict[str, Any]:
    """A line of metrics: `loss` is 1 / step, exact in float32 for powers of two."""
    return {"step": step, "loss": 1 / step, "rewards/margins": float(step)}


def break_after(recording: Recorder, lines: Sequence[dict[str, Any]]) -> None:
    """A start of the worker group that ends in an error."""
    with recording:
        for each in lines:
            recording.line(each)
        raise RuntimeError("broken")


def warnings_of(heard: list[dict[str, Any]]) -> list[str]:
    return [line["warning"] for line in heard if "warning" in line]


def wait_until(holds: Callable[[], bool], limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


class Scripted(Tracker):
    """A tracker that does what a test says: waits for `gate`, and raises while `up` is false."""

    run_id = ""

    def __init__(self) -> None:
        self.gate, self.up = threading.Event(), True
        self.gate.set()
        self.calls = 0
        self.steps: list[int] = []
        self.checkpoints: list[tuple[int, int]] = []
        self.finished: list[tuple[dict[str, str], bool]] = []

    def log(self, points: Sequence[Point]) -> None:
        self._answer()
        self.steps += [point.step for point in points]

    def checkpoint(self, step: int, uri: str) -> None:
        self._answer()
        assert uri.endswith(f"/checkpoints/step-{step:08d}")
        self.checkpoints.append((step, len(self.steps)))

    def finish(self, links: Mapping[str, str], failed: bool) -> None:
        self._answer()
        self.finished.append((dict(links), failed))

    def _answer(self) -> None:
        self.calls += 1
        self.gate.wait()
        if not self.up:
            raise ConnectionError("nobody there")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for the end on a busy machine too, for tests that read back what arrived."""
    monkeypatch.setattr(trackers, "FINISH_WAIT_S", 90.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again after hundredths of a second, and ends within half a second."""
    monkeypatch.setattr(trackers, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(trackers, "RETRY_MOST_S", 0.05)
    monkeypatch.setattr(trackers, "FINISH_WAIT_S", 0.5)


def points(first: int, last: int) -> list[Point]:
    return [Point.of(line(step)) for step in range(first, last + 1)]


def test_the_configuration_knows_every_tracker(tmp_path: Path) -> None:
    assert configured(tmp_path, *TRACKERS).tracking.trackers == list(TRACKERS)
    assert tuple(TRACKERS) == TRACKER_NAMES
    with pytest.raises(ConfigError, match="tracking.trackers names 'comet': write tensorboard, .*, or module:name of"):
        configured(tmp_path, "comet")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = configured(tmp_path, "tensorboard", name)
    for refuse in (check_trackers, recorder):
        with pytest.raises(ConfigError) as caught:
            refuse(config)
        for part in ("tracking.trackers", f"package {name}", f"pip install 'dpo_ray[{name}]'"):
            assert part in str(caught.value)
    check_trackers(configured(tmp_path, "tensorboard"))


def test_a_point_holds_finite_numbers_only() -> None:
    given = {"step": 3, "loss": 0.5, "num_tokens": 7, "a": float("nan"), "b": float("inf"), "c": "text", "d": None}
    assert Point.of(given).step == 3
    assert Point.of(given).values == {"loss": 0.5, "num_tokens": 7}


def test_tensorboard_has_every_line_after_a_flush(tmp_path: Path) -> None:
    """A second start at step 2 drops what the first wrote of steps 3 and 4: 1, 2 of the first, 3, 4 of the second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured(tmp_path, "tensorboard")
    with recorder(config) as first:
        for step in (1, 2, 3, 4):
            first.line(line(step))
        first.flush()
    time.sleep(1.1)  # Event files are ordered by the second of their creation.
    with recorder(config, position=2) as second:
        for step in (3, 4):
            second.line({**line(step), "loss": 10.0 * step})
        second.line({"step": 4, "eval_loss": 0.25})
        second.flush()
    events = EventAccumulator(str(tmp_path / "my-run" / "tensorboard")).Reload()
    assert {(event.step, event.value) for event in events.Scalars("loss")} == {(1, 1.0), (2, 0.5), (3, 30), (4, 40)}
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(4, 0.25)]


def test_everything_arrives_in_order_then_the_end(patient: None) -> None:
    """250 points are three batches of at most 100; the end is the fourth call."""
    tracker, heard = Scripted(), list[str]()
    tracker.gate.clear()
    background = Background("it", tracker, heard.append)
    background.log(points(1, 100))
    wait_until(lambda: tracker.calls == 1)
    background.log(points(101, 250))
    tracker.gate.set()
    background.finish({"run": "there"}, False)
    assert tracker.steps == list(range(1, 251))
    assert tracker.finished == [({"run": "there"}, False)]
    assert tracker.calls == 4
    assert heard == []


def test_checkpoints_arrive_between_the_points(patient: None) -> None:
    """After the first and the third of four points, though the tracker was down at first."""
    tracker, heard = Scripted(), list[str]()
    tracker.gate.clear()
    tracker.up = False
    background = Background("it", tracker, heard.append)
    for step in range(1, 5):
        background.log(points(step, step))
        if step in (1, 3):
            background.checkpoint(step, f"run/checkpoints/step-{step:08d}")
    tracker.gate.set()
    wait_until(lambda: bool(heard))
    tracker.up = True
    background.finish({}, False)
    assert (tracker.steps, tracker.checkpoints) == ([1, 2, 3, 4], [(1, 1), (3, 3)])


def test_a_tracker_that_is_down_is_tried_again_and_warned_of_once(quick: None) -> None:
    tracker, heard = Scripted(), list[str]()
    tracker.up = False
    background = Background("it", tracker, heard.append)
    background.log(points(1, 3))
    wait_until(lambda: tracker.calls >= 4)
    background.log(points(4, 5))
    tracker.up = True
    wait_until(lambda: len(tracker.steps) == 5)
    background.finish({}, True)
    assert tracker.steps == [1, 2, 3, 4, 5]
    assert tracker.finished == [({}, True)]
    assert heard == ["it is down, training goes on: nobody there"]


def test_a_tracker_that_is_down_at_the_end_is_given_up(quick: None) -> None:
    tracker, heard = Scripted(), list[str]()
    tracker.up = False
    background = Background("it", tracker, heard.append)
    background.log(points(1, 1))
    wait_until(lambda: bool(heard))
    background.finish({}, False)
    wait_until(lambda: len(heard) == 2)
    assert "did not take the end" in heard[1]
    assert not background._thread.is_alive()


def test_nothing_waits_for_a_tracker_that_hangs(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 + 30 points one is in the hanging call; the queue keeps the newest 10 of 30, so 20 are lost."""
    monkeypatch.setattr(trackers, "QUEUE_POINTS", 10)
    tracker, heard = Scripted(), list[str]()
    tracker.gate.clear()
    background = Background("it", tracker, heard.append)
    background.log(points(1, 1))
    wait_until(lambda: tracker.calls == 1)
    began = time.monotonic()
    for step in range(2, 32):
        background.log(points(step, step))
    background.flush()
    assert time.monotonic() - began < BRISK_S
    began = time.monotonic()
    background.finish({}, False)
    assert 0.5 <= time.monotonic() - began < 0.5 + BRISK_S
    assert len(heard) == 1
    assert "within" in heard[0]
    tracker.gate.set()
    wait_until(lambda: bool(tracker.finished))
    assert tracker.steps == [1, *range(22, 32)]
    assert "lacks 20 lines" in heard[1]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Scripted]:
    """What recorders open under the name `tensorboard`."""
    opened: list[Scripted] = []

    class Opened(Scripted):
        def __init__(self, run: TrackedRun) -> None:
            super().__init__()
            self.run_id = run.run_id
            opened.append(self)

    monkeypatch.setitem(TRACKERS, "tensorboard", Opened)
    return opened


def test_an_error_of_the_loop_marks_the_run_failed(scripted: list[Scripted], tmp_path: Path) -> None:
    config = configured(tmp_path, "tensorboard")
    with pytest.raises(RuntimeError, match="broken"):
        break_after(recorder(config), [line(1)])
    run = str(tmp_path / "my-run")
    assert scripted[0].finished == [({"run": run}, True)]
    with recorder(config):
        pass
    assert scripted[1].finished == [({"run": run, "export": f"{run}/export", "report": f"{run}/report.html"}, False)]


def test_the_id_lies_in_the_run_directory(scripted: list[Scripted], tmp_path: Path) -> None:
    for folder in ("one", "one", "two"):
        with recorder(configured(tmp_path / folder, "tensorboard")):
            pass
    assert scripted[0].run_id == scripted[1].run_id != scripted[2].run_id


# --- The user's own --------------------------------------------------------------------------------------------------

OWN = """
from dpo_ray.errors import StopTraining
from dpo_ray.training.trackers import Tracker

class Mine(Tracker):
    heard = []

    def log(self, points):
        for point in points:
            self.heard.append((point.step, sorted(point.values)))
            if point.values.get("loss") == 0.5:
                raise StopTraining("low enough")
            if point.values.get("loss") == 0.25:
                raise ValueError("much\\ntoo low")

    def checkpoint(self, step, uri):
        self.heard.append((step, uri.rpartition("/")[2]))

    def finish(self, links, failed):
        self.heard.append((sorted(links), failed))
        if failed:
            raise KeyError("again")

class Unmade(Tracker):
    def __init__(self, run):
        raise OSError(run.config.name)

class Served(Mine):
    background = True

NEITHER = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of one's own."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_tracker_of_ones_own_sees_all_and_may_stop_the_run(own: str, tmp_path: Path) -> None:
    """A checkpoint of step 1 comes before the next line; of two commits at the end the last comes before the end."""
    heard: list[dict[str, Any]] = []
    with recorder(configured(tmp_path, f"{own}:Mine"), heard=heard) as recording:
        recording.line(line(1))
        recording.committed({"checkpoint": 1})
        recording.line({"step": 1, "eval_loss": 0.7})
        recording.line(line(2))
        recording.committed({"checkpoint": 2})
    values = ["loss", "rewards/margins"]
    assert sys.modules[own].Mine.heard == [
        (1, values),
        (1, "step-00000001"),
        (1, ["eval_loss"]),
        (2, values),
        (2, "step-00000002"),
        (["export", "report", "run"], False),
    ]
    assert [each for each in heard if "stop" in each] == [{"stop": f"{own}:Mine: low enough"}]
    assert [each["checkpoint"] for each in heard if "checkpoint" in each] == [1, 2]


def test_what_it_raises_ends_the_run_with_its_name(own: str, tmp_path: Path) -> None:
    """Line 14 of the module raises; its second error, at the end, hides nothing. Nor is there a second try."""
    with pytest.raises(TrackerError) as caught:
        break_after(recorder(configured(tmp_path, f"{own}:Mine")), [line(4)])
    message = f"tracking.trackers: {own}:Mine has failed ({tmp_path}/{own}.py, line 14): ValueError: much too low; mend"
    assert str(caught.value).startswith(message)
    assert sys.modules[own].Mine.heard == [(4, ["loss", "rewards/margins"]), (["run"], True)]
    with pytest.raises(TrackerError, match=f"{own}:Unmade has failed .*: OSError: my-run"):
        recorder(configured(tmp_path, f"{own}:Unmade"))


def test_what_it_raises_from_a_thread_is_a_warning(own: str, quick: None, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    with recorder(configured(tmp_path, f"{own}:Served"), heard=heard) as recording:
        recording.line(line(4))
        wait_until(lambda: bool(warnings_of(heard)))
    assert warnings_of(heard)[0].startswith(f"{own}:Served is down, training goes on: tracking.trackers: {own}:Served")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:Mine", "cannot be imported: ModuleNotFoundError"),
        ("{own}:Missing", "cannot be imported: AttributeError"),
        ("{own}:NEITHER", "is of type int: it must be a builtins.type"),
        ("{own}:StopTraining", r"is no tracker: derive it from dpo_ray\.training\.trackers\.Tracker"),
    ],
)
def test_what_is_no_tracker_is_refused_before_the_run(own: str, name: str, said: str, tmp_path: Path) -> None:
    config = configured(tmp_path, name.format(own=own))
    with pytest.raises(ConfigError, match=rf"tracking\.trackers: .*{said}"):
        check_trackers(config)


# --- W&B -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_folder(patient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where W&B's client writes."""
    wandb = pytest.importorskip("wandb", reason="needs the extra `wandb`")
    folder = tmp_path / "client"
    folder.mkdir()
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    yield folder
    wandb.teardown()  # It keeps the first test's environment otherwise.


def wandb_records(folder: Path, num: int) -> list[list[Any]]:
    """The records of each of `num` offline runs, oldest first; their files are whole a moment after `finish`."""
    runs: list[list[Any]] = []

    def whole() -> bool:
        paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        runs[:] = map(wandb_file, paths)
        return len(runs) == num and all(records and records[-1].HasField("exit") for records in runs)

    wait_until(whole)
    return runs


def wandb_file(path: Path) -> list[Any]:
    """The records of a file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    records = []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            break
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    named = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in named]


@pytest.mark.trackers
def test_wandb_has_name_config_lines_and_links(wandb_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Two starts, the second at step 2: one run id, and steps 3 and 4 twice."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    heard: list[dict[str, Any]] = []
    config = configured(tmp_path, "wandb")
    with pytest.raises(RuntimeError, match="broken"):
        break_after(recorder(config, heard=heard), [{**line(step), "broken": float("nan")} for step in (1, 2, 3, 4)])
    time.sleep(1.1)  # The client names its folders by the second.
    with recorder(config, position=2, heard=heard) as second:
        for step in (3, 4):
            second.line(line(step))
        second.line({"step": 4, "eval_loss": 0.25})

    before, after = wandb_records(wandb_folder, 2)
    assert wandb_rows(before) == [line(step) for step in (1, 2, 3, 4)]
    assert wandb_rows(after) == [line(3), line(4), {"step": 4, "eval_loss": 0.25}]
    runs = [next(r.run for r in records if r.WhichOneof("record_type") == "run") for records in (before, after)]
    assert runs[0].run_id == runs[1].run_id
    assert {(run.display_name, run.project) for run in runs} == {("my-run", "a project")}
    settings: dict[str, Any] = {}
    for record in after:
        config_record = record.run.config if record.WhichOneof("record_type") == "run" else record.config
        settings |= {item.key: json.loads(item.value_json) for item in config_record.update if item.key}
    assert {key: settings[key] for key in config.model_dump()} == config.model_dump(mode="json")
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in after
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    run_uri = str(tmp_path / "my-run")
    assert summary["links/run"] == run_uri
    assert summary["links/export"] == f"{run_uri}/export"
    exits = [r.exit.exit_code for records in (before, after) for r in records if r.WhichOneof("record_type") == "exit"]
    assert exits == [1, 0]
    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in after if r.HasField("metric")}
    assert axes["*"] == "step"
    assert warnings_of(heard) == []


@pytest.mark.trackers
def test_wandb_gets_all_lines_after_a_start_without_its_server(
    wandb_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at first; then the offline mode stands for a server that is back."""
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(trackers, "REQUEST_TIMEOUT_S", 2)
    heard: list[dict[str, Any]] = []
    with recorder(configured(tmp_path, "wandb"), heard=heard) as recording:
        recording.line(line(1))
        wait_until(lambda: bool(warnings_of(heard)))
        monkeypatch.setattr(trackers, "REQUEST_TIMEOUT_S", 60)
        monkeypatch.setenv("WANDB_MODE", "offline")
        recording.line(line(2))
        wait_until(lambda: any(wandb_folder.glob("wandb/offline-run-*")))
    (records,) = wandb_records(wandb_folder, 1)
    assert wandb_rows(records) == [line(1), line(2)]
    assert len(warnings_of(heard)) == 1


@pytest.mark.trackers
def test_training_goes_on_without_wandbs_server(
    wandb_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at the server's port."""
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(trackers, "REQUEST_TIMEOUT_S", 2)
    monkeypatch.setattr(trackers, "RETRY_MOST_S", 1.0)
    monkeypatch.setattr(trackers, "FINISH_WAIT_S", 3.0)
    heard: list[dict[str, Any]] = []
    with recorder(configured(tmp_path, "wandb"), heard=heard) as recording:
        began = time.monotonic()
        for step in range(1, 2001):
            recording.line(line(step))
        assert time.monotonic() - began < BRISK_S
        wait_until(lambda: bool(warnings_of(heard)))
        time.sleep(3)
        assert len(warnings_of(heard)) == 1
        assert "wandb is down, training goes on" in warnings_of(heard)[0]
        began = time.monotonic()
    assert time.monotonic() - began < 3 + BRISK_S


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(patient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow over a database of its own."""
    package = pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/client.db")
    return package


def mlflow_runs(mlflow: Any) -> list[Any]:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("a project")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def mlflow_metric(mlflow: Any, name: str) -> list[tuple[int, float]]:
    (run,) = mlflow_runs(mlflow)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


@pytest.mark.trackers
def test_mlflow_has_name_config_lines_and_links(mlflow: Any, tmp_path: Path) -> None:
    """Two starts, the second at step 2 with another number of workers: one run, steps 3 and 4 twice."""
    heard: list[dict[str, Any]] = []
    config = configured(tmp_path, "mlflow")
    with pytest.raises(RuntimeError, match="broken"):
        break_after(recorder(config, heard=heard), [{**line(step), "broken": float("nan")} for step in (1, 2, 3, 4)])
    (run,) = mlflow_runs(mlflow)
    assert run.info.status == "FAILED"
    with recorder(configured(tmp_path, "mlflow", scaling={"workers": 2}), position=2, heard=heard) as second:
        for step in (3, 4):
            second.line({**line(step), "loss": 10.0 * step})
        second.line({"step": 4, "eval_loss": 0.25})

    (run,) = mlflow_runs(mlflow)
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    assert mlflow_metric(mlflow, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 30.0), (4, 0.25), (4, 40.0)]
    assert mlflow_metric(mlflow, "rewards/margins")[:2] == [(1, 1.0), (2, 2.0)]
    assert mlflow_metric(mlflow, "eval_loss") == [(4, 0.25)]
    assert "broken" not in run.data.metrics
    params = run.data.params
    assert params["name"] == "my-run"
    assert params["optimizer.learning_rate"] == "0.001"
    assert params["data.train"].startswith("[")
    assert params["model.tokenizer"] == "null"
    assert params["scaling.workers"] == "1"
    run_uri = str(tmp_path / "my-run")
    assert run.data.tags["dpo_ray.run"] == run_uri
    assert run.data.tags["dpo_ray.export"] == f"{run_uri}/export"
    assert warnings_of(heard) == []


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real tracking server on loopback; killed at the end."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.trackers
def test_training_goes_on_while_mlflows_server_is_away(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 8 before the server is killed, 9 to 1008 while it is away, 1009 after: none is lost, one warning."""
    pytest.importorskip("flask", reason="needs the extra `dev`")
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(trackers, "RETRY_MOST_S", 1.0)
    heard: list[dict[str, Any]] = []
    with recorder(configured(tmp_path, "mlflow"), heard=heard) as recording:
        with mlflow_server(tmp_path, port):
            for step in range(1, 9):
                recording.line(line(step))
            wait_until(lambda: len(mlflow_runs(mlflow)) == 1 and len(mlflow_metric(mlflow, "loss")) == 8)
        began = time.monotonic()
        for step in range(9, 1009):
            recording.line(line(step))
        assert time.monotonic() - began < BRISK_S
        wait_until(lambda: bool(warnings_of(heard)))
        time.sleep(2)
        assert len(warnings_of(heard)) == 1
        assert "mlflow is down, training goes on" in warnings_of(heard)[0]
        with mlflow_server(tmp_path, port):
            recording.line(line(1009))
            wait_until(lambda: len(mlflow_metric(mlflow, "loss")) == 1009)
            assert mlflow_metric(mlflow, "loss") == [(step, 1 / step) for step in range(1, 1010)]
            recording.__exit__(None, None, None)
            (run,) = mlflow_runs(mlflow)
            assert run.info.status == "FINISHED"
    assert len(warnings_of(heard)) == 1


@pytest.mark.trackers
def test_an_mlflow_server_that_never_answers_costs_seconds(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port takes connections and says nothing."""
    monkeypatch.setattr(trackers, "FINISH_WAIT_S", 2.0)
    heard: list[dict[str, Any]] = []
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with recorder(configured(tmp_path, "mlflow"), heard=heard) as recording:
            for step in range(1, 2001):
                recording.line(line(step))
            assert time.monotonic() - began < BRISK_S
            began = time.monotonic()
        assert time.monotonic() - began < 2 + BRISK_S
        assert len(warnings_of(heard)) == 1
    # Its last try must not see the environment of the next test.
    wait_until(lambda: "dpo_ray-mlflow" not in {thread.name for thread in threading.enumerate()})
