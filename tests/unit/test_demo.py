"""The demo's verdict, on runs that are made up: it promises that a start by likelihood and then DPO do best."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dpo_ray import demo
from dpo_ray.config import Config
from dpo_ray.demo_data import PHRASES, all_requests
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.trainer import Result

REQUESTS = all_requests(held_out=True)


@pytest.mark.parametrize(
    ("accuracy", "shares", "said"),
    [
        (0.95, (0.25, 0.75, 0.0), None),
        (0.85, (0.25, 0.75, 0.0), "held-out accuracy 0.850 is below 0.9"),
        (0.95, (0.75, 0.75, 0.0), "answers follow the rule no more often than without DPO, or without the start"),
        (0.95, (0.25, 0.75, 0.75), "answers follow the rule no more often than without DPO, or without the start"),
    ],
)
def test_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: float, shares: tuple[float, ...], said: str | None
) -> None:
    share_of = dict(zip(("dpo-sft", "dpo", "dpo-alone"), shares, strict=True))

    def result(name: str, **rewards: float) -> Result:
        held_out = {"eval_logps/chosen": -1.0, **{f"eval_rewards/{key}": value for key, value in rewards.items()}}
        return Result(f"{tmp_path}/{name}", f"{tmp_path}/{name}/export", 1, {}, held_out, {})

    def train(config: Config, watcher: object) -> Result:
        return result(config.name, accuracies=1.0 if config.sft.epochs is None else accuracy, margins=1.0)

    def answer(path: str, prompts: list[str]) -> list[str]:
        right = [f"{PHRASES[each.act][each.language]}, {each.name}." for each in REQUESTS]
        num = round(share_of[Path(path).parent.name] * len(prompts))
        return [*right[:num], *["\x1b[2J"] * (len(prompts) - num)]

    monkeypatch.setattr(demo, "NUM_PAIRS", 10)
    monkeypatch.setattr(demo, "make_start", lambda config, watcher: result(config.start().name))
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "answer", answer)
    shown = StringIO()
    assert demo.run_demo(str(tmp_path / "demo"), Console(file=shown, width=200)) == (said is None)
    text = shown.getvalue()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert ["accuracy of the implicit reward", "", f"{accuracy:.3f}", "1.000"] in rows
    num = len(REQUESTS)
    assert ["answers that follow the rule", *(f"{round(share * num) / num:.3f}" for share in shares)] in rows
    assert "\x1b" not in text
    failures = [line for line in text.splitlines() if line.startswith(("held-out accuracy", "answers follow"))]
    assert failures == ([] if said is None else [said])


def test_only_a_demos_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match="is not empty and no earlier demo's: give another folder, or empty it"):
            demo.run_demo(str(folder), Console(file=StringIO()))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    demo._make_room(str(tmp_path / "new"))
    (tmp_path / "new" / "of-a-demo").touch()
    demo._make_room(str(tmp_path / "new"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [demo.MARK]
