"""A line of a log says whose it is, is one line, and holds no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from ray._common.formatters import JSONFormatter

from dpo_ray.orchestration.logs import log_as

SECRET = "s3cr3t-0123456789"


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    """What the root logger's only handler writes; logging is afterwards as it was."""
    root, package, make = logging.getLogger(), logging.getLogger("dpo_ray"), logging.getLogRecordFactory()
    handlers, level, written = root.handlers[:], package.level, io.StringIO()
    root.handlers[:] = [logging.StreamHandler(written)]
    yield written
    root.handlers[:] = handlers
    package.setLevel(level)
    logging.setLogRecordFactory(make)


def test_whose_a_line_is(console: io.StringIO) -> None:
    collected = io.StringIO()
    handler = logging.StreamHandler(collected)
    handler.setFormatter(JSONFormatter())
    logging.getLogger().addHandler(handler)
    log_as(run="run", attempt=3, rank=1)
    logging.getLogger("dpo_ray.somewhere").info("step %d\nis %s", 7, "done")
    (line,) = console.getvalue().splitlines()
    assert line.endswith(r" INFO run=run attempt=3 rank=1 dpo_ray.somewhere: step 7\nis done")
    found = json.loads(collected.getvalue())
    assert {key: found[key] for key in ("run", "attempt", "rank", "message")} == {
        "run": "run",
        "attempt": 3,
        "rank": 1,
        "message": "step 7\nis done",
    }


def test_no_secret_is_logged(console: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "PGPASSWORD", "MY_SECRET"):
        monkeypatch.setenv(name, f"{SECRET}-{name.lower()}")
    monkeypatch.setenv("SHORT_TOKEN", "step")
    log_as(run="run")
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "PGPASSWORD", "MY_SECRET"):
        logging.getLogger("dpo_ray").warning("no step with %s", f"{SECRET}-{name.lower()}")
    logging.getLogger("dpo_ray").warning("no step to https://me:%s@host/step", SECRET)
    assert SECRET not in console.getvalue()
    assert console.getvalue().count("no step with ***") == 5
    assert "no step to https://host/step" in console.getvalue()
