"""A long run under random faults, held against an undisturbed twin: `python -m tests.faults.soak`, or `make soak`.

Two workers on local Ray, all but the raw pairs on a real S3 server behind a faulty way. Every fault is let happen when
the run has done a few new steps since the one before. The run must end as the twin did, to the bit, with each pair of
each epoch once; else the exit code is 1.

- time to recovery: from a fault to the first finished step that is heard of more than MOMENT_S later where processes
  died: the next one, which may be done again, and the next new one.
- goodput: seconds spent in steps that the model kept, without waiting for data, by seconds from the first to the last
  finished step. Evaluations and what checkpoints hold up are part of the steps; steps that were done again, restarts
  and outages are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest
import psutil
from fault_proxy import FaultProxy
from rich.console import Console
from rich.table import Table

from dpo_ray.orchestration.verify import Verdict, verify
from faults.harness import Driver, Place, named, until, workers_of

NAME, TWIN = "soak", "soak-twin"
OUTAGE = "storage outage"
NUM_PAIRS, EVERY_STEPS = 600, 4
# New steps between a recovery and the next fault.
CALM_STEPS = (3, 9)
# What was done before a death may be heard of until then.
MOMENT_S = 1.6
RECOVERY_S, PLANTED_S, END_S = 240.0, 120.0, 900.0
UNLIMITED = ("max_worker_failures", "max_node_failures", "max_hangs", "max_storage_failures", "max_ray_failures")


@dataclass(frozen=True)
class Fault:
    """What happened to the run.

    Attributes:
        kind: What.
        step: The newest step before it.
        at_s: Seconds after the first finished step.
        next_s: From the fault to the next finished step, new or done again.
        next_new_s: From the fault to the first step that was not done before it.
    """

    kind: str
    step: int
    at_s: float
    next_s: float
    next_new_s: float


class Soak:
    """The run, and what is done to it."""

    def __init__(self, place: Place, config: Path, proxy: FaultProxy, seed: int) -> None:
        self._place, self._config, self._proxy = place, config, proxy
        self._random = random.Random(seed)
        self.drivers: list[Driver] = []
        self.faults: list[Fault] = []
        self._kinds: dict[str, Callable[[], float]] = {
            "SIGKILL of a worker": self._kill_worker,
            "SIGSTOP of a worker": self._stop_worker,
            "SIGKILL of Ray Train's controller": self._kill_controller,
            "SIGKILL of the driver": self._kill_driver,
            "exception in a step": lambda: self._planted({"point": "step", "rank": self._rank(), "do": "raise"}),
            "SIGKILL before a shard": lambda: self._planted({"point": "shard", "rank": self._rank(), "do": "kill"}),
            "SIGKILL before a commit": lambda: self._planted({"point": "commit", "rank": 0, "do": "kill"}),
            OUTAGE: self._outage,
        }

    def run(self, num_faults: int, say: Callable[[str], None]) -> None:
        """Lets the faults happen, one after the other, and waits for the end."""
        self._start()
        self._wait(lambda: self.newest() >= 1, "the first step", RECOVERY_S)
        # Each kind about as often as the others, in an order of chance.
        kinds = [kind for _ in range(-(-num_faults // len(self._kinds))) for kind in self._shuffled()][:num_faults]
        for number, kind in enumerate(kinds, start=1):
            calm = self.newest() + self._random.randint(*CALM_STEPS)
            self._wait(lambda calm=calm: self.newest() >= calm, f"step {calm}", RECOVERY_S)
            self._let_happen(kind)
            last = self.faults[-1]
            took = f"{last.next_s:.1f} s to the next step, {last.next_new_s:.1f} s to the next new one"
            say(f"{number}: {kind} after step {last.step}: {took}")
        self.drivers[-1].finish(END_S)

    def _let_happen(self, kind: str) -> None:
        happened = self._kinds[kind]()
        late = happened + (0.0 if kind == OUTAGE else MOMENT_S)

        def seen() -> int:
            return max(step for step, when in self._steps() if when <= late)

        def recovered() -> float | None:
            step = seen()
            return next((when for number, when in self._steps() if number > step and when > late), None)

        when = self._wait(recovered, f"recovery from {kind} after step {seen()}", RECOVERY_S)
        following = min(told for _, told in self._steps() if told > late)
        at_s = happened - self._steps()[0][1]
        self.faults.append(Fault(kind, seen(), at_s, following - happened, when - happened))

    def newest(self) -> int:
        """The newest step that was told of."""
        return max((step for step, _ in self._steps()), default=0)

    def done_again(self) -> int:
        """Steps that were told of more than once."""
        steps = [step for step, _ in self._steps()]
        return len(steps) - len(set(steps))

    def wall_s(self) -> float:
        """From the first finished step to the last."""
        times = [when for _, when in self._steps()] or [0.0]
        return max(times) - min(times)

    def _steps(self) -> list[tuple[int, float]]:
        """Steps with the time when they were told of."""
        said = [said for driver in self.drivers for said in driver.said[:]]
        return [(line["step"], line["time"]) for line in said if line["event"] == "step"]

    def _shuffled(self) -> list[str]:
        kinds = list(self._kinds)
        self._random.shuffle(kinds)
        return kinds

    def _rank(self) -> int:
        return self._random.randrange(2)

    def _start(self) -> None:
        self.drivers.append(Driver(self._config, self._place.planted_environment(NAME)))

    def _wait(self, look: Callable[[], Any], what: str, timeout_s: float) -> Any:
        try:
            return until(look, self.drivers[-1], timeout_s)
        except AssertionError as error:
            raise AssertionError(f"waiting for {what}: {error}") from None

    def _worker(self) -> psutil.Process:
        found: list[psutil.Process] = []

        def both() -> bool:
            found[:] = workers_of(self.drivers[-1])
            return len(found) == 2

        self._wait(both, "two workers", RECOVERY_S)
        return found[self._rank()]

    def _kill_worker(self) -> float:
        self._worker().kill()
        return time.time()

    def _stop_worker(self) -> float:
        self._worker().suspend()
        return time.time()

    def _kill_controller(self) -> float:
        (controller,) = self._wait(lambda: named(self.drivers[-1], "TrainController"), "a controller", RECOVERY_S)
        controller.kill()
        return time.time()

    def _kill_driver(self) -> float:
        process = self.drivers[-1].process
        os.kill(process.pid, signal.SIGKILL)
        happened = time.time()
        process.wait()
        self._start()
        return happened

    def _planted(self, fault: dict[str, Any]) -> float:
        mark = self._place.plant_more(NAME, fault)
        self._wait(mark.exists, f"{fault} to happen", PLANTED_S)
        return mark.stat().st_mtime

    def _outage(self) -> float:
        happened = time.time()
        if self._random.random() < 0.5:
            self._proxy.refuse()
        else:
            self._proxy.inject("status", 503)
        time.sleep(self._random.uniform(3, 12))
        self._proxy.clear()
        return happened


def config_of(place: Place, name: str, steps: int) -> Path:
    """A run of so many steps that nothing but a fault of its own ends."""
    train = {"epochs": 1000, "max_steps": steps, "checkpoint_every_steps": EVERY_STEPS, "eval_every_steps": 50}
    return place.config(name, train=train, recovery={"hang_timeout_s": 10, **dict.fromkeys(UNLIMITED, -1)})


def soak(folder: Path, seed: int, num_faults: int, steps: int, pace_s: float, console: Console) -> dict[str, Any]:
    """Both runs; what came of them."""
    server = contextlib.contextmanager(conftest.s3_server.__wrapped__)()
    with server as s3, FaultProxy(s3.endpoint) as proxy:
        model = conftest.tiny_model.__wrapped__(SimpleNamespace(mktemp=lambda name: _made(folder / name)))
        place = Place(s3.uri("soak"), folder, model, {"AWS_ENDPOINT_URL": proxy.endpoint}, NUM_PAIRS)
        console.print(f"the twin: {steps} steps without a fault")
        twin = place.start(config_of(place, TWIN, steps), pace_s=0.0)
        try:
            twin.finish(END_S)
        finally:
            twin.kill()
        place.plant(NAME, [], pace_s)
        run = Soak(place, config_of(place, NAME, steps), proxy, seed)
        error = None
        try:
            run.run(num_faults, console.print)
        except AssertionError as failed:
            error = str(failed)
        finally:
            for driver in run.drivers:
                driver.kill()
            proxy.clear()
        console.print(_table(run.faults))
        return _report(place, run, error, verify(place.uri(NAME)))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _report(place: Place, run: Soak, error: str | None, verdict: Verdict) -> dict[str, Any]:
    wrong = [error] if error else []
    wrong += [f"step {finding.step}: {finding.text}" for finding in verdict.findings]
    if not error:
        if not verdict.finished:
            wrong.append(verdict.line)
        try:
            place.assert_like_twin(NAME, TWIN)
        except AssertionError as differs:
            wrong.append(f"not like the twin: {str(differs)[:2000]}")
    useful_s = sum(line["perf/step_s"] - line["perf/data_wait_s"] for line in place.steps(NAME)[1:])
    return {
        "faults": [asdict(fault) for fault in run.faults],
        "next_step_s": _by_kind(run.faults, lambda fault: fault.next_s),
        "next_new_step_s": _by_kind(run.faults, lambda fault: fault.next_new_s),
        "useful_s": useful_s,
        "wall_s": run.wall_s(),
        "goodput": useful_s / max(run.wall_s(), 1e-3),
        "steps": verdict.steps,
        "steps_done_again": run.done_again(),
        "attempts": len(verdict.attempts),
        "verdict": verdict.line,
        "like_twin_to_the_bit": not wrong,
        "wrong": wrong,
    }


def _by_kind(faults: list[Fault], seconds: Callable[[Fault], float]) -> dict[str, dict[str, float]]:
    taken: dict[str, list[float]] = {}
    for fault in faults:
        for kind in (fault.kind, "all"):
            taken.setdefault(kind, []).append(seconds(fault))
    return {kind: {"mean": statistics.mean(each), "max": max(each)} for kind, each in sorted(taken.items())}


def _table(faults: list[Fault]) -> Table:
    table = Table("fault", "after step", "at (s)", "to the next step (s)", "to the next new one (s)")
    for fault in faults:
        times = f"{fault.at_s:.0f}", f"{fault.next_s:.1f}", f"{fault.next_new_s:.1f}"
        table.add_row(fault.kind, str(fault.step), *times)
    return table


def show(report: dict[str, Any], console: Console) -> None:
    """What came of it, for people."""
    table = Table("seconds from a fault", "to the next step: mean", "max", "to the next new one: mean", "max")
    for kind, taken in report["next_step_s"].items():
        new = report["next_new_step_s"][kind]
        table.add_row(kind, *(f"{each:.1f}" for each in (taken["mean"], taken["max"], new["mean"], new["max"])))
    console.print(table)
    console.print(
        f"goodput {report['goodput']:.2f}: {report['useful_s']:.0f} s in steps that the model kept, of "
        f"{report['wall_s']:.0f} s; {report['steps_done_again']} of {report['steps']} steps were done again, in "
        f"{report['attempts']} attempts\n{report['verdict']}"
    )
    for wrong in report["wrong"]:
        console.print(wrong, style="red", markup=False, highlight=False)
    if not report["wrong"]:
        console.print("every number of every step and the exported model are the undisturbed twin's, to the bit")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="decides faults and moments")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--steps", type=int, help="of the run; by default as many as the faults need")
    parser.add_argument("--pace", type=float, default=0.3, help="seconds that each step is slowed by")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    asked = parser.parse_args()
    console = Console()
    # Between two faults at most 9 steps are awaited, and some are told of only after it.
    steps = asked.steps or 40 + 18 * asked.faults
    with tempfile.TemporaryDirectory(prefix="dpo-ray-soak-", ignore_cleanup_errors=True) as folder:
        report = soak(Path(folder), asked.seed, asked.faults, steps, asked.pace, console)
    show(report, console)
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
