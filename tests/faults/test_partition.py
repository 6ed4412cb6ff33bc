"""Two hosts in network namespaces, and the link between them cut: one side goes on, the other writes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpo_ray.training import manifest
from faults.harness import Place, until

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
NEAR, FAR, BRIDGE = "dpo-near", "dpo-far", "dpo-bridge"
ADDRESS = {NEAR: "10.88.0.1", FAR: "10.88.0.2"}
# A head asks for a token where the machine has one, and who connects does not look for it. Gloo would take the address
# of the machine's name.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "net"}


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


class Hosts:
    """Two namespaces on a bridge in a third, so that a cut is silent: each still has its carrier."""

    def __init__(self, place: Place) -> None:
        self._environment = {**os.environ, **place.planted_environment("cluster"), **ENVIRONMENT}
        self._started: list[subprocess.Popen[bytes]] = []
        for name in (BRIDGE, *ADDRESS):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", BRIDGE, "link", "add", "bridge", "type", "bridge")
        ip("-n", BRIDGE, "link", "set", "bridge", "up")
        for name, address in ADDRESS.items():
            ip("-n", name, "link", "add", "net", "type", "veth", "peer", "name", name, "netns", BRIDGE)
            ip("-n", BRIDGE, "link", "set", name, "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "net")
            ip("-n", name, "link", "set", "net", "up")

    def ray(self, host: str, num_cpus: int) -> None:
        """Starts a raylet on a host, the head's on the near one."""
        role = ["--head", "--port=6379", "--include-dashboard=false"]
        if host == FAR:
            role = [f"--address={ADDRESS[NEAR]}:6379"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *role, f"--node-ip-address={ADDRESS[host]}"]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
        self._started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command],
                env=self._environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def cut(self) -> None:
        ip("-n", BRIDGE, "link", "set", FAR, "down")

    def heal(self) -> None:
        ip("-n", BRIDGE, "link", "set", FAR, "up")

    def processes(self, host: str, part: str) -> list[psutil.Process]:
        """Processes in a host's namespace whose title has `part`."""
        done = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True)
        found = []
        for pid in map(int, done.stdout.split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def close(self) -> None:
        for host in ADDRESS:
            for process in self.processes(host, ""):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for started in self._started:
            started.wait()
        for name in (BRIDGE, *ADDRESS):
            ip("netns", "del", name)


@pytest.fixture
def hosts(place: Place, twin: str) -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    for name in (BRIDGE, *ADDRESS):
        ip("netns", "del", name, check=False)
    made = Hosts(place)
    yield made
    made.close()


def test_a_cut_link(place: Place, twin: str, drivers: Any, hosts: Hosts) -> None:
    """Fault 7: a host that nobody hears any more, but whose storage it still reaches."""
    hosts.ray(NEAR, num_cpus=1)
    time.sleep(5)
    hosts.ray(FAR, num_cpus=1)
    until(lambda: hosts.processes(FAR, "ray::DashboardAgent"))
    time.sleep(3)
    scaling = {"workers": {"min": 1, "max": 2}, "grow_after_s": 600}
    config = place.config("cut", scaling=scaling, recovery={"hang_timeout_s": 10})
    environment = {"RAY_ADDRESS": f"{ADDRESS[NEAR]}:6379", **ENVIRONMENT}
    driver = place.start(config, prefix=("ip", "netns", "exec", NEAR), pace_s=0.5, **environment)
    drivers.append(driver)
    driver.wait_for_step(6)
    assert hosts.processes(FAR, "RayTrainWorker")
    hosts.cut()
    cut = time.time()
    noticed = driver.wait_for(lambda said: said["event"] == "warning" and "starting again" in said["text"])
    assert noticed["time"] - cut < 60
    driver.finish()
    place.assert_same_but_for_rounding("cut", twin)
    assert [attempt["world_size"] for attempt in place.attempts("cut")] == [2, 1]

    # The far side comes back: its worker is gone or goes, and has written nothing since.
    written = {path: path.stat().st_mtime_ns for path in Path(place.uri("cut")).rglob("*") if path.is_file()}
    hosts.heal()
    until(lambda: not hosts.processes(FAR, "RayTrainWorker"), timeout_s=180)
    assert written == {path: path.stat().st_mtime_ns for path in Path(place.uri("cut")).rglob("*") if path.is_file()}
    assert manifest.committed(place.uri("cut"))[-1] == "step-00000024"
