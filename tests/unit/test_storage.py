"""Storage on a local path and on a real S3 server: the same behaviour."""

import gzip
from pathlib import Path

import pytest
from conftest import S3Server

from dpo_ray import storage
from dpo_ray.errors import StorageError


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    server: S3Server = request.getfixturevalue("s3_server")
    return server.uri(f"storage-{tmp_path.name}")


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


def test_expand_and_decompress(place: str) -> None:
    storage.write_bytes(storage.join(place, "x.jsonl.gz"), gzip.compress(b"1\n2\n"))
    storage.write_bytes(storage.join(place, "deep", "y.jsonl"), b"3\n")
    assert [uri.removeprefix(place) for uri in storage.expand(place)] == ["/deep/y.jsonl", "/x.jsonl.gz"]
    assert [uri.removeprefix(place) for uri in storage.expand(place + "/*.gz")] == ["/x.jsonl.gz"]
    assert storage.expand(storage.join(place, "x.jsonl.gz")) == [storage.join(place, "x.jsonl.gz")]
    with storage.open_read(storage.join(place, "x.jsonl.gz")) as file:
        assert list(file) == [b"1\n", b"2\n"]
    with pytest.raises(StorageError, match="no such file"):
        storage.expand(storage.join(place, "*.parquet"))


def test_json_lines_drop_what_will_be_done_again(place: str) -> None:
    uri = storage.join(place, "lines.jsonl")
    lines = storage.JsonLines(uri, 0)
    for step in range(1, 6):
        lines.append({"step": step})
    lines.flush()
    again = storage.JsonLines(uri, 3)
    again.append({"step": 4, "again": True})
    again.flush()
    assert storage.read_json_lines(uri) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_problems_are_explained(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    with pytest.raises(StorageError, match=r"nosuch://x/y"):
        storage.read_bytes("nosuch://x/y")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    # Another bucket name makes s3fs open a new session, with the wrong secret.
    uri = s3_server.uri("denied")
    fs, _ = storage.filesystem(uri)
    fs.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=uri):
            storage.write_bytes(uri, b"x")
    finally:
        fs.clear_instance_cache()
