"""Mistakes with storage as a user makes them: one message that says what, where and how to mend it, and soon."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import S3Server
from helpers import tiny_config, write_pairs

from dpo_ray import storage
from dpo_ray.config import to_yaml

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]
# At once, and not after the patience with a storage that does not answer, which is half an hour. Imports take 7 s here.
SOON_S = 120


@pytest.fixture(scope="module")
def config_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    config = tiny_config(str(folder / "runs"), "run", tiny_model, write_pairs(folder / "pairs.jsonl", 60))
    (folder / "c.yaml").write_text(to_yaml(config))
    return folder / "c.yaml"


def train(config_file: Path, storage_path: str, environment: dict[str, str] | None = None, *wrapper: str) -> str:
    """What `train` says: it must end soon, with exit code 2, one message, and nothing that is secret."""
    base = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(config_file.parent)}
    base.update(environment or {})
    began = time.monotonic()
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", "from dpo_ray.cli import main; main()"]
        + ["train", str(config_file), "--set", f"storage_path={storage_path}"],
        env={name: value for name, value in base.items() if value},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - began < SOON_S
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error:") == 1
    assert base["AWS_SECRET_ACCESS_KEY"] not in done.stderr + done.stdout or not base["AWS_SECRET_ACCESS_KEY"]
    print(done.stderr)
    return done.stderr


def assert_nothing_was_written(uri: str) -> None:
    assert storage.list_names(uri) == []


def test_an_identity_that_may_only_read(s3_server: S3Server, config_file: Path) -> None:
    uri = s3_server.uri("read-only")
    said = train(config_file, uri, s3_server.identity("reader", s3_server.bucket, "Read", "List"))
    assert f"{uri}/run/lease/00000001.json: access denied" in said
    assert "grant it s3:GetObject, s3:PutObject" in said
    assert f"{s3_server.endpoint} answered AccessDenied" in said
    assert_nothing_was_written(uri)


def test_an_identity_without_rights(s3_server: S3Server, config_file: Path) -> None:
    uri = s3_server.uri("no-rights")
    said = train(config_file, uri, s3_server.identity("stranger", "another-bucket", "Read", "List", "Write"))
    assert f"{uri}/run/config.yaml: access denied" in said
    assert_nothing_was_written(uri)


def test_wrong_keys(s3_server: S3Server, config_file: Path) -> None:
    uri = s3_server.uri("wrong-keys")
    said = train(config_file, uri, {"AWS_SECRET_ACCESS_KEY": "notTheSecret0123456789"})
    assert "check AWS_SECRET_ACCESS_KEY" in said
    assert "answered SignatureDoesNotMatch" in said
    said = train(config_file, uri, {"AWS_ACCESS_KEY_ID": "NOBODY"})
    assert "check AWS_ACCESS_KEY_ID" in said
    assert "answered InvalidAccessKeyId" in said
    said = train(config_file, uri, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""})
    assert "no credentials" in said
    assert "set AWS_ACCESS_KEY_ID" in said
    assert_nothing_was_written(uri)


def test_an_endpoint_where_no_server_is(s3_server: S3Server, config_file: Path) -> None:
    uri = s3_server.uri("nowhere")
    said = train(config_file, uri, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert "cannot connect to http://127.0.0.1:9: nothing listens" in said
    assert "correct AWS_ENDPOINT_URL" in said
    said = train(config_file, uri, {"AWS_ENDPOINT_URL": "http://no-such-host.invalid"})
    assert "cannot connect to http://no-such-host.invalid: its name is not known" in said


def test_a_bucket_that_is_not_there(s3_server: S3Server, config_file: Path) -> None:
    said = train(config_file, "s3://no-such-bucket/runs")
    assert "s3://no-such-bucket/runs/run/config.yaml: there is no such bucket: create it" in said
    said = train(config_file, "s3://no-such-bucket")
    assert "there is no such bucket" in said


def test_a_server_that_is_full(s3_server: S3Server, config_file: Path) -> None:
    s3_server.admin("s3.bucket.create -name full", "s3.bucket.quota -name=full -op=set -sizeMB=1")
    storage.write_bytes("s3://full/much", bytes(2 << 20))
    # The server enforces quotas by itself too, once a minute, and then the command changes nothing and says nothing: so
    # look at the rules that writes obey. It needs no lock, for which it might wait long.
    deadline = time.monotonic() + 120
    while not re.search(r'"readOnly": +true', s3_server.admin("s3.bucket.quota.enforce -apply", "fs.configure")):
        assert time.monotonic() < deadline, "the server does not notice that the bucket is over its quota"
        time.sleep(1)
    # The server says no more than that it failed.
    said = train(config_file, "s3://full/runs")
    assert "s3://full/runs/run/lease/00000001.json: the server failed again and again" in said
    assert "out of space or quota" in said
    assert_nothing_was_written("s3://full/runs")


def test_a_local_disk_that_is_full(config_file: Path, tmp_path: Path) -> None:
    isolate = ["unshare", "-rm", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=64k none {tmp_path} &&"
    if subprocess.run([*isolate, f"{mount} true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are not allowed here")
    fill = f"dd if=/dev/zero of={tmp_path}/much bs=1k 2>/dev/null;"
    said = train(config_file, str(tmp_path / "runs"), {}, *isolate, f'{mount} {{ {fill} exec "$@"; }}', "sh")
    assert "no space left on this machine's disk: free some" in said
    assert f"{tmp_path}/runs/run" in said


def test_local_places_that_cannot_be_written(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    said = train(config_file, str(tmp_path / "file"))
    assert f"a file stands where a folder is needed: move it away, or choose another place ({tmp_path}/file)" in said
    (tmp_path / "locked").mkdir(mode=0o500)
    as_user = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("nothing is denied to root, and there is no setpriv")
        as_user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    said = train(config_file, str(tmp_path / "locked" / "runs"), {}, *as_user)
    assert "permission denied: give this user the rights" in said
    assert f"{tmp_path}/locked" in said
    assert list((tmp_path / "locked").iterdir()) == []


def test_schemes(config_file: Path) -> None:
    assert "Protocol not known: nosuch" in train(config_file, "nosuch://bucket/runs")
    said = train(config_file, "gs://bucket/runs")
    assert "gs:// needs a package that is not installed: Please install gcsfs" in said
