"""One attempt: a Ray Train worker group from its start to its end, watched from the driver.

Ray Train starts the workers, joins them into a process group and hands each its part of the stream. It is given no
failure to handle and no checkpoint to keep: what happens after an end is the supervisor's business.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import FailureConfig, RunConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, RayTrainCallback, WorkerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.orchestration.monitor import (
    ENDED,
    SLOW_STEPS,
    START_S,
    Failure,
    Monitor,
    Orders,
    Place,
    Report,
    Slow,
    has_excuse,
    stalled,
)
from dpo_ray.orchestration.nodes import kill, lead_gloo, look_at, node_name, on_nodes, usable_nodes
from dpo_ray.orchestration.resources import resources_per_worker
from dpo_ray.orchestration.stream import Places, close_streams, open_streams
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.orchestration.worker import Assignment, final_error, work
from dpo_ray.redaction import without_secrets
from dpo_ray.storage_requests import full_patience_s
from dpo_ray.types import Attempt

LOOK_S = 0.5
# Ray Train is asked to notice a death soon and not to wait long for room: both are looked after here.
_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

Kind = Literal["done", "worker", "node", "hang", "storage", "memory", "ray"]


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended.

    Attributes:
        kind: "done" when the workers ended of themselves, trained to the end or asked to leave; else what failed.
        reason: In a line.
        detail: The error with its traceback, where there was one.
    """

    kind: Kind
    reason: str
    detail: str = ""


