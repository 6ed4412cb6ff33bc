"""The S3 server of the tests is a real one, and the environment alone is enough to use it."""

from __future__ import annotations

import os

import fsspec
import pytest
from conftest import S3Server

pytestmark = pytest.mark.integration


def test_put_get_and_list_through_fsspec(s3_server: S3Server) -> None:
    fs, path = fsspec.core.url_to_fs(s3_server.uri("put-get-list"))
    names = [f"{path}/a.bin", f"{path}/deep/b.bin"]
    for name in names:
        fs.pipe_file(name, name.encode())
    assert sorted(fs.find(path)) == names
    assert [fs.cat_file(name) for name in names] == [name.encode() for name in names]
    assert fs.cat_file(names[0], start=2, end=5) == names[0].encode()[2:5]
    fs.rm(path, recursive=True)
    fs.invalidate_cache()
    assert not any(fs.exists(name) for name in names)


def test_an_object_in_several_parts_comes_back_whole(s3_server: S3Server) -> None:
    content = os.urandom(1 << 20) * 12
    fs, path = fsspec.core.url_to_fs(s3_server.uri("parts/large.bin"))
    with fs.open(path, "wb", block_size=5 << 20) as file:
        file.write(content)
    with fs.open(path, "rb") as file:
        assert file.read() == content


def test_wrong_credentials_are_refused(s3_server: S3Server) -> None:
    """A server that lets anyone in would hide mistakes in how credentials travel."""
    stranger = fsspec.filesystem("s3", key="stranger", secret="wrong", skip_instance_cache=True)
    with pytest.raises(PermissionError):
        stranger.pipe_file(f"{s3_server.bucket}/forbidden", b"x")
