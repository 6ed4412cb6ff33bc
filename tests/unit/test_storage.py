"""Storage on a local path and on a real S3 server: the same behaviour."""

import contextlib
import errno
import gzip
import math
import os
import socket
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from conftest import S3Server
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from dpo_ray import storage
from dpo_ray.errors import DataError, StorageError
from dpo_ray.storage_errors import explained, is_passing
from dpo_ray.training.record import Lines


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    server: S3Server = request.getfixturevalue("s3_server")
    return server.uri(f"storage-{tmp_path.name}")


def test_what_is_still_being_written_is_in_no_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, found = os.replace, []

    def replace_after_a_look(source: str, target: str) -> None:
        found.append((len(os.listdir(tmp_path)), storage.list_names(str(tmp_path))))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_a_look)
    storage.write_bytes(str(tmp_path / "a"), b"1")
    storage.write_bytes(str(tmp_path / "a"), b"2")
    assert found == [(1, []), (2, ["a"])]


def test_objects(place: str, tmp_path: Path) -> None:
    uri = storage.join(place, "a", "b.json")
    assert not storage.exists(uri)
    assert storage.list_names(place) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    storage.write_json(uri, {"b": 1, "a": [2]})
    assert storage.read_json(uri) == {"a": [2], "b": 1}
    before = storage.identity(uri)
    storage.write_bytes(uri, b"other")
    assert storage.read_bytes(uri) == b"other"
    assert storage.identity(uri) != before
    assert storage.list_names(place) == ["a"]
    assert storage.list_names(storage.join(place, "a")) == ["b.json"]

    (tmp_path / "here").write_bytes(b"x" * 1000)
    storage.upload(str(tmp_path / "here"), storage.join(place, "up", "there"))
    storage.download(storage.join(place, "up", "there"), str(tmp_path / "back" / "again"))
    assert (tmp_path / "back" / "again").read_bytes() == b"x" * 1000
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["again"]

    storage.remove(storage.join(place, "up"))
    assert not storage.exists(storage.join(place, "up", "there"))
    storage.remove(storage.join(place, "up"))