class WorkerGroup:
    """Runs one attempt."""

    def __init__(
        self,
        config: Config,
        places: Places,
        attempt: Attempt,
        node_ids: Sequence[str],
        watcher: Watcher,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            config: The run.
            places: Its stores.
            attempt: Its record.
            node_ids: Where workers may be put.
            watcher: Told of lines and trouble.
            tell: Told of lines too.
        """
        self._config, self._places, self._attempt = config, places, attempt
        self._node_ids, self._watcher, self._tell = node_ids, watcher, tell
        self._error: BaseException | None = None
        self._streams: list[ray.data.DataIterator] = []
        self._orders = Orders()
        self._report, self._slow = Report(), Slow()
        self._began = self._excused = time.monotonic()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, max_restarts=0)(Monitor).options(scheduling_strategy=here)
        self._monitor = actor.remote(f"{config.name}, attempt {attempt.attempt}")
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)

    def run(self, look: Callable[[dict[int, Place]], str | None]) -> End:
        """Runs the group to its end.

        Args:
            look: Called twice a second with where the ranks are; returns why they shall write a checkpoint and leave,
                or None. What it raises ends the group at once.

        Raises:
            FinalError: What failed would fail again.
        """
        self._thread.start()
        hang, ended_since = None, None
        try:
            while self._thread.is_alive():
                self._thread.join(LOOK_S)
                self._look()
                wanted = look({rank: beat.place for rank, beat in self._report.beats.items()})
                if wanted and self._orders.leave is None:
                    self._watcher.phase(f"{wanted}: writing a checkpoint after this step")
                    self._orders.leave = wanted
                hang = self._hang()
                if hang:
                    break
                # Ray Train's controller may itself stand still; the workers' word is enough.
                if self._all_ended():
                    ended_since = ended_since or time.monotonic()
                    if time.monotonic() - ended_since > START_S:
                        break
            if hang:
                self._dump(hang)
        finally:
            self._end()
        return self._judge(hang)

    def _fit(self) -> None:
        """Ray Train's part, in a thread of its own, so that this one can look after it."""
        config, attempt, scaling = self._config, self._attempt, self._config.scaling
        limit_s = config.recovery.hang_timeout_s
        os.environ.update({name: os.environ.get(name, value) for name, value in _RAY_TRAIN.items()})
        # Ray Train wants a place of its own, but is given nothing to put there: our manifests are the only truth.
        scratch = tempfile.mkdtemp(prefix="dpo_ray-train-")
        try:
            self._streams = open_streams(config, self._places, attempt)
            _Trainer(
                work,
                train_loop_config={
                    "assignment": Assignment(config, self._places, attempt, self._streams, self._monitor)
                },
                torch_config=TorchConfig(
                    # Shards in the host's memory are summed there too.
                    backend="cpu:gloo,cuda:nccl" if config.model.cpu_offload else None,
                    timeout_s=int(max(1800, full_patience_s() + 2 * limit_s)),
                ),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=attempt.world_size,
                    use_gpu=bool(scaling.gpus_per_worker),
                    resources_per_worker=resources_per_worker(config),
                    # Ray believes for seconds in a node that has died.
                    label_selector={**scaling.label_selector, "ray.io/node-id": f"in({','.join(self._node_ids)})"},
                ),
                run_config=RunConfig(
                    name=config.name,
                    storage_path=scratch,
                    callbacks=[_Whereabouts(self._monitor), _Interface()],
                    # Preempted nodes have a count of their own, without a limit: Ray Train would start the group anew
                    # in the middle of an attempt.
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                ),
            ).fit()
        except BaseException as error:
            # Its frames hold Ray Train's controller, which holds workers and their resources.
            traceback.clear_frames(error.__traceback__)
            self._error = error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _look(self) -> None:
        """Takes the workers' reports and hands the lines on."""
        with contextlib.suppress(RayError, GetTimeoutError):
            self._report = ray.get(self._monitor.look.remote(self._orders), timeout=10)
            for line in self._report.lines:
                self._tell(line)
                self._watcher.line(line)
                if slow := self._slow.line(line):
                    self._warn_of(*slow)

    def _warn_of(self, rank: int, spread: float) -> None:
        beat = self._report.beats.get(rank)
        where = f" on node {node_name(beat.place.node_id)}" if beat is not None else ""
        self._watcher.warning(
            f"rank {rank}{where} has computed {spread:.2f} times as long as the median of the ranks for {SLOW_STEPS} "
            "steps, and all wait for it: see to that node (other work on it, heat, a failing device), or drain it"
        )

    def _all_ended(self) -> bool:
        beats = self._report.beats
        return len(beats) == self._attempt.world_size and all(beat.doing == ENDED for beat in beats.values())

    def _hang(self) -> str | None:
        """What stands still, or None."""
        limit_s, beats = self._config.recovery.hang_timeout_s, self._report.beats
        if len(beats) < self._attempt.world_size:
            waited_s = time.monotonic() - self._began
            missing = self._attempt.world_size - len(beats)
            return f"{missing} workers did not start in {waited_s:.0f} s" if waited_s > START_S + limit_s else None
        if has_excuse(self._report):
            self._excused = time.monotonic()
        return stalled(self._report, limit_s, time.monotonic() - self._excused)

    def _dump(self, hang: str) -> None:
        """Writes down what every thread of every worker is doing."""
        self._orders.dump = True
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            time.sleep(LOOK_S)
            self._look()
            if all(beat.stacks for beat in self._report.beats.values()):
                break
        mute = {rank: beat.place for rank, beat in self._report.beats.items() if not beat.stacks}
        found = {rank: beat.stacks or "" for rank, beat in self._report.beats.items()}
        found |= {rank: text or "its node does not answer" for rank, text in on_nodes(look_at, mute).items()}
        parts = [f"{hang}\n"]
        for rank, beat in sorted(self._report.beats.items()):
            about = f"rank {rank} (process {beat.place.pid} on node {beat.place.node_id}): {beat.doing}"
            parts.append(f"=== {about}, for {beat.since_s + self._report.silent_s[rank]:.0f} s\n{found[rank]}")
        uri = storage.join(self._config.run_uri, "hangs", f"attempt-{self._attempt.attempt:04d}.txt")
        storage.write_bytes(uri, "\n".join(parts).encode())
        self._watcher.warning(f"{hang}; what its threads were doing is in {uri}")

    def _end(self) -> None:
        """Makes sure that nothing of the group is left: its processes hold what the next one needs."""
        if self._thread.is_alive() or self._error is not None:
            on_nodes(kill, {rank: beat.place for rank, beat in self._report.beats.items()})
        close_streams(self._streams)
        # A worker that never reported ends itself when the monitor is gone.
        with contextlib.suppress(RayError):
            ray.kill(self._monitor)
        self._thread.join(START_S if not self._all_ended() else LOOK_S)
        if self._thread.is_alive() and self._report.controller is not None:
            # It stands still, and holds the group's placement.
            on_nodes(kill, {0: self._report.controller})
            self._thread.join(START_S)

    def _judge(self, hang: str | None) -> End:
        failures = {rank: beat.failure for rank, beat in self._report.beats.items() if beat.failure is not None}
        for failure in failures.values():
            if failure.final is not None:
                raise failure.final
        if hang:
            return End("hang", hang)
        if self._error is None or self._all_ended() and not failures:
            return End("done", self._orders.leave or "ended")
        if not isinstance(self._error, Exception):
            raise self._error
        if not failures and (final := final_error(self._error)):
            raise final
        said = without_secrets(str(self._error))
        lost = {beat.place.node_id for beat in self._report.beats.values()} - set(usable_nodes())
        if lost:
            return End("node", f"{len(lost)} node{'s' * (len(lost) > 1)} with workers died", said)
        died = _died(self._error) - set(failures)
        if died and all(failure.kind == "worker" for failure in failures.values()):
            # What the others say is that they have lost a peer.
            beats = [self._report.beats[rank] for rank in sorted(died) if rank in self._report.beats]
            nodes = ", ".join(dict.fromkeys(node_name(beat.place.node_id) for beat in beats))
            whose = f"the process of rank {min(died)}" if len(died) == 1 else f"the processes of {len(died)} ranks"
            return End("worker", f"{whose} died{f' on {nodes}' if nodes else ''}", said)
        if failures:
            return _of_failures(failures)
        if isinstance(self._error, WorkerGroupError):
            return End("worker", "a worker's process died", said)
        return End("ray", f"Ray Train: {_last_line(said) or type(self._error).__name__}", said)


