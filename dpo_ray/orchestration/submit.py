"""A run as a job of a cluster, over Ray's job SDK: what it needs travels with it, and nothing of this machine else."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from dpo_ray.config import Config, to_yaml
from dpo_ray.errors import ConfigError, first_line

# How long Ray waits for a job that it has asked to stop: for the step under way, and for a checkpoint.
STOP_WAIT_S = 600
RECONNECT_S, START_WAIT_S = 2.0, 60.0
CONFIG_NAME = "run.yaml"


def pack(config: Config, folder: str) -> None:
    """Puts into a folder what the job needs: the resolved configuration, and the user's own losses, formats, trackers.

    Modules that are installed, and not in the working directory, are taken to be on every node.
    """
    here, to = Path.cwd(), Path(folder)
    (to / CONFIG_NAME).write_text(to_yaml(config), encoding="utf-8")
    for path in (*config.own_code, *config.tracking.own):
        root = path.partition(":")[0].partition(".")[0]
        module = importlib.import_module(root)
        found = Path(module.__file__ or module.__path__[0]).resolve()
        if found.name == "__init__.py":
            found = found.parent
        if not found.is_relative_to(here):
            continue
        if found.is_dir():
            shutil.copytree(found, to / root, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy(found, to)


@dataclass(frozen=True, slots=True)
class Job:
    """How a job stands.

    Attributes:
        job_id: Its id.
        status: Ray's word for it, e.g. running or succeeded.
        exit_code: Its command's, 143 where it was asked to stop; None before its end.
        run_uri: The run that it trains.
        started: In seconds since 1970, or None.
        ended: Likewise.
        message: What Ray has to say.
    """

    job_id: str
    status: str
    exit_code: int | None
    run_uri: str
    started: float | None
    ended: float | None
    message: str


Command = Literal["train", "prepare", "reference", "sft", "pairs"]


class Jobs:
    """The jobs of a cluster."""

    def __init__(self, address: str | None) -> None:
        """Connects.

        Args:
            address: Of its dashboard, e.g. http://127.0.0.1:8265; Ray's own rules when None (RAY_API_SERVER_ADDRESS,
                RAY_ADDRESS, a cluster on this machine).

        Raises:
            ConfigError: Nothing answers there, or not to us.
        """
        if address is not None and not re.match(r"https?://", address):
            raise ConfigError(f"--address is {address!r}: write http://{address}, of the cluster's dashboard")
        with _errors():
            self._client = JobSubmissionClient(address)

    def submit(self, config: Config, command: Command = "train") -> str:
        """Starts a command as a job. Of this machine's environment nothing goes with it.

        Args:
            config: The run.
            command: Of `dpo-ray`, what is to be done with it.

        Returns:
            The job's id.

        Raises:
            ConfigError: The cluster refuses.
        """
        with _errors(), tempfile.TemporaryDirectory(prefix="dpo_ray-job-") as folder:
            pack(config, folder)
            deadline = time.monotonic() + START_WAIT_S
            while True:
                try:
                    return self._client.submit_job(
                        entrypoint=f"dpo-ray {command} {CONFIG_NAME}",
                        submission_id=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
                        runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                        metadata={"run": config.run_uri},
                    )
                except RuntimeError as error:
                    # A cluster's dashboard answers some seconds before it takes jobs.
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(RECONNECT_S)

    def job(self, job_id: str) -> Job:
        """How a job stands.

        Raises:
            ConfigError: There is none of this id.
        """
        with _errors():
            found = self._client.get_job_info(job_id)
        started, ended = (moment / 1000 if moment else None for moment in (found.start_time, found.end_time))
        about = (found.metadata or {}).get("run", ""), started, ended, (found.message or "").strip()
        return Job(job_id, found.status.value.lower(), _exit_code(found), *about)

    def stop(self, job_id: str) -> None:
        """Asks a job to write a checkpoint and to end; does not wait.

        Raises:
            ConfigError: There is none of this id.
        """
        with _errors():
            self._client.stop_job(job_id)

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Hands on what a job writes until it ends, also over connections that break.

        Raises:
            ConfigError: There is no such job, or the cluster does not answer any more.
        """
        log = _Log(write)
        while True:
            with contextlib.suppress(aiohttp.ClientError, RuntimeError):
                asyncio.run(self._tail(job_id, log))
            found = self.job(job_id)
            if found.exit_code is not None:
                return found
            time.sleep(RECONNECT_S)

    async def _tail(self, job_id: str, log: _Log) -> None:
        log.begins()
        async for text in self._client.tail_job_logs(job_id):
            log.add(text)


class _Log:
    """A log that is handed on once, though each connection begins at its first line."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._written, self._seen = write, 0, 0

    def begins(self) -> None:
        """A connection begins."""
        self._seen = 0

    def add(self, text: str) -> None:
        """What comes next on this connection."""
        if new := text[max(0, self._written - self._seen) :]:
            self._write(new)
        self._seen += len(text)
        self._written = max(self._written, self._seen)


def _exit_code(details: JobDetails) -> int | None:
    if not details.status.is_terminal():
        return None
    if details.status == JobStatus.STOPPED:
        return 128 + signal.SIGTERM
    return 0 if details.status == JobStatus.SUCCEEDED else details.driver_exit_code or 1


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """One message in place of what the SDK raises."""
    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(f"the cluster does not let us in: {first_line(error)}") from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ConfigError(
            f"no Ray dashboard answers: {first_line(error)}; give --address http://HOST:8265, to which `ray "
            "dashboard` or an SSH tunnel leads"
        ) from None
    except (RuntimeError, RayError) as error:
        raise ConfigError(f"the cluster refuses: {first_line(error)}") from None


def local_places(config: Config) -> list[str]:
    """Places of a run that are paths, which must be the same on every node of a cluster."""
    data: Any = [pattern for _, pattern in config.data.sources]
    places = [config.storage_path, config.model.path, config.model.tokenizer, config.reference.path, *data]
    return [place for place in dict.fromkeys(places) if place is not None and "://" not in place]
