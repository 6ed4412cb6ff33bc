"""The lease on a run, with real processes, on a local path and on a real S3 server."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import S3Server
from helpers import tiny_config, write_pairs

from dpo_ray import storage
from dpo_ray.config import to_yaml
from dpo_ray.errors import LeaseLostError, RunHeldError
from dpo_ray.lease import RunLease, process_start, this_host

BEAT_S, WATCH_S = 0.3, 1.5
# Takes the run and tells so, then holds it until its standard input ends.
HOLD = f"""
import sys
from dpo_ray.errors import DpoRayError
from dpo_ray.lease import RunLease
say = lambda text: print("say", text, flush=True)
try:
    with RunLease(sys.argv[1], say, host=sys.argv[2] or None, heartbeat_s={BEAT_S}, watch_s={WATCH_S}) as lease:
        print("holds", lease.generation, flush=True)
        sys.stdin.read()
except DpoRayError as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def run_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    server: S3Server = request.getfixturevalue("s3_server")
    return server.uri(f"lease-{tmp_path.name}")


@contextlib.contextmanager
def driver(run_uri: str, host: str = "") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, run_uri, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def lease(run_uri: str, say: list[str], host: str | None = None) -> RunLease:
    return RunLease(run_uri, say.append, host=host, heartbeat_s=BEAT_S, watch_s=WATCH_S)


def test_the_second_driver_is_told_who_holds_the_run(run_uri: str) -> None:
    with driver(run_uri) as first:
        assert next_line(first) == "holds 1"
        began = time.monotonic()
        with (
            pytest.raises(RunHeldError, match=f"process {first.pid}, since 20.*choose another name"),
            lease(run_uri, []),
        ):
            pass
        assert time.monotonic() - began < 2
        assert first.communicate("")[0] == ""
    # Given back: the next does not wait.
    said: list[str] = []
    with lease(run_uri, said) as second:
        assert second.generation == 2
    assert not said
    names = storage.list_names(storage.join(run_uri, "lease"))
    assert names == ["00000002.heartbeat", "00000002.json"]


def test_a_killed_driver_does_not_hold_up_its_restart(run_uri: str) -> None:
    with driver(run_uri) as first:
        assert next_line(first) == "holds 1"
        first.send_signal(signal.SIGKILL)
        # Not reaped yet: a zombie does not train.
        while process_start(first.pid) is not None:
            time.sleep(0.01)
        said: list[str] = []
        began = time.monotonic()
        with lease(run_uri, said) as second:
            assert second.generation == 2
        assert time.monotonic() - began < WATCH_S
        assert "is gone" in said[0]


def test_a_process_number_that_was_given_to_another_process(run_uri: str) -> None:
    holder = {"host": "here", "host_id": this_host(), "pid": 1, "process_start": "1", "since": "then", "id": "x"}
    storage.write_json(storage.join(run_uri, "lease", "00000007.json"), holder)
    with lease(run_uri, []) as second:
        assert second.generation == 8


def test_a_driver_on_another_host_is_refused_while_it_lives_and_replaced_when_it_is_dead(run_uri: str) -> None:
    with driver(run_uri, host="elsewhere") as first:
        assert next_line(first) == "holds 1"
        said: list[str] = []
        with pytest.raises(RunHeldError), lease(run_uri, said):
            pass
        assert "watching" in said[0]
        first.kill()
        began = time.monotonic()
        with lease(run_uri, said) as second:
            assert second.generation == 2
        assert WATCH_S <= time.monotonic() - began < WATCH_S + 5
        assert "no sign of life" in said[-1]


def test_a_driver_that_wakes_up_again_has_lost_the_run(run_uri: str) -> None:
    with driver(run_uri, host="elsewhere") as first:
        assert next_line(first) == "holds 1"
        first.send_signal(signal.SIGSTOP)
        with lease(run_uri, []) as second:
            assert second.generation == 2
            first.send_signal(signal.SIGCONT)
            time.sleep(3 * BEAT_S)
            assert first.communicate("")[0].startswith("LeaseLostError")
            time.sleep(2 * BEAT_S)
            second.check()