class _Whereabouts(ControllerCallback):
    """Tells the monitor where Ray Train's controller runs."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        self._monitor.controller.remote(Place.here())


class _Interface(WorkerCallback):
    """Leads gloo before Ray Train joins a worker to the process group."""

    def after_init_train_context(self) -> None:
        lead_gloo()


class _Policy(FixedScalingPolicy):
    """Asks the autoscaler for nothing: the supervisor does, and of both together it might not be able to give all."""

    def _get_num_workers_for_resource_request(self) -> int:
        return 0


class _Trainer(TorchTrainer):
    """Ray Train's, but for an actor that would hand out datasets: a process more to start before the workers can."""

    def _initialize_and_run_controller(self, **about: Any) -> Any:
        return super()._initialize_and_run_controller(**{**about, "scaling_policy": _Policy(self.scaling_config)})

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


def _died(error: Exception) -> set[int]:
    """The ranks whose processes Ray Train found dead."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return {
        rank
        for rank, each in failures.items()
        if isinstance(each, WorkerHealthCheckFailedError) and isinstance(each.health_check_failure, RayActorError)
    }


def _of_failures(failures: dict[int, Failure]) -> End:
    # What one rank ran into, the others know only as a lost peer.
    rank, failure = min(failures.items(), key=lambda item: (item[1].kind == "worker", item[0]))
    last = failure.text.strip().splitlines()[-1]
    return End(failure.kind, f"rank {rank}: {last}", failure.text)


def _last_line(said: str) -> str:
    """Ray puts the cause at the end."""
    return next((line for line in reversed(said.splitlines()) if line.strip()), "")
