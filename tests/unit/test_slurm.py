"""The Slurm script with stand-ins for Slurm and Ray: who is started where, with which token, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster/slurm.sh"
STAND_INS = {
    "scontrol": 'printf "%s\\n" node-a node-b node-c',
    "srun": "for each; do [[ $each == --nodelist=* ]] && node=${each#*=}; [[ $each == --* ]] && shift || break; done\n"
    'echo "$node $*" >>"$LOG"; NODE=$node exec "$@"',
    "ray": "case $1 in\n"
    "health-check) [[ -e $HOME/up ]] ;;\n"
    'start) [[ $NODE == "$BROKEN" ]] && exit 1; echo $$ >>"$HOME/pids"; touch "$HOME/up"; exec sleep 600 ;;\n'
    "esac",
    "dpo-ray": 'until (($(wc -l <"$HOME/pids") == 3)); do sleep 0.02; done\n'
    'echo "driver $RAY_ADDRESS $*" >>"$LOG"\n'
    'echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(umask)" >>"$LOG"\n'
    'cat "$RAY_AUTH_TOKEN_PATH" >"$HOME/token"; eval "$WORK"',
}


class Job:
    """The script as a batch job on three nodes."""

    def __init__(self, folder: Path, *arguments: str, work: str = "exit 0", broken: str = "") -> None:
        self.home, self._log = folder / "home", folder / "log"
        self.home.mkdir()
        self._log.touch()
        commands = folder / "bin"
        commands.mkdir()
        for name, text in STAND_INS.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (commands / name).chmod(0o755)
        environment = {
            **{"PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(self.home), "LOG": str(self._log)},
            **{
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "node-[a-c]",
                "SLURM_CPUS_PER_TASK": "4",
                "BROKEN": broken,
                "WORK": work,
            },
        }
        self.process = subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    @property
    def log(self) -> list[str]:
        """What was started, in order."""
        return self._log.read_text().splitlines()

    def ends(self) -> tuple[int, str]:
        """Exit code and errors; nothing that it started may still run, nothing of the token be left."""
        _, errors = self.process.communicate(timeout=30)
        pids = self.home / "pids"
        alive = [pid for pid in (pids.read_text().split() if pids.exists() else []) if Path(f"/proc/{pid}").exists()]
        assert not alive
        assert {path.name for path in self.home.iterdir()} <= {"up", "pids", "token"}
        return self.process.returncode, errors


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_run_on_three_nodes(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path, "my-run.yaml", "--set", "seed=1", work=f"exit {code}")
    assert job.ends() == (code, "")
    head, *others = job.log
    workers, (driver, auth) = sorted(others[:2]), others[2:]
    words = driver.split()
    address = words[1]
    host, port = address.split(":")
    assert words == ["driver", address, "train", "my-run.yaml", "--set", "seed=1"]
    assert head.startswith("node-a ray start ")
    assert {"--head", "--dashboard-host=127.0.0.1", f"--node-ip-address={host}", f"--port={port}"} <= set(head.split())
    assert not host.startswith("127.")
    for node, worker in zip(("node-b", "node-c"), workers, strict=True):
        assert worker.startswith(f"{node} ray start ")
        assert f"--address={address}" in worker.split()
    # What others make is as readable as ever.
    assert auth == f"token 600 {os.popen('umask').read().strip()}"
    token = (job.home / "token").read_text()
    assert len(token) == 64
    assert token not in "".join(job.log)


def test_slurms_notice_ends_all(tmp_path: Path) -> None:
    job = Job(tmp_path, "my-run.yaml", work="exec sleep 600")
    while not (job.home / "token").exists():
        time.sleep(0.02)
    job.process.send_signal(signal.SIGTERM)
    assert job.ends() == (143, "")


def test_a_head_that_does_not_start(tmp_path: Path) -> None:
    job = Job(tmp_path, "my-run.yaml", broken="node-a")
    assert job.ends() == (1, "error: Ray's head did not start on node-a; its output is above\n")
    assert len(job.log) == 1


def test_a_configuration_is_needed(tmp_path: Path) -> None:
    code, errors = Job(tmp_path).ends()
    assert code == 2
    assert errors.startswith("usage: sbatch cluster/slurm.sh CONFIG")
