"""Storage behind a faulty network: what is asked again comes out as if nothing had happened, or ends with a message."""

from __future__ import annotations

import contextlib
import gzip
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from conftest import S3Server
from fault_proxy import FaultProxy

from dpo_ray import storage, storage_requests
from dpo_ray.errors import StorageError
from dpo_ray.orchestration.watch import warnings_to

pytestmark = pytest.mark.integration
BLOCK = 1 << 20


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server that the environment points at."""
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        # So that the tests are soon done.
        monkeypatch.setattr(storage_requests, "LONGEST_PAUSE_S", 0.1)
        monkeypatch.setattr(storage_requests, "ATTEMPTS_PER_REQUEST", 1)
        monkeypatch.setattr(storage, "STREAM_BLOCK_BYTES", BLOCK)
        fs, _ = storage.filesystem("s3://any/thing")
        fs.clear_instance_cache()
        yield proxy
        fs.clear_instance_cache()


@pytest.fixture
def place(proxy: FaultProxy, s3_server: S3Server, tmp_path: Path) -> str:
    return s3_server.uri(f"faults-{tmp_path.name}")


@contextlib.contextmanager
def outage(proxy: FaultProxy, seconds: float) -> Iterator[None]:
    """Refuses all connections from now on, for so long."""
    proxy.refuse()
    mending = threading.Timer(seconds, proxy.listen)
    mending.start()
    began = time.monotonic()
    yield
    assert time.monotonic() - began >= seconds, "it was not asked during the outage"
    mending.join()


def read_stream(uri: str, between: Callable[[], None] = lambda: None) -> bytes:
    pieces = []
    with storage.open_read(uri) as (file, _):
        pieces.append(file.read(BLOCK // 2))
        between()
        pieces.append(file.read())
    return b"".join(pieces)


def test_an_outage_is_waited_out(proxy: FaultProxy, place: str, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 * BLOCK + 17)
    (tmp_path / "here").write_bytes(content)
    object_, other = storage.join(place, "object"), storage.join(place, "other")
    storage.write_bytes(object_, content)

    def downloaded() -> bytes:
        storage.download(object_, str(tmp_path / "there"))
        return (tmp_path / "there").read_bytes()

    def stored(write: Callable[[], object]) -> bytes:
        write()
        return storage.read_bytes(other)

    requests: list[tuple[Callable[[], object], object]] = [
        (lambda: storage.read_bytes(object_), content),
        (lambda: storage.read_bytes(object_, 5, 9), content[5:9]),
        (lambda: storage.exists(object_), True),
        (lambda: storage.size(object_), len(content)),
        (lambda: storage.list_names(place), ["object"]),
        (lambda: [file.num_bytes for file in storage.expand(place + "/*")], [len(content)]),
        (lambda: [file.num_bytes for file in storage.expand(place)], [len(content)]),
        (downloaded, content),
        (lambda: read_stream(object_), content),
        (lambda: stored(lambda: storage.write_bytes(other, b"1")), b"1"),
        (lambda: stored(lambda: storage.upload(str(tmp_path / "here"), other)), content),
        (lambda: storage.remove(other), None),
        (lambda: storage.exists(other), False),
        (lambda: storage.create(other, b"2"), True),
        (lambda: storage.create(other, b"3"), False),
    ]
    for ask, expected in requests:
        with outage(proxy, 0.4):
            assert ask() == expected
    with outage(proxy, 2), pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(place, "missing"))


@pytest.mark.parametrize(("attempts", "num"), [(1, 9), (2, 3)])
def test_half_of_all_requests_fail(
    proxy: FaultProxy, place: str, attempts: int, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_requests, "ATTEMPTS_PER_REQUEST", attempts)
    proxy.inject("status", 503, probability=0.4)
    proxy.inject("reset", probability=0.1 / 0.6)
    for number in range(num):
        uri = storage.join(place, "folder", f"{number:02d}")
        assert storage.create(uri, f"first {number}".encode())
        assert not storage.create(uri, b"second")
        storage.write_bytes(uri, str(number).encode() * 1000)
        assert storage.read_bytes(uri) == str(number).encode() * 1000
        if number % 3 == 2:
            storage.remove(uri)
            assert not storage.exists(uri)
    left = [f"{number:02d}" for number in range(num) if number % 3 != 2]
    assert storage.list_names(storage.join(place, "folder")) == left
    # A listing that fails for one folder must not come out as a shorter one.
    for pattern in (place, place + "/*/*", place + "/**"):
        names = [storage.name_of(file.uri) for file in storage.expand(pattern)]
        assert [name for name in names if name != "folder"] == left
    assert proxy.injected["status"] > 3 * num
    assert proxy.injected["reset"] > 0


def test_answers_that_are_cut(proxy: FaultProxy, place: str, tmp_path: Path) -> None:
    content = random.Random(2).randbytes(2 * BLOCK)
    uri = storage.join(place, "object")
    storage.write_bytes(uri, content)
    for num_bytes in (0, 1000, len(content) - 1):
        proxy.inject("cut_answer", num_bytes, where="^GET .*object", times=2)
        assert storage.read_bytes(uri) == content
        proxy.inject("cut_answer", num_bytes, where="^GET .*object", times=2)
        storage.download(uri, str(tmp_path / "file"))
        assert (tmp_path / "file").read_bytes() == content
    assert proxy.injected["cut_answer"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_requests_that_are_cut(proxy: FaultProxy, place: str, tmp_path: Path) -> None:
    """The object is the old one or the new one, never a part."""
    uri = storage.join(place, "object")
    old, new = b"old" * 1000, random.Random(3).randbytes(2 * BLOCK)
    (tmp_path / "new").write_bytes(new)
    storage.write_bytes(uri, old)
    for num_bytes in (0, 1000, len(new) - 1):
        for write in (lambda: storage.write_bytes(uri, new), lambda: storage.upload(str(tmp_path / "new"), uri)):
            cut = proxy.inject("cut_request", num_bytes, where="^PUT .*object")
            with storage.patience(0.5), pytest.raises(StorageError):
                write()
            assert cut.count
            proxy.clear()
            assert storage.read_bytes(uri) == old
    proxy.inject("cut_request", 1000, where="^PUT .*object", times=2)
    storage.write_bytes(uri, new)
    assert storage.read_bytes(uri) == new


def test_an_upload_in_parts_is_begun_anew(
    proxy: FaultProxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above 100 MB s3fs uploads in parts of 50 MB. A part fails twice, then the answer to completion is lost."""
    monkeypatch.setattr(storage_requests, "ATTEMPTS_PER_REQUEST", 2)
    content = random.Random(4).randbytes(1 << 20) * 101
    (tmp_path / "large").write_bytes(content)
    uri = storage.join(place, "large")
    part = proxy.inject("cut_request", 1000, where="^PUT .*partNumber=2", times=2)
    lost = proxy.inject("lose_answer", where="^POST .*uploadId", times=1)
    storage.upload(str(tmp_path / "large"), uri)
    assert (part.count, lost.count) == (2, 1)
    storage.download(uri, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_stream_goes_on_where_it_stood(
    proxy: FaultProxy, place: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 256 KiB, of which there are more than four either way."""
    monkeypatch.setattr(storage, "STREAM_BLOCK_BYTES", 1 << 18)
    lines = [f"{number} {random.Random(number).randbytes(number % 50).hex()}\n".encode() for number in range(40_000)]
    plain = b"".join(lines)
    uri = storage.join(place, "lines.jsonl" + ending)
    storage.write_bytes(uri, gzip.compress(plain, compresslevel=1) if ending else plain)
    cut = proxy.inject("cut_answer", 5000, where="^GET .*lines", probability=0.5)
    with storage.open_read(uri) as (file, position):
        assert all(line == expected for line, expected in zip(file, lines, strict=True))
        assert position() == storage.size(uri)
    assert cut.count
    proxy.clear()

    def break_now() -> None:
        proxy.refuse()
        threading.Timer(1, proxy.listen).start()

    assert read_stream(uri, break_now) == plain


def test_a_stream_does_not_mix_two_objects(proxy: FaultProxy, place: str) -> None:
    uri = storage.join(place, "object")
    storage.write_bytes(uri, b"1" * 3 * BLOCK)
    with pytest.raises(StorageError, match="was changed while it was read"):
        read_stream(uri, lambda: storage.write_bytes(uri, b"2" * 3 * BLOCK))


def test_a_server_that_hangs_or_trickles(proxy: FaultProxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(place, "object")
    content = random.Random(5).randbytes(BLOCK)
    storage.write_bytes(uri, content)
    monkeypatch.setattr(storage_requests, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setattr(storage_requests, "REQUEST_S", 3.0)  # Ends a body that is not taken.
    asks: list[tuple[str, Callable[[], object]]] = [
        ("GET", lambda: storage.read_bytes(uri)),
        ("PUT", lambda: storage.write_bytes(uri, content)),
        ("GET", lambda: read_stream(uri)),
    ]
    for method, ask in asks:
        hang = proxy.inject("hang", where=f"^{method} .*object", times=1)
        began = time.monotonic()
        assert ask() in (None, content)
        assert hang.count == 1
        assert 1 <= time.monotonic() - began < 8
    # 1 MiB at 1 KB/s would take 17 minutes; it may take 1 s and 1 s more for its size.
    monkeypatch.setattr(storage_requests, "READ_TIMEOUT_S", 25.0)
    monkeypatch.setattr(storage_requests, "REQUEST_S", 1.0)
    for method, ask in asks:
        slow = proxy.inject("slow", 1000, where=f"^{method} .*object", times=1)
        began = time.monotonic()
        assert ask() in (None, content)
        assert slow.count == 1
        assert 1.9 <= time.monotonic() - began < 6
    assert storage.read_bytes(uri) == content


def test_a_slow_line_is_given_more_time(proxy: FaultProxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 200 KB/s, 600 KB take 3 s: more than 0.5 s + 0.57 s times 1, 2 and 4, less than with times 8."""
    uri = storage.join(place, "object")
    storage.write_bytes(uri, bytes(600_000))
    monkeypatch.setattr(storage_requests, "REQUEST_S", 0.5)
    monkeypatch.setenv("DPO_RAY_STORAGE_PATIENCE_S", "10")
    slow = proxy.inject("slow", 200_000, where="^GET .*object")
    assert storage.read_bytes(uri) == bytes(600_000)
    assert slow.count == 4


def test_a_long_download_is_no_standstill(
    proxy: FaultProxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 2 MB/s, 4 MB take 2 s; all the while parts come, and soon after nothing does."""
    monkeypatch.setattr(storage, "TRANSFER_PAUSE_S", 0.5)
    uri = storage.join(place, "object")
    storage.write_bytes(uri, bytes(4_000_000))
    proxy.inject("slow", 2_000_000, where="^GET .*object")
    thread = threading.Thread(target=storage.download, args=(uri, str(tmp_path / "object")))
    assert not storage.transferring()
    thread.start()
    time.sleep(1.3)
    assert storage.transferring()
    thread.join()
    time.sleep(0.6)
    assert not storage.transferring()
    assert (tmp_path / "object").stat().st_size == 4_000_000


def test_lost_answers_make_one_owner(proxy: FaultProxy, place: str) -> None:
    """Four threads, eight objects, every other answer lost."""
    lost = proxy.inject("lose_answer", probability=0.5)
    won: dict[tuple[int, int], bool] = {}

    def compete(rank: int) -> None:
        for number in range(8):
            won[rank, number] = storage.create(storage.join(place, str(number)), f"{rank} {number}".encode())

    threads = [threading.Thread(target=compete, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.clear()
    assert lost.count > 10
    for number in range(8):
        (winner,) = (rank for rank in range(4) if won[rank, number])
        assert storage.read_bytes(storage.join(place, str(number))) == f"{winner} {number}".encode()


def test_who_waits_is_told(proxy: FaultProxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(storage_requests, "TELL_AFTER_S", 0.5)
    monkeypatch.setattr(storage_requests, "TELL_EVERY_S", 1.0)
    with warnings_to(said.append), outage(proxy, 2.2):
        threads = [threading.Thread(target=storage.exists, args=(place,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    bucket = place.rpartition("/")[0]
    assert re.fullmatch(rf"{bucket} answers again after \d s", said[-1])
    assert 2 <= len(said) <= 4
    for message in said[:1]:
        assert message.startswith(f"{place}: cannot connect to {proxy.endpoint}: nothing listens")
        assert re.search(r"; tried for \d s, and again until 1800 s have passed$", message)
    said.clear()
    with warnings_to(said.append):
        assert not storage.exists(place)
    assert said == []


def test_patience_ends(proxy: FaultProxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_RAY_STORAGE_PATIENCE_S", "2")
    proxy.inject("status", 503)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"the server failed again and again.*answered 503\); tried for [12] s"):
        storage.exists(place)
    assert 1.5 < time.monotonic() - began < 60  # And not the half hour of the default.
    proxy.clear()
    monkeypatch.setenv("DPO_RAY_STORAGE_PATIENCE_S", "100")
    began = time.monotonic()
    with pytest.raises(StorageError, match="no such bucket"):
        storage.read_bytes("s3://no-such-bucket/object")
    assert time.monotonic() - began < 50
    monkeypatch.setenv("DPO_RAY_STORAGE_PATIENCE_S", "soon")
    proxy.refuse()
    with pytest.raises(StorageError, match="DPO_RAY_STORAGE_PATIENCE_S=soon: give a number of seconds"):
        storage.exists(place)


def test_what_is_being_handled_is_not_what_failed(proxy: FaultProxy, place: str) -> None:
    """Python links each new error to the one that is being handled."""
    storage.write_bytes(place, b"x")
    try:
        answer = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(answer, "GetObject")
    except ClientError:
        with outage(proxy, 0.4):
            assert storage.read_bytes(place) == b"x"


def test_the_first_write_of_a_run_finds_a_full_server_soon(
    proxy: FaultProxy, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_requests, "FIRST_WRITE_PATIENCE_S", 0.5)
    storage.check_reachable(place)
    proxy.inject("status", 500, where="^PUT ")
    with pytest.raises(StorageError, match="out of space or quota"):
        storage.create(storage.join(place, "object"), b"1")
    proxy.clear()
    storage.write_bytes(storage.join(place, "object"), b"1")
    proxy.inject("status", 500, where="^PUT ", times=6)
    monkeypatch.setattr(storage_requests, "FIRST_WRITE_PATIENCE_S", 0.0)
    storage.write_bytes(storage.join(place, "object"), b"2")
    assert storage.read_bytes(storage.join(place, "object")) == b"2"


def test_waiting_can_be_interrupted(proxy: FaultProxy, place: str) -> None:
    """By Ctrl-C, and by the end of the process for the threads that wait."""
    proxy.refuse()
    code = """
import logging, sys, threading
from dpo_ray import storage, storage_requests
storage_requests.TELL_AFTER_S = 0.0
logging.basicConfig(stream=sys.stdout, format="%(message)s")
threads = [threading.Thread(target=storage.exists, args=(sys.argv[1],)) for _ in range(2)]
if sys.argv[2] == "thread":
    for thread in threads:
        thread.start()
    sys.stdin.readline()
else:
    storage.exists(sys.argv[1])
"""
    for who in ("thread", "main"):
        process = subprocess.Popen(
            [sys.executable, "-c", code, place, who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Who runs the tests may ignore interrupts, as a shell has its background jobs do, and hands that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        assert process.stdin is not None
        assert b"nothing listens" in process.stdout.readline()
        deadline = time.monotonic() + 60
        # Python drops an interrupt that comes while it destroys an object: people press the keys again.
        while who == "main" and process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        errors = process.communicate(b"\n", timeout=60)[1]
        assert (b"KeyboardInterrupt" if who == "main" else b"nothing listens") in errors


def test_what_is_repeated_can_be_pickled() -> None:
    for function in (storage.exists, storage.create, storage.upload, storage.expand):
        assert pickle.loads(pickle.dumps(function)) is function


def test_no_thread_stays(proxy: FaultProxy, place: str) -> None:
    storage.exists(place)
    before, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    proxy.inject("status", 503, probability=0.5)
    for number in range(20):
        storage.write_bytes(storage.join(place, str(number)), b"x")
    assert threading.active_count() <= before
    assert len(os.listdir("/proc/self/fd")) <= files + 10
