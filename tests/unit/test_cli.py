"""What a command refuses before anything begins: one message on stderr, and the exit code of a user's mistake."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config

from dpo_ray.cli import main
from dpo_ray.config import to_yaml


@pytest.mark.parametrize(
    ("command", "sections", "message"),
    [
        ("sft", {}, "sft.epochs is null: set how many passes the start by likelihood shall make, e.g. 1"),
        ("pairs", {}, "pairs.prompts is not set: say where prompts are"),
        ("pairs", {"pairs": {"prompts": ["p.jsonl"]}}, "pairs.judge is not set: say where the judge is"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    sections: dict[str, Any],
    message: str,
) -> None:
    config = tiny_config(str(tmp_path / "storage"), "run", tmp_path / "model", "pairs.jsonl", **sections)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    monkeypatch.setattr(sys, "argv", ["dpo-ray", command, str(file)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no run is there; give a run's folder, <storage_path>/<name>"),
        (["a", "b"], "dpo-ray report: give one run, or several with --compare and --output"),
        (["a", "b", "--compare"], "dpo-ray report: --compare and --output go together"),
        (["a", "--output", "x.html"], "dpo-ray report: --compare and --output go together"),
        (["a", "--compare", "--output", "x.html"], "dpo-ray report --compare: give two runs or more"),
    ],
)
def test_refusals_of_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo-ray", "report", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []
