"""One driver per run: a lease on the run's folder that needs no clock and no server but the storage.

Each holder owns a generation, `<run>/lease/00000003.json`, created where there was none; the highest generation is the
holder, so that it can serve as a fencing token. Beside it the holder counts in `00000003.heartbeat`. A newcomer decides
by what it sees: the count moves (held), stands still (taken over), or the holder's process on this same host is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_ray import storage
from dpo_ray.errors import LeaseLostError, RunHeldError, StorageError

HEARTBEAT_S = 5.0
# Four beats, so that one that is late is not taken for a death.
WATCH_S = 20.0
_RELEASED = "released"
# What this process holds now, so that what it could not give back, in an outage, is not held against it.
_held_here: set[str] = set()


def this_host() -> str | None:
    """What two processes share when each can see by its number whether the other lives: a boot and a PID namespace."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return None


def process_start(pid: int) -> str | None:
    """When a process started, in ticks since boot, since its number may go to another; None when it does not run."""
    with contextlib.suppress(OSError):
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] not in "ZX" else None
    return None


@dataclass(frozen=True, slots=True)
class Holder:
    """The last driver that took a run.

    Attributes:
        generation: Its number.
        who: Host, process and time, for people.
        state: `released`: it gave the run back; `gone`: its process on this host is dead; `held`: neither is known.
    """

    generation: int
    who: str
    state: Literal["released", "gone", "held"]


def last_holder(run_uri: str) -> Holder | None:
    """Who took a run last, by a look at its files that changes nothing; None where nobody did."""
    folder = storage.join(run_uri, "lease")
    generation = _highest(folder)
    try:
        holder = storage.read_json(storage.join(folder, f"{generation:08d}.json"))
    except FileNotFoundError:
        return None
    beat = storage.join(folder, f"{generation:08d}.heartbeat")
    if storage.exists(beat) and storage.read_bytes(beat).decode() == _RELEASED:
        return Holder(generation, _who(holder), "released")
    here = holder["host_id"] is not None and holder["host_id"] == this_host()
    gone = here and process_start(holder["pid"]) != holder["process_start"]
    return Holder(generation, _who(holder), "gone" if gone else "held")


def _who(holder: dict[str, Any]) -> str:
    return f"the driver on {holder['host']} (process {holder['pid']}, since {holder['since']})"


def _highest(folder: str) -> int:
    names = [name.partition(".") for name in storage.list_names(folder)]
    return max((int(number) for number, _, kind in names if kind == "json" and number.isdigit()), default=0)


class RunLease:
    """Holds a run while a `with` block runs.

    Attributes:
        generation: The holder's number, higher than those of all before it.
    """

    def __init__(
        self,
        run_uri: str,
        say: Callable[[str], None] = lambda text: None,
        host: str | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        watch_s: float = WATCH_S,
    ) -> None:
        """Takes nothing yet.

        Args:
            run_uri: The run's folder.
            say: Told when a dead holder is watched or replaced.
            host: As `this_host`, which is the default.
            heartbeat_s: Seconds between two heartbeats.
            watch_s: Seconds without a heartbeat after which a holder is taken for dead.
        """
        self.generation = 0
        self._run_uri, self._folder = run_uri, storage.join(run_uri, "lease")
        self._say = say
        self._host = host or this_host()
        self._heartbeat_s, self._watch_s = heartbeat_s, watch_s
        self._id = uuid.uuid4().hex
        self._lost, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lease", daemon=True)

    def __enter__(self) -> RunLease:
        """Takes the run.

        Raises:
            RunHeldError: Another driver is training it.
            StorageError: The run's folder cannot be read or written.
        """
        while True:
            held = self._highest()
            if held:
                self._wait_or_refuse(held)
            if self._create(held + 1):
                break
        _held_here.add(self._id)
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        """Gives the run back.

        Raises:
            LeaseLostError: It was lost: what the block raised only followed from that.
        """
        _held_here.discard(self._id)
        self._done.set()
        # An outage of the storage must not keep a finished driver.
        self._thread.join(timeout=10)
        self.check()
        with contextlib.suppress(StorageError), storage.patience(10):
            storage.write_bytes(self._place("heartbeat"), _RELEASED.encode())

    def check(self) -> None:
        """Passes while the run is ours, as far as the last heartbeat knows.

        Raises:
            LeaseLostError: Another driver has taken it over.
        """
        if self._lost.is_set():
            raise LeaseLostError(
                f"{self._run_uri}: another driver has taken this run over, since this one gave no sign of life for "
                f"{self._watch_s:g} s; it goes on there, this one stops"
            )

    def confirm(self) -> None:
        """Like `check`, by a look at the storage.

        Raises:
            LeaseLostError: Another driver has taken the run over.
        """
        if self._highest() > self.generation:
            self._lost.set()
        self.check()

    def _highest(self) -> int:
        return _highest(self._folder)

    def _place(self, suffix: str, generation: int | None = None) -> str:
        return storage.join(self._folder, f"{generation or self.generation:08d}.{suffix}")

    def _create(self, generation: int) -> bool:
        holder = {
            "host": socket.gethostname(),
            "host_id": self._host,
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "id": self._id,
        }
        if not storage.create(self._place("json", generation), json.dumps(holder).encode()):
            return False
        # The number may have been taken, given up and cleaned away since we looked.
        if self._highest() > generation:
            storage.remove(self._place("json", generation))
            return False
        self.generation = generation
        storage.write_bytes(self._place("heartbeat"), b"0")
        for name in storage.list_names(self._folder):
            number = name.partition(".")[0]
            if number.isdigit() and int(number) < generation:
                storage.remove(storage.join(self._folder, name))
        return True

    def _wait_or_refuse(self, held: int) -> None:
        """Returns when the holder has given the run back or is dead."""
        beat = self._read_beat(held)
        if beat == _RELEASED:
            return
        try:
            holder = storage.read_json(self._place("json", held))
        except FileNotFoundError:
            return  # Cleaned away by a newer one, which the next look will find.
        who = _who(holder)
        if self._host is not None and holder["host_id"] == self._host:
            given_up = holder["pid"] == os.getpid() and holder["id"] not in _held_here
            if process_start(holder["pid"]) == holder["process_start"] and not given_up:
                raise self._held(who)
            self._say(f"{who} is gone: taking {self._run_uri} over")
            return
        self._say(f"{who} holds {self._run_uri}: watching for {self._watch_s:g} s whether it is alive")
        interval_s = min(1.0, self._heartbeat_s)
        # Looks are counted, not seconds: while this process itself stands still, nothing can be learned.
        for _ in range(math.ceil(self._watch_s / interval_s)):
            time.sleep(interval_s)
            if self._highest() > held:
                return
            if (now := self._read_beat(held)) != beat:
                if now == _RELEASED:
                    return
                raise self._held(who)
        self._say(f"{who} gave no sign of life for {self._watch_s:g} s: taking {self._run_uri} over")

    def _held(self, who: str) -> RunHeldError:
        return RunHeldError(
            f"{self._run_uri} is being trained by {who}: wait for it, stop it, or choose another name for this run"
        )

    def _read_beat(self, generation: int) -> str | None:
        try:
            return storage.read_bytes(self._place("heartbeat", generation)).decode()
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(self._heartbeat_s):
            # An outage is waited out: who cannot write the heartbeat cannot write the run either.
            with contextlib.suppress(StorageError):
                if self._highest() > self.generation:
                    self._lost.set()
                    return
                count += 1
                storage.write_bytes(self._place("heartbeat"), str(count).encode())
