"""Runs under faults, and the undisturbed twin that they are held against."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import tiny_config, write_pairs

from dpo_ray import storage
from dpo_ray.config import to_yaml
from dpo_ray.orchestration.verify import verify

HERE = Path(__file__).parent
# What no failure may change, to the bit.
EXACT = ("step", "loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens")
READY_S = 240.0


class Driver:
    """A driver in a process of its own, and what it has said so far."""

    def __init__(self, config: Path, environment: dict[str, str], prefix: Sequence[str] = ()) -> None:
        self.said: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "driver.py"), str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self.errors = ""
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"event"'):
                self.said.append(json.loads(line))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()

    def wait_for(self, event: Callable[[dict[str, Any]], bool], after: int = 0) -> dict[str, Any]:
        """The first thing said, from the `after`th on, that `event` is true of."""
        return until(lambda: next((said for said in self.said[after:] if event(said)), None), self)

    def wait_for_step(self, step: int, after: int = 0) -> dict[str, Any]:
        """The first line of a step from `step` on."""
        return self.wait_for(lambda said: said["event"] == "step" and said["step"] >= step, after)

    def finish(self, timeout_s: float = READY_S) -> None:
        """Waits for the end of the run."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not finished; it said {self.said[-10:]}") from None
        for reader in self._readers:
            reader.join()
        assert self.process.returncode == 0, f"{self.said[-5:]}\n{self.errors[-4000:]}"

    def fail(self, timeout_s: float = READY_S) -> str:
        """Waits for the run to end with a message."""
        self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join()
        assert self.said[-1]["event"] == "error", f"{self.said[-5:]}\n{self.errors[-4000:]}"
        return str(self.said[-1]["text"])

    def warnings(self) -> list[str]:
        return [said["text"] for said in self.said if said["event"] == "warning"]

    def kill(self) -> None:
        """SIGKILL for the driver and all that it started."""
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()


def until(look: Callable[[], Any], driver: Driver | None = None, timeout_s: float = READY_S) -> Any:
    """What `look` returns, as soon as it is something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := look():
            return found
        if driver is not None and driver.process.poll() is not None:
            raise AssertionError(f"ended early: {driver.said[-5:]} {driver.errors[-4000:]}")
        time.sleep(0.02)
    raise AssertionError(f"not seen in {timeout_s} s; said: {driver.said[-10:] if driver else ''}")


class Place:
    """A storage path with pairs, model, and the stores that all of its runs share."""

    def __init__(
        self,
        storage_path: str,
        folder: Path,
        model: Path,
        environment: dict[str, str] | None = None,
        num_pairs: int = 200,
    ) -> None:
        self.storage_path, self.folder, self.model = storage_path, folder, model
        self.environment = dict(environment or {})
        self.pairs = write_pairs(folder / "pairs.jsonl", num_pairs)

    def config(self, name: str, **sections: dict[str, Any]) -> Path:
        """A configuration of 24 steps over two epochs, a checkpoint every 4, as a file."""
        base: dict[str, dict[str, Any]] = {
            "scaling": {"workers": 2},
            "train": {
                "epochs": 2,
                "max_steps": 24,
                "checkpoint_every_steps": 4,
                "eval_every_steps": 8,
                "ledger": "full",
            },
            "recovery": {"hang_timeout_s": 60},
        }
        merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
        config = tiny_config(self.storage_path, name, self.model, self.pairs, **merged)
        path = self.folder / f"{name}.yaml"
        path.write_text(to_yaml(config))
        return path

    def planted_environment(self, name: str) -> dict[str, str]:
        """What a process needs to plant the faults of `plant`."""
        path = os.pathsep.join(filter(None, [str(HERE / "inject"), os.environ.get("PYTHONPATH", "")]))
        return {**self.environment, "PYTHONPATH": path, "DPO_RAY_FAULTS": str(self.folder / f"{name}.faults.json")}

    def plant(self, name: str, faults: Sequence[dict[str, Any]], pace_s: float) -> None:
        """Writes down what shall happen in processes with `planted_environment(name)`."""
        for old in self.folder.glob(f"{name}.faults.json*"):
            old.unlink()
        (self.folder / f"{name}.faults.json").write_text(json.dumps({"pace_s": pace_s, "faults": faults}))

    def plant_more(self, name: str, fault: dict[str, Any]) -> Path:
        """Plants one more fault into processes that run; returns the file that is there once it has happened."""
        place = self.folder / f"{name}.faults.json"
        planted = json.loads(place.read_text())
        planted["faults"].append(fault)
        written = place.with_suffix(".writing")
        written.write_text(json.dumps(planted))
        written.replace(place)
        return Path(f"{place}.{len(planted['faults']) - 1}.happened")

    def start(
        self,
        config: Path,
        *faults: dict[str, Any],
        pace_s: float = 0.3,
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> Driver:
        """A driver with planted faults, its steps slow enough to be hit from outside."""
        # A cluster's raylets were given their environment at their start.
        name = "cluster" if "RAY_ADDRESS" in environment else config.stem
        self.plant(name, faults, pace_s)
        return Driver(config, {**self.planted_environment(name), **environment}, prefix)

    def uri(self, name: str) -> str:
        return storage.join(self.storage_path, name)

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        return storage.read_json_lines(storage.join(self.uri(name), file))

    def steps(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines(name, "metrics.jsonl") if "loss" in line]

    def attempts(self, name: str) -> list[dict[str, Any]]:
        return self.lines(name, "attempts.jsonl")

    def export(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.uri(name), "export", "model.safetensors"))

    def forget_scores(self) -> None:
        """The next run has to score all pairs itself."""
        for scores in storage.list_names(storage.join(self.storage_path, "store", "reference")):
            storage.remove(storage.join(self.storage_path, "store", "reference", scores))

    def filled(self, name: str) -> dict[str, Any]:
        """What the last driver's reference filler has done."""
        return dict(storage.read_json(storage.join(self.uri(name), "reference.json")))

    def assert_exact(self, name: str) -> None:
        """The ledger holds each pair of the plan once."""
        verdict = verify(self.uri(name))
        assert verdict.exact, verdict.findings

    def assert_like_twin(self, name: str, twin: str) -> None:
        """As if nothing had happened: every number of every step, to the bit, and the model."""
        self.assert_exact(name)
        for key in EXACT:
            assert [line[key] for line in self.steps(name)] == [line[key] for line in self.steps(twin)], key
        self.assert_same_pairs(name, twin)
        assert self.export(name) == self.export(twin)

    def assert_same_pairs(self, name: str, twin: str) -> None:
        ledgers = [[entry["pair_ids"] for entry in self.lines(run, "ledger.jsonl")] for run in (name, twin)]
        assert ledgers[0] == ledgers[1]

    def assert_same_but_for_rounding(self, name: str, twin: str) -> None:
        """At another number of workers: the same pairs in each step, the same losses up to the order of sums."""
        self.assert_exact(name)
        self.assert_same_pairs(name, twin)
        found, expected = ([line["loss"] for line in self.steps(run)] for run in (name, twin))
        assert found == pytest.approx(expected, rel=1e-5)


def workers_of(driver: Driver) -> list[psutil.Process]:
    """The processes of the policy's workers that a driver on local Ray has started."""
    return named(driver, "RayTrainWorker")


def named(driver: Driver, part: str) -> list[psutil.Process]:
    """Processes below the driver whose title has `part`; Ray writes the actor's class there."""
    found = []
    for child in psutil.Process(driver.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if part in " ".join(child.cmdline()):
                found.append(child)
    return found
