"""Where metrics go besides metrics.jsonl: TensorBoard, W&B, MLflow, and trackers and checks of the user's own.

A tracker is a class and its entry in `TRACKERS`, or, of the user's own, its import path in `tracking.trackers`:

    class Patience(Tracker):
        best, step = -math.inf, 0

        def log(self, points):
            for point in points:
                margin = point.values.get("eval_rewards/margins", -math.inf)
                if margin > self.best:
                    self.best, self.step = margin, point.step
                elif margin > -math.inf and point.step - self.step > 500:
                    raise StopTraining(f"no better margin since step {self.step}")

One that talks to a server is fed by a thread of its own: whether the server is fast, slow or gone is nothing that
training waits for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch.utils.tensorboard import SummaryWriter

from dpo_ray import storage
from dpo_ray.config import Config, leaves
from dpo_ray.errors import ConfigError, StopTraining, TrackerError
from dpo_ray.extensions import check_installed, imported
from dpo_ray.redaction import without_secrets

QUEUE_POINTS = 10_000
BATCH_POINTS = 100
RETRY_FIRST_S = 1.0
RETRY_MOST_S = 60.0
REQUEST_TIMEOUT_S = 10
FINISH_WAIT_S = 10.0
# MLflow's own limits of one request and one value.
MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_PARAM_LENGTH = 1000, 100, 6000

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Point(NamedTuple):
    """The numbers of one line of metrics.

    Attributes:
        step: Optimizer step.
        time_s: When it was recorded, in seconds since the epoch.
        values: Finite numbers only: servers refuse others.
    """

    step: int
    time_s: float
    values: dict[str, float]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Point:
        """The point of a line recorded now."""
        numbers = {name: value for name, value in line.items() if name != "step" and isinstance(value, (int, float))}
        return cls(line["step"], time.time(), {name: value for name, value in numbers.items() if math.isfinite(value)})


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker needs to know of a run.

    Attributes:
        config: The run.
        position: Steps done before this start of the worker group.
        run_id: The same for every start of the run: each goes on where the one before was.
    """

    config: Config
    position: int
    run_id: str


class Tracker:
    """What shows the metrics of a run, or looks at them; on rank 0 alone.

    Attributes:
        background: Whether it talks to a server: its methods may wait and raise, and are called from a thread of their
            own; after an error the same is tried again. Else it is called between two steps, which wait for it; what
            one of the user's own raises ends the run, and `StopTraining` has it write a checkpoint and stop.
        package: What the extra of the tracker's name brings, or None.
    """

    background: bool = False
    package: str | None = None

    def __init__(self, run: TrackedRun) -> None:
        """Makes the tracker; one that talks to a server says nothing to it yet."""
        self.run = run

    def log(self, points: Sequence[Point]) -> None:
        """Takes points, of evaluations too, whose names begin with `eval_`; steps that are done again come again."""

    def checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint has been committed.

        Args:
            step: Optimizer steps done.
            uri: Its folder, which is there until newer ones have taken its place.
        """

    def flush(self) -> None:
        """Makes what was logged durable; from threads of its own."""

    def finish(self, links: Mapping[str, str], failed: bool) -> None:
        """Ends the run, or this start of its worker group. After an error it may be called again.

        Args:
            links: URIs of what the run left, by name.
            failed: Whether this start of the worker group ended in an error.
        """


class TensorBoard(Tracker):
    """Event files, in `<run>/tensorboard`."""

    def __init__(self, run: TrackedRun) -> None:
        """Opens the files.

        Args:
            run: Its events after the position are dropped: those steps are done again.
        """
        self._uri = storage.join(run.config.run_uri, "tensorboard")
        self._folder = tempfile.TemporaryDirectory(prefix="dpo_ray-events-")
        self._writer = SummaryWriter(self._folder.name, purge_step=run.position + 1)

    def log(self, points: Sequence[Point]) -> None:
        """Writes scalars."""
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, point.time_s)

    def flush(self) -> None:
        """Uploads the event files."""
        self._writer.flush()
        for name in os.listdir(self._folder.name):
            storage.upload(os.path.join(self._folder.name, name), storage.join(self._uri, name))

    def finish(self, links: Mapping[str, str], failed: bool) -> None:
        """Closes the event files; the last checkpoint's flush has uploaded all of them that counts."""
        self._writer.close()
        self._folder.cleanup()