def test_parts_of_a_long_upload_are_signs_of_life(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """120 MB are 3 of s3fs' parts of 50 MiB, which tells the size first, and 15 of our pieces of 8 MiB."""
    gone: list[tuple[object, ...]] = []
    monkeypatch.setattr(storage, "part_went", lambda *parts: gone.append(parts))
    (tmp_path / "large").write_bytes(os.urandom(1000) * 120_000)
    uri = storage.join(place, "b", "large")
    storage.upload(str(tmp_path / "large"), uri)
    assert len(gone) == (15 if storage.is_local(uri) else 1 + 3)
    storage.download(uri, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()


def test_a_local_upload_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "target").write_bytes(b"old")

    def power_goes(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", power_goes)
        with pytest.raises(KeyboardInterrupt):
            storage.upload(str(tmp_path / "new"), str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == b"old"
    storage.upload(str(tmp_path / "new"), str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["new", "target"]


def test_what_grows_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "TRANSFER_PAUSE_S", 0.3)
    monkeypatch.setattr(storage, "_part_went_at", -math.inf)
    with storage.while_it_grows(str(tmp_path), look_s=0.02):
        time.sleep(0.1)
        assert not storage.transferring()
        (tmp_path / "a").write_bytes(b"1")
        time.sleep(0.1)
        assert storage.transferring()
        time.sleep(0.5)
        assert not storage.transferring()


def test_folders_that_killed_processes_leave_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Processes of their own: one is killed, one lives.
    hold = (
        "import signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from dpo_ray import storage\n"
        "with storage.scratch('save') as folder: print(folder, flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    killed, alive = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    left, used = ((each.stdout.readline() if each.stdout else "").strip() for each in (killed, alive))
    killed.kill()
    killed.wait()
    (tmp_path / "dpo_ray-report").mkdir()
    with storage.scratch("load") as new:
        assert {left, used, new} <= set(map(str, tmp_path.iterdir()))  # Of a minute ago at the most.
    monkeypatch.setattr(storage, "SCRATCH_S", -1.0)
    with storage.scratch("load") as new:
        assert set(map(str, tmp_path.iterdir())) == {used, new, str(tmp_path / "dpo_ray-report")}
    alive.kill()
    alive.wait()


def test_expand_and_decompress(place: str) -> None:
    storage.write_bytes(storage.join(place, "x.jsonl.gz"), gzip.compress(b"1\n2\n"))
    storage.write_bytes(storage.join(place, "deep", "y.jsonl"), b"3\n")
    assert [file.uri.removeprefix(place) for file in storage.expand(place)] == ["/deep/y.jsonl", "/x.jsonl.gz"]
    assert [file.uri.removeprefix(place) for file in storage.expand(place + "/*.gz")] == ["/x.jsonl.gz"]
    for pattern, found in {
        "/*/*.jsonl": ["/deep/y.jsonl"],
        "/d*p/?.jsonl": ["/deep/y.jsonl"],
        "/[xz].*": ["/x.jsonl.gz"],
        "/**/*.jsonl": ["/deep/y.jsonl"],
        "/dee*/y.jsonl": ["/deep/y.jsonl"],
    }.items():
        assert [file.uri.removeprefix(place) for file in storage.expand(place + pattern)] == found
    (file,) = storage.expand(storage.join(place, "x.jsonl.gz"))
    assert file.uri == storage.join(place, "x.jsonl.gz")
    assert (file.num_bytes, file.identity) == (storage.size(file.uri), storage.identity(file.uri))
    with storage.open_read(storage.join(place, "x.jsonl.gz")) as (file, _):
        assert list(file) == [b"1\n", b"2\n"]
    with pytest.raises(StorageError, match="no such file"):
        storage.expand(storage.join(place, "*.parquet"))


def test_json_lines_drop_what_will_be_done_again(place: str) -> None:
    uri = storage.join(place, "lines.jsonl")
    lines = Lines(uri, 0)
    for step in range(1, 6):
        lines.append({"step": step})
    lines.flush()
    again = Lines(uri, 3)
    again.append({"step": 4, "again": True})
    again.flush()
    assert storage.read_json_lines(uri) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_a_damaged_line_is_named(place: str) -> None:
    uri = storage.join(place, "lines.jsonl")
    storage.write_bytes(uri, b'{"step": 1}\n{"step"')
    with pytest.raises(DataError, match=r"lines.jsonl: damaged: line 2 is no JSON"):
        storage.read_json_lines(uri)


def test_one_of_many_creates_an_object(place: str) -> None:
    """Eight processes, twenty objects: each has one winner, and holds what that one wrote."""
    code = """
import sys
from dpo_ray import storage
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    print(storage.create(f"{sys.argv[1]}/{number}", f"{sys.argv[2]} wrote {number}".encode() * 1000))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, place, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    won = [process.communicate()[0].split() for process in processes]
    for number in range(20):
        (winner,) = (rank for rank in range(8) if won[rank][number] == "True")
        assert storage.read_bytes(f"{place}/{number}") == f"{winner} wrote {number}".encode() * 1000
    assert storage.list_names(place) == sorted(str(number) for number in range(20))


def test_a_repeated_request_knows_its_own_object(place: str) -> None:
    uri = storage.join(place, "deep", "once")
    assert storage.create(uri, b"ours")
    # As when the answer to the first request was lost.
    assert storage.create(uri, b"ours")
    assert not storage.create(uri, b"theirs")
    assert storage.read_bytes(uri) == b"ours"


@contextlib.contextmanager
def credentials(monkeypatch: pytest.MonkeyPatch, **changed: str) -> Iterator[None]:
    """Another identity; s3fs keeps its sessions, so that they are dropped before and after."""
    fs, _ = storage.filesystem("s3://any/thing")
    try:
        with monkeypatch.context() as context:
            for name, value in changed.items():
                context.setenv(name, value)
            fs.clear_instance_cache()
            yield
    finally:
        fs.clear_instance_cache()


def test_a_missing_bucket_is_not_a_missing_object(s3_server: S3Server) -> None:
    uri = "s3://no-such-bucket/folder/object"
    for request in (storage.exists, storage.read_bytes, storage.list_names, storage.expand, storage.remove):
        with pytest.raises(StorageError, match=f"{uri}: there is no such bucket"):
            request(uri)
    with pytest.raises(StorageError, match="there is no such bucket"):
        storage.expand("s3://no-such-bucket/*.jsonl")


def test_problems_are_explained(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    with pytest.raises(StorageError, match=r"nosuch://x/y: Protocol not known"):
        storage.read_bytes("nosuch://x/y")
    uri = s3_server.uri("denied")
    with credentials(monkeypatch, AWS_SECRET_ACCESS_KEY="wrong"):
        # Neither is told by the server: a HEAD has no room for a reason.
        for request in (storage.exists, storage.read_bytes, lambda uri: storage.write_bytes(uri, b"x")):
            with pytest.raises(StorageError, match=f"{uri}: the secret does not belong to the access key"):
                request(uri)
    with (
        credentials(monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:9"),
        pytest.raises(StorageError, match="cannot connect to http://127.0.0.1:9: nothing listens"),
    ):
        storage.check_reachable(uri)
    with pytest.raises(StorageError, match="^nosuch://x/y: ") as caught:
        storage.read_bytes("nosuch://name:password@x/y")
    assert "password" not in str(caught.value)
    # Nor in what led to it, which Ray writes into its logs.
    with pytest.raises(StorageError) as caught, explained("/x", storage.filesystem):
        raise OSError("http://me:password@host is gone")
    assert "password" not in "".join(traceback.format_exception(caught.value))


def test_what_may_not_be_deleted_is_told(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    """S3 answers a refused deletion with success, and the refusal inside."""
    uri = s3_server.uri("kept/object")
    storage.write_bytes(uri, b"x")
    reader = s3_server.identity("reader", s3_server.bucket, "Read", "List")
    with credentials(monkeypatch, **reader), pytest.raises(StorageError, match="could not be deleted.*DeleteObject"):
        storage.remove(uri)
    assert storage.exists(uri)


def test_a_hanging_server_is_given_up_at_the_start(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with (
            credentials(monkeypatch, AWS_ENDPOINT_URL=endpoint),
            pytest.raises(StorageError, match=f"{endpoint} does not answer"),
        ):
            storage.check_reachable("s3://any/thing")
        assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("code", "status", "passes"),
    [
        ("InternalError", 500, True),
        ("SlowDown", 503, True),
        ("503", 503, True),
        ("SomethingNew", 502, True),
        ("429", 429, True),
        ("RequestTimeout", 400, True),
        ("IncompleteBody", 400, True),
        ("NoSuchUpload", 404, True),
        ("ConditionalRequestConflict", 409, True),
        ("NotImplemented", 501, False),
        ("XMinioStorageFull", 507, False),
        ("QuotaExceeded", 503, False),
        ("AccessDenied", 403, False),
        ("NoSuchBucket", 404, False),
        ("NoSuchKey", 404, False),
        ("PreconditionFailed", 412, False),
        ("PermanentRedirect", 301, False),
        ("ExpiredToken", 400, False),
        ("RequestTimeTooSkewed", 403, False),
    ],
)
def test_answers_that_may_pass(code: str, status: int, passes: bool) -> None:
    """Whichever exception s3fs makes of them."""
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = ClientError(answer, "GetObject")
    assert is_passing(error, local=False) == passes
    assert is_passing(translate_boto_error(error), local=False) == passes


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (EndpointConnectionError(endpoint_url="http://x"), True),
        (ReadTimeoutError(endpoint_url="http://x"), True),
        (ClientPayloadError("cut"), True),
        (FSTimeoutError(), True),
        (ConnectionResetError(), True),
        (socket.gaierror(), True),
        (NoCredentialsError(), False),
        (FileNotFoundError(), False),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EIO, "the disk that is downloaded to"), False),
        (ssl.SSLCertVerificationError(), False),
        (ValueError(), False),
    ],
)
def test_failures_on_the_way_that_may_pass(error: Exception, passes: bool) -> None:
    assert is_passing(error, local=False) == passes


def test_a_shared_file_system_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]
    replace = os.replace

    def fail_first(source: str, target: str) -> None:
        if numbers:
            raise OSError(numbers.pop(), "not now")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_first)
    storage.write_bytes(str(tmp_path / "object"), b"x")
    assert not numbers
    for lasting in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
        # A second attempt would succeed.
        numbers.append(lasting)
        with pytest.raises(StorageError, match="space|permission|quota"):
            storage.write_bytes(str(tmp_path / "object"), b"y")
    assert storage.read_bytes(str(tmp_path / "object")) == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_a_patience_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError(errno.ESTALE, "not now")

    monkeypatch.setattr(os, "replace", fail)
    began = time.monotonic()
    with storage.patience(0.5), pytest.raises(StorageError, match="tried for|not now"):
        storage.write_bytes(str(tmp_path / "object"), b"x")
    assert time.monotonic() - began < 2


def test_places_that_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    inside = str(tmp_path / "file" / "deep" / "object")
    for request in (storage.exists, storage.read_bytes, lambda uri: storage.write_bytes(uri, b"x")):
        with pytest.raises(StorageError, match=f"a file stands where a folder is needed.*{tmp_path}/file"):
            request(inside)
    with pytest.raises(StorageError, match="a folder stands where a file is needed"):
        storage.write_bytes(str(tmp_path), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
