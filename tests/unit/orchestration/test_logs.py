"""A line of a log says whose it is, is one line, and holds no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from ray._common.formatters import JSONFormatter
from ray._private.log import PlainRayHandler

from dpo_ray.orchestration.logs import log_as

SECRET = "s3cr3t-0123456789"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root, package, make = logging.getLogger(), logging.getLogger("dpo_ray"), logging.getLogRecordFactory()
    handlers, level = root.handlers[:], package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)
    logging.setLogRecordFactory(make)


def handle(*handlers: logging.Handler) -> None:
    """The root logger's handlers, pytest's own aside."""
    logging.getLogger().handlers[:] = handlers


def json_handler(target: io.StringIO) -> logging.Handler:
    handler = logging.StreamHandler(target)
    handler.setFormatter(JSONFormatter())
    return handler


def test_whose_a_line_is(capsys: pytest.CaptureFixture[str]) -> None:
    handle(PlainRayHandler())  # As in a worker of Ray Train's.
    log_as(run="run", attempt=3, rank=1)
    logging.getLogger("dpo_ray.somewhere").info("step %d\nis %s", 7, "done", extra={"rank": 5})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r" INFO run=run attempt=3 rank=1 dpo_ray.somewhere: step 7\nis done")


def test_a_job_that_wants_json_gets_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    collected = io.StringIO()
    handle(json_handler(collected))
    log_as(run="run", attempt=3, rank=1)
    logging.getLogger("dpo_ray.somewhere").info("step %d\nis %s", 7, "done")
    found = json.loads(collected.getvalue())
    assert {key.removeprefix("dpo_"): found[key] for key in ("dpo_run", "dpo_attempt", "dpo_rank", "message")} == {
        "run": "run",
        "attempt": 3,
        "rank": 1,
        "message": "step 7\nis done",
    }
    assert capsys.readouterr().err == ""


def test_no_secret_is_logged(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "PGPASSWORD", "MY_SECRET"):
        monkeypatch.setenv(name, f"{SECRET}-{name.lower()}")
    monkeypatch.setenv("SHORT_TOKEN", "step")
    handle()
    log_as(run="run")
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "PGPASSWORD", "MY_SECRET"):
        logging.getLogger("dpo_ray").warning("no step with %s", f"{SECRET}-{name.lower()}")
    logging.getLogger("dpo_ray").warning("no step to https://me:%s@host/step", SECRET)
    try:
        raise ValueError(f"no model for {SECRET}-hf_token")
    except ValueError:
        logging.getLogger("somebody.else").exception("failed")
    told = capsys.readouterr().err
    assert SECRET not in told
    assert "ValueError: no model for ***" in told
    assert told.count("no step with ***") == 5
    assert "no step to https://host/step" in told