class Wandb(Tracker):
    """Weights & Biases. Key, entity, server, offline mode and folder come from its environment variables.

    Its client keeps points on disk while the server does not answer, and sends them later.
    """

    background, package = True, "wandb"

    def __init__(self, run: TrackedRun) -> None:
        """Begins.

        Args:
            run: To be tracked.
        """
        self._about = run
        self._run: Any = None

    def log(self, points: Sequence[Point]) -> None:
        """Logs rows over an axis of their own: W&B's counter refuses the steps that are done again."""
        run = self._open()
        for point in points:
            run.log({"step": point.step, **point.values})

    def flush(self) -> None:
        """The client holds nothing back."""

    def finish(self, links: Mapping[str, str], failed: bool) -> None:
        """Puts the links into the summary."""
        run = self._open()
        run.summary.update({f"links/{name}": uri for name, uri in links.items()})
        run.finish(exit_code=int(failed))

    def _open(self) -> Any:
        if self._run is None:
            import wandb

            config = self._about.config
            settings = wandb.Settings(
                init_timeout=REQUEST_TIMEOUT_S,
                finish_timeout=0.8 * FINISH_WAIT_S,  # Its hook at exit waits too.
                console="off",
                reinit="create_new",
            )
            project, run_id = config.tracking.project, self._about.run_id
            try:
                run = wandb.init(project=project, name=config.name, id=run_id, resume="allow", settings=settings)
            except Exception:
                wandb.teardown()  # Its service would go on to hold the id, and refuse the next try.
                raise
            run.config.update(config.model_dump(mode="json"), allow_val_change=True)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            self._run = run
        return self._run


class Mlflow(Tracker):
    """MLflow. Server and credentials come from its environment variables.

    A parameter keeps its first value, as MLflow wants it; `config.yaml` in the run directory has the newest.
    """

    background, package = True, "mlflow"

    def __init__(self, run: TrackedRun) -> None:
        """Begins.

        Args:
            run: To be tracked.
        """
        self._about = run
        self._client: Any = None
        self._run_id = ""

    def log(self, points: Sequence[Point]) -> None:
        """Logs metrics, many in a request."""
        client = self._open()
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(point.time_s * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for some in _chunks(metrics, MLFLOW_METRICS):
            client.log_batch(self._run_id, metrics=some)

    def flush(self) -> None:
        """The client holds nothing back."""

    def finish(self, links: Mapping[str, str], failed: bool) -> None:
        """Puts the links into tags."""
        client = self._open()
        for name, uri in links.items():
            client.set_tag(self._run_id, f"dpo_ray.{name}", uri)
        client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _open(self) -> Any:
        if self._client is None:
            # MLflow tries for minutes by itself; here the thread that calls it tries again, with the newest points.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_S))
            from mlflow import MlflowClient
            from mlflow.entities import Param

            client, config, tag = MlflowClient(), self._about.config, "dpo_ray.id"
            experiment = client.get_experiment_by_name(config.tracking.project)
            place = experiment.experiment_id if experiment else client.create_experiment(config.tracking.project)
            found = client.search_runs([place], f"tags.`{tag}` = '{self._about.run_id}'", max_results=1)
            run = found[0] if found else client.create_run(place, run_name=config.name, tags={tag: self._about.run_id})
            if found:
                client.update_run(run.info.run_id, status="RUNNING")
            flat = (
                (key, value if isinstance(value, str) else json.dumps(value))
                for key, value in leaves(config.model_dump(mode="json"))
            )
            params = [Param(key, text[:MLFLOW_PARAM_LENGTH]) for key, text in flat if key not in run.data.params]
            for some in _chunks(params, MLFLOW_PARAMS):
                client.log_batch(run.info.run_id, params=some)
            self._client, self._run_id = client, run.info.run_id
        return self._client


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


class _Checkpoint(NamedTuple):
    """A committed checkpoint."""

    step: int
    uri: str


class Background(Tracker):
    """Feeds a tracker from a thread: what it is told returns at once, and an error is a warning and another try.

    When the tracker does not keep up, the oldest points are dropped.
    """

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]) -> None:
        """Starts the thread.

        Args:
            name: The tracker's.
            tracker: To be fed.
            warn: Called once for each time that the tracker is down, from the thread.
        """
        self._name = name
        self._tracker = tracker
        self._warn = warn
        self._changed = threading.Condition()
        self._waiting: deque[Point | _Checkpoint] = deque(maxlen=QUEUE_POINTS)
        self._dropped = 0
        self._ending: tuple[Mapping[str, str], bool] | None = None
        # A daemon: a call that hangs must not keep the worker alive.
        self._thread = threading.Thread(target=self._work, name=f"dpo_ray-{name}", daemon=True)
        self._thread.start()

    def log(self, points: Sequence[Point]) -> None:
        """Queues points."""
        self._queue(points)

    def checkpoint(self, step: int, uri: str) -> None:
        """Queues what is to be told."""
        self._queue([_Checkpoint(step, uri)])

    def _queue(self, told: Sequence[Point | _Checkpoint]) -> None:
        with self._changed:
            self._dropped += max(0, len(self._waiting) + len(told) - QUEUE_POINTS)
            self._waiting.extend(told)
            self._changed.notify()

    def flush(self) -> None:
        """Waits for nothing: metrics.jsonl is what must be durable."""

    def finish(self, links: Mapping[str, str], failed: bool) -> None:
        """Sends what is queued and ends the run, for at most `FINISH_WAIT_S`."""
        with self._changed:
            self._ending = (links, failed)
            self._changed.notify()
        self._thread.join(FINISH_WAIT_S)
        if self._thread.is_alive():
            self._warn(f"{self._name} did not take the last points within {FINISH_WAIT_S:.0f} s; metrics.jsonl has all")

    def _work(self) -> None:
        told: list[Point] | _Checkpoint = []
        down, pause_s = False, RETRY_FIRST_S
        while True:
            told = told or self._take()
            ending = self._ending
            try:
                if isinstance(told, _Checkpoint):
                    self._tracker.checkpoint(*told)
                elif told:
                    self._tracker.log(told)
                elif ending is not None:
                    self._tracker.finish(*ending)
                    return
            except Exception as error:
                if not down:
                    self._warn(f"{self._name} is down, training goes on: {_brief(error)}")
                if ending is not None:
                    self._warn(f"{self._name} did not take the end of the run; metrics.jsonl has all")
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._ending is not None, pause_s)
                down, pause_s = True, min(2 * pause_s, RETRY_MOST_S)
            else:
                told, down, pause_s = [], False, RETRY_FIRST_S
                self._tell_dropped()

    def _take(self) -> list[Point] | _Checkpoint:
        """The next points, or the next checkpoint; none when the run ends and all were taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending is not None)
            found = list[Point]()
            while self._waiting and len(found) < BATCH_POINTS:
                if isinstance(each := self._waiting[0], _Checkpoint):
                    if not found:
                        self._waiting.popleft()
                        return each
                    break
                self._waiting.popleft()
                found.append(each)
            return found

    def _tell_dropped(self) -> None:
        with self._changed:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._warn(f"{self._name} did not keep up: it lacks {dropped} lines; metrics.jsonl has all")


class Own(Tracker):
    """A tracker of the user's own: what it raises gets its name, or stops the run."""

    def __init__(self, name: str, make: Callable[[], Tracker], publish: Callable[[dict[str, Any]], None]) -> None:
        """Makes it.

        Args:
            name: Its import path.
            make: Gives the tracker.
            publish: Called with `{"stop": text}` when it wants the run to stop.

        Raises:
            TrackerError: It cannot be made.
        """
        self._name, self._publish = name, publish
        with self._named():
            self._tracker = make()

    def log(self, points: Sequence[Point]) -> None:
        """Hands points on."""
        with self._named():
            self._tracker.log(points)

    def checkpoint(self, step: int, uri: str) -> None:
        """Hands it on."""
        with self._named():
            self._tracker.checkpoint(step, uri)

    def flush(self) -> None:
        """Hands it on."""
        with self._named():
            self._tracker.flush()

    def finish(self, links: Mapping[str, str], failed: bool) -> None:
        """Hands it on; of a run that has failed nothing shall hide why."""
        try:
            with self._named():
                self._tracker.finish(links, failed)
        except TrackerError as error:
            if not failed:
                raise
            log.warning("%s", error)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except StopTraining as wish:
            self._publish({"stop": f"{self._name}: {wish}"})
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise TrackerError(
                f"tracking.trackers: {self._name} has failed ({frame.filename}, line {frame.lineno}): "
                f"{type(error).__name__}: {_brief(error)}; mend it or leave it out, and the same command goes on"
            ) from error


