"""Hosts on one machine: each with a network, processes, mounts and a name of its own, on a bridge in a network apart.

    with Network("head", "worker-1", "laptop") as network:
        network["head"].power_on("ray", "start", "--head", "--block", ...)
        network["laptop"].run("ray", "job", "submit", ...)
        network["worker-1"].cut()

A packet leaves the bridge for these hosts and for this process alone, which has an address on it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from wire import Flow

DASHBOARD_PORT, GCS_PORT = 8265, 6379
# Of the agent on each node, which speaks HTTP too.
AGENT_PORT = 52365
READY_S = 60.0
SHARED_MEMORY = "400m"
OBJECT_STORE_BYTES = 100_000_000
# What a host has of this machine's environment; the rest is its own.
INHERITED = ("LANG", "PYTHONPATH", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Its arguments are the host's name and folder, and the command.
BOOT = f"""
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ray" /tmp/ray
mount -t tmpfs -o size={SHARED_MEMORY} shm /dev/shm
shift 2
exec "$@"
"""


def ip(*arguments: str) -> None:
    """Runs `ip`."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Host:
    """One of the hosts; off until a command powers it on."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.address = name, f"{network.subnet}.{number}"
        self._network, self._namespace = network, network.namespace(name)
        self._port = f"port-{number}"
        self.home = network.folder / name
        (self.home / "ray").mkdir(parents=True)
        # As a Debian machine knows itself, and nobody else.
        (self.home / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        self.own_environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
        self._machine: subprocess.Popen[bytes] | None = None
        self.log = self.home / "console.txt"

    @property
    def environment(self) -> dict[str, str]:
        """What a process of the host has."""
        found = {name: os.environ[name] for name in (*INHERITED, *CREDENTIALS) if name in os.environ}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**found, "PATH": path, "HOME": str(self.home), **self.own_environment}

    @property
    def prefix(self) -> tuple[str, ...]:
        """What makes of a command one of this host; with its first process all others die."""
        separate = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        boot = ("bash", "-c", BOOT, "boot", self.name, str(self.home))
        return ("ip", "netns", "exec", self._namespace, "unshare", *separate, *boot)

    def run(self, *command: str, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command on the host to its end."""
        return subprocess.run(
            [*self.prefix, *command],
            env={**self.environment, **environment},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def process(self, *command: str) -> subprocess.Popen[str]:
        """Starts a command on the host; what it writes can be read as it comes."""
        return subprocess.Popen(
            [*self.prefix, *command],
            env=self.environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def power_on(self, *command: str) -> None:
        """Starts the host with this command; what it writes goes to `log`."""
        assert self._machine is None, f"{self.name} is on"
        with self.log.open("ab") as log:
            self._machine = subprocess.Popen(
                [*self.prefix, *command],
                env=self.environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def power_off(self) -> None:
        """All processes of the host are gone at once, and none sees it coming."""
        assert self._machine is not None, f"{self.name} is off"
        self._machine.kill()
        self._machine.wait()
        self._machine = None
        shutil.rmtree(self.home / "ray")
        (self.home / "ray").mkdir()

    @property
    def is_on(self) -> bool:
        return self._machine is not None and self._machine.poll() is None

    def forget(self) -> None:
        """Takes note of a host that has ended by itself."""
        assert not self.is_on, f"{self.name} is on"
        if self._machine is not None:
            self.power_off()

    def cut(self) -> None:
        """Takes the cable out of the switch: neither side is told."""
        ip("-n", self._network.bridge, "link", "set", self._port, "down")

    def heal(self) -> None:
        """Puts it back."""
        ip("-n", self._network.bridge, "link", "set", self._port, "up")

    def attach(self) -> None:
        """Makes the host's network namespace and joins it to the bridge."""
        ip("netns", "add", self._namespace)
        self._network.callback(ip, "netns", "del", self._namespace)
        ip("-n", self._namespace, "link", "set", "lo", "up")
        bridge = self._network.bridge
        ip("-n", self._namespace, "link", "add", "eth0", "type", "veth", "peer", "name", self._port, "netns", bridge)
        ip("-n", bridge, "link", "set", self._port, "master", "bridge", "up")
        ip("-n", self._namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self._namespace, "link", "set", "eth0", "up")

    def ports(self) -> set[int]:
        """Ports that others can reach."""
        done = subprocess.run(
            ["ip", "netns", "exec", self._namespace, "ss", "-Hltn"], capture_output=True, text=True, check=True
        )
        places = [line.split()[3].rpartition(":") for line in done.stdout.splitlines()]
        return {int(port) for address, _, port in places if "127.0.0.1" not in address}


class Network(contextlib.ExitStack):
    """Hosts by their names; at its end they are off and nothing is left of them."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        # Of several test runs on a machine each has its own.
        self._key = f"dpo{os.getpid()}"
        self.subnet = f"10.77.{os.getpid() % 254 + 1}"
        self.bridge = self.namespace("bridge")
        self.folder = Path(tempfile.mkdtemp(prefix="dpo-ray-hosts-"))
        self._hosts = {name: Host(self, name, number) for number, name in enumerate(names, start=1)}

    def namespace(self, name: str) -> str:
        """What a host's network namespace is called on this machine."""
        return f"{self._key}-{name}"

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __enter__(self) -> Network:
        super().__enter__()
        Path("/tmp/ray").mkdir(exist_ok=True)
        with contextlib.ExitStack() as undo:
            undo.push(self)
            self.callback(shutil.rmtree, self.folder, ignore_errors=True)
            ip("netns", "add", self.bridge)
            self.callback(ip, "netns", "del", self.bridge)
            ip("-n", self.bridge, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.bridge, "link", "set", "bridge", "up")
            ip("link", "add", self._key, "type", "veth", "peer", "name", "here", "netns", self.bridge)
            ip("-n", self.bridge, "link", "set", "here", "master", "bridge", "up")
            ip("addr", "add", f"{self.subnet}.254/24", "dev", self._key)
            ip("link", "set", self._key, "up")
            for host in self:
                host.attach()
                self.callback(self._off, host)
            undo.pop_all()
        return self

    @contextlib.contextmanager
    def overheard(self) -> Iterator[dict[Flow, bytes]]:
        """What the hosts send each other over TCP during a `with` block; it is there when the block has ended."""
        found, place = dict[Flow, bytes](), self.folder / "overheard"
        listen = [sys.executable, str(Path(__file__).with_name("wire.py")), str(place)]
        process = subprocess.Popen(["ip", "netns", "exec", self.bridge, *listen])
        try:
            while not place.exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield found
            process.terminate()
            assert process.wait(timeout=60) == 0
            found |= {Flow(*flow): content for flow, content in pickle.loads(place.read_bytes()).items()}
        finally:
            process.kill()
            process.wait()
            place.unlink(missing_ok=True)

    @staticmethod
    def _off(host: Host) -> None:
        if host._machine is not None:
            host.power_off()


def needs_hosts() -> None:
    """Skips where hosts cannot be made."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare", "ss")):
        pytest.skip("hosts of their own need root, iproute2 and util-linux")
    probe = ["ip", "netns", "add", name := f"dpo{os.getpid()}-probe"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("hosts of their own need network namespaces, which this machine does not allow")
    ip("netns", "del", name)


class RayHosts:
    """A Ray cluster on hosts: the head has no room for work, each worker some CPUs."""

    def __init__(self, head: Host, workers: Sequence[Host], num_cpus: int = 2) -> None:
        """Starts nothing yet."""
        self.head, self.workers, self._num_cpus, self.token = head, list(workers), num_cpus, ""
        self.dashboard = f"http://{head.address}:{DASHBOARD_PORT}"

    def ask_for_a_token(self, *clients: Host) -> None:
        """The hosts of the cluster, and these, will have its token in a file, and authentication on."""
        self.token = secrets.token_hex(32)
        for host in (self.head, *self.workers, *clients):
            file = host.home / ".ray" / "auth_token"
            file.parent.mkdir()
            file.touch(mode=0o600)
            file.write_text(self.token)
            host.own_environment["RAY_AUTH_MODE"] = "token"

    def start(self) -> None:
        """Starts all hosts, and waits until the cluster has them."""
        role = ("--head", f"--port={GCS_PORT}", f"--dashboard-host={self.head.address}", "--num-cpus=0")
        self._power_on(self.head, *role, f"--dashboard-port={DASHBOARD_PORT}")
        # A worker that finds no head gives up.
        self._until(lambda: _listens(self.head.address, GCS_PORT))
        for worker in self.workers:
            self.add(worker)
        self._until(lambda: self.num_alive() == 1 + len(self.workers))

    def add(self, worker: Host) -> None:
        """Powers a worker on."""
        self._power_on(worker, f"--address={self.head.address}:{GCS_PORT}", f"--num-cpus={self._num_cpus}")

    def tells(self, path: str) -> bytes:
        """What the dashboard answers to who has the token."""
        request = urllib.request.Request(self.dashboard + path)
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=5) as answer:
            content: bytes = answer.read()
        return content

    def num_alive(self) -> int:
        """Nodes that are alive, as the dashboard says; 0 before it does."""
        with contextlib.suppress(OSError):
            found = json.loads(self.tells("/api/v0/nodes"))["data"]["result"]["result"]
            return sum(node["state"] == "ALIVE" for node in found)
        return 0

    def _power_on(self, host: Host, *options: str) -> None:
        common = (f"--node-ip-address={host.address}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--block")
        host.power_on("ray", "start", *options, *common, "--disable-usage-stats")

    def _until(self, look: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while not look():
            for host in (self.head, *self.workers):
                assert host.is_on or not host.log.exists(), host.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.head.log.read_text()[-4000:]
            time.sleep(0.1)


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((address, port), timeout=1).close()
        return True
    return False


def issue_certificates(hosts: Sequence[Host], folder: Path) -> Path:
    """Certificates of an authority of our own for hosts, by which Ray's servers and clients know one another.

    Returns:
        The authority's.
    """
    authority, key = folder / "authority.pem", folder / "authority.key"
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    _quietly(*new, "-subj", "/CN=authority", "-keyout", str(key), "-out", str(authority))
    for host in hosts:
        own, own_key = host.home / "host.pem", host.home / "host.key"
        names = f"subjectAltName=IP:{host.address},IP:127.0.0.1,DNS:localhost,DNS:{host.name}"
        signed = (
            "-subj",
            f"/CN={host.name}",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            names,
            "-CA",
            str(authority),
            "-CAkey",
            str(key),
        )
        _quietly(*new, *signed, "-keyout", str(own_key), "-out", str(own))
        own_key.chmod(0o600)
        host.own_environment |= {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(own),
            "RAY_TLS_SERVER_KEY": str(own_key),
            "RAY_TLS_CA_CERT": str(authority),
        }
    return authority


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
