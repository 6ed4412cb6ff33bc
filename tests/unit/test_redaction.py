"""What is taken out of texts and errors, and what stays in them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError, ErrorsWithoutSecrets, FinalError, RowError, first_line
from dpo_ray.redaction import secret_in, shown, without_secrets

CANARY = "canary-0123456789"


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    return CANARY


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:canary@host/x: refused", "http://host/x: refused"),
        ("url: /blob?X-Amz-Date=1&X-Amz-Signature=canary&x=1", "url: /blob?X-Amz-Date=1&X-Amz-Signature=***&x=1"),
        ("'https://h/b?sig=canary' (sv=1)", "'https://h/b?sig=***' (sv=1)"),
        ("(https://h/b?v=1&api-key=canary)", "(https://h/b?v=1&api-key=***)"),
        ("hf://datasets/a/b@main, s3://b/a:b@c?design=1", "hf://datasets/a/b@main, s3://b/a:b@c?design=1"),
        ("is it so? key=value", "is it so? key=value"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MY_JUDGE_KEY", "PGPASSWORD", "AZURE_STORAGE_CONNECTION_STRING"],
)
def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, CANARY)
    assert without_secrets(f"no {CANARY}!") == "no ***!"


def test_what_is_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files, and what is too short."""
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", "/etc/ray/host.key")
    monkeypatch.setenv("SHORT_TOKEN", "step")
    assert without_secrets("step 1: no /etc/ray/host.key") == "step 1: no /etc/ray/host.key"


def test_a_password_that_a_variable_has_in_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it stands alone, and whole where a shorter secret is a part of it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@host")
    monkeypatch.setenv("SHORT_TOKEN", CANARY[:8])
    assert without_secrets(f"401 for {CANARY}") == "401 for ***"


def test_errors_of_ours(token: str) -> None:
    for error in (ConfigError(f"no {token}"), FinalError(f"no {token}", 7)):
        assert error.args[0] == "no ***"
        assert pickle.loads(pickle.dumps(error)).args == error.args
    assert first_line(ValueError(f"no {token}\nand more")) == "no ***"


@ErrorsWithoutSecrets()
def fail(error: Exception, cause: Exception) -> None:
    raise error from cause


def test_what_leaves_a_process_holds_no_secret(token: str) -> None:
    """A message that has one is replaced with its traceback; a cause that has one is left out; others stay."""
    with pytest.raises(RuntimeError) as raised:
        fail(ValueError(f"no {token}"), OSError("of this"))
    assert token not in "".join(traceback.format_exception(raised.value))
    assert "ValueError: no ***" in str(raised.value)
    assert "OSError: of this" in str(raised.value)
    with pytest.raises(KeyError) as kept:
        fail(KeyError("x"), OSError(f"no {token}"))
    assert token not in "".join(traceback.format_exception(kept.value))
    with pytest.raises(KeyError) as whole:
        fail(KeyError("x"), OSError("of this"))
    assert isinstance(whole.value.__cause__, OSError)


def test_a_traceback_on_the_command_line(token: str) -> None:
    program = (
        "import dpo_ray.cli as cli, os\n"
        "def fail(): raise ValueError('no ' + os.environ['HF_TOKEN'])\n"
        "cli.app = fail\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: no ***\n")
    assert token not in done.stderr


def test_what_a_variable_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key of AWS may begin with a slash, a path to a key is none, and an object's key in a bucket is no secret."""
    path = tmp_path / "some.key"
    path.touch()
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": "/x7Kq2pL9vT4mN8s",
        "TLS_PRIVATE_KEY": str(path),
        "DATA_KEY": "datasets/ultrafeedback-2024",
        "OPENAI_KEY_2": "sk-0123456789abcdef",
    }.items():
        monkeypatch.setenv(name, value)
    said = f"/x7Kq2pL9vT4mN8s {path} datasets/ultrafeedback-2024 sk-0123456789abcdef"
    assert without_secrets(said) == f"*** {path} datasets/ultrafeedback-2024 ***"
    assert secret_in("s3://b/datasets/ultrafeedback-2024/a.jsonl") is None
    assert shown("https://me:p@ss@host/path@x") == "https://host/path@x"


@ErrorsWithoutSecrets()
def of_a_task() -> None:
    """What Ray makes of an error."""
    try:
        raise ConfigError("set required-key")
    except ConfigError as error:
        raise ValueError("a task failed: required-key") from error


def test_a_message_of_ours_is_not_lost_behind_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "required-")
    with pytest.raises(ConfigError, match=r"^set \*\*\*key$") as raised:
        of_a_task()
    assert raised.value.__suppress_context__


def test_a_row_s_reason_is_looked_through_where_it_is_read(token: str) -> None:
    error = RowError(f"column 'a' has {token}")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "column 'a' has ***"