def tracker_class(name: str) -> type[Tracker]:
    """The class that `tracking.trackers` names.

    Raises:
        ConfigError: It cannot be imported, is no tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        try:
            found = imported(name, type)
        except ValueError as error:
            raise ConfigError(f"tracking.trackers: {error}") from None
        if not issubclass(found, Tracker):
            raise ConfigError(f"tracking.trackers: {name} is no tracker: derive it from {__name__}.Tracker")
        return found
    package = TRACKERS[name].package
    if package is not None:
        check_installed(package, name, f"tracking.trackers names {name}")
    return TRACKERS[name]


def check_trackers(config: Config) -> None:
    """Refuses trackers that would not start.

    Raises:
        ConfigError: See `tracker_class`.
    """
    for name in config.tracking.trackers:
        tracker_class(name)


def open_trackers(config: Config, position: int, publish: Callable[[dict[str, Any]], None]) -> list[Tracker]:
    """The configured trackers.

    Args:
        config: The run.
        position: Steps done before this start of the worker group.
        publish: Called with `{"warning": text}` when a tracker is in trouble, with `{"stop": text}` when one wants the
            run to stop.

    Raises:
        ConfigError: See `tracker_class`.
        TrackerError: One of the user's own cannot be made.
        StorageError: The run directory cannot be read or written.
    """

    def warn(text: str) -> None:
        log.warning(text)
        publish({"warning": text})

    check_trackers(config)
    run = TrackedRun(config, position, _run_id(config))
    trackers: list[Tracker] = []
    for name in dict.fromkeys(config.tracking.trackers):
        kind = tracker_class(name)
        tracker = kind(run) if name in TRACKERS else Own(name, partial(kind, run), publish)
        trackers.append(Background(name, tracker, warn) if kind.background else tracker)
    return trackers


def _run_id(config: Config) -> str:
    """An id that lies in the run directory: with a new directory of the same name begins a new run."""
    place = storage.join(config.run_uri, "trackers.json")
    if not storage.exists(place):
        storage.write_json(place, {"run_id": uuid.uuid4().hex})
    return str(storage.read_json(place)["run_id"])


def _chunks(values: list[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _brief(error: Exception) -> str:
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