def test_losing_the_run_is_told_at_once(tmp_path: Path) -> None:
    def train() -> None:
        with RunLease(str(tmp_path), heartbeat_s=0.05) as held:
            storage.write_bytes(str(tmp_path / "lease" / "00000002.json"), b"{}")
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    held.check()
                except LeaseLostError:
                    raise RuntimeError("what follows from it") from None
                time.sleep(0.01)

    with pytest.raises(LeaseLostError, match="has taken this run over"):
        train()


def test_of_eight_that_replace_a_dead_driver_one_wins(run_uri: str) -> None:
    dead = {"host": "far", "host_id": "elsewhere", "pid": 1, "process_start": "1", "since": "then", "id": "x"}
    storage.write_json(storage.join(run_uri, "lease", "00000001.json"), dead)
    with contextlib.ExitStack() as stack:
        drivers = [stack.enter_context(driver(run_uri)) for _ in range(8)]
        ends = []
        for process in drivers:
            line = next_line(process)
            while line.startswith("say"):
                line = next_line(process)
            ends.append(line.split()[0])
        assert sorted(ends) == ["RunHeldError"] * 7 + ["holds"]


def test_what_could_not_be_given_back_is_not_held_against_the_same_process(tmp_path: Path) -> None:
    with lease(str(tmp_path), []):
        holder = json.loads((tmp_path / "lease" / "00000001.json").read_bytes())
        assert holder["pid"] == os.getpid()
        with pytest.raises(RunHeldError), lease(str(tmp_path), []):
            pass
    (tmp_path / "lease" / "00000001.heartbeat").write_bytes(b"3")  # As if the release had not been written.
    with lease(str(tmp_path), []) as second:
        assert second.generation == 2


def test_a_storage_outage_is_waited_out(tmp_path: Path) -> None:
    with RunLease(str(tmp_path / "run"), heartbeat_s=0.05) as held:
        (tmp_path / "run").rename(tmp_path / "away")
        (tmp_path / "run").write_bytes(b"")  # Every request now fails.
        time.sleep(0.5)
        (tmp_path / "run").unlink()
        (tmp_path / "away").rename(tmp_path / "run")
        beats = [(tmp_path / "run" / "lease" / "00000001.heartbeat").read_bytes()]
        deadline = time.monotonic() + 10
        while len(beats) < 2 and time.monotonic() < deadline:
            beats += {(tmp_path / "run" / "lease" / "00000001.heartbeat").read_bytes()} - set(beats)
        assert len(beats) == 2
        held.check()


@pytest.mark.integration
@pytest.mark.slow
def test_train_twice_at_once_and_a_takeover_while_it_trains(tmp_path: Path, tiny_model: Path) -> None:
    """The second command is refused while the first trains; when the run is taken over, the first stops by itself."""
    config = tiny_config(str(tmp_path), "run", tiny_model, write_pairs(tmp_path / "pairs.jsonl", 60))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", "from dpo_ray.cli import main; main()", "train", str(tmp_path / "c.yaml")]
    # More steps than it will ever do.
    command += ["--set", "train.epochs=500", "--set", "train.max_steps=null"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            assert first.poll() is None, first.communicate()
            time.sleep(0.2)
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert second.returncode == 2
        assert f"run is being trained by the driver on {socket.gethostname()} (process {first.pid}, " in second.stderr
        assert "Traceback" not in second.stderr + second.stdout

        (tmp_path / "run" / "lease" / "00000002.json").write_bytes(b"{}")
        output, errors = first.communicate(timeout=120)
        assert first.returncode == 1, errors
        assert "another driver has taken this run over" in errors
        assert "Traceback" not in errors + output
    finally:
        first.kill()
        first.communicate()
