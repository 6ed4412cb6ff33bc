"""Which checkpoint of a run is exported."""

from pathlib import Path

import pytest

from dpo_ray import storage
from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.training import manifest
from dpo_ray.training.kept import chosen, read_run
from dpo_ray.training.manifest import FileRecord, Manifest
from dpo_ray.types import TrainState


def test_the_best_the_newest_or_the_one_that_is_named(tmp_path: Path) -> None:
    def config(keep_best: str | None) -> Config:
        data = {"train": ["a.jsonl"], "eval": ["b.jsonl"]}
        raw = {"name": "run", "storage_path": str(tmp_path), "model": {"path": "m"}, "data": data}
        return parse_config(raw | {"train": {"keep_best": keep_best, "eval_every_steps": 10}})

    with pytest.raises(ConfigError, match=r"run has no checkpoint yet: `dpo-ray train` makes them"):
        chosen(config(None), None)
    with pytest.raises(ConfigError, match=r"run has no checkpoint yet"):
        chosen(config(None), "step-00000010")
    for step in (10, 20, 30):
        state = TrainState(step, 0, best_metric="eval_loss", best_step=20, best_value=0.5)
        file = f"{manifest.attempt_folder(0)}/rank-0000.safetensors"
        name = manifest.checkpoint_name(step)
        storage.write_bytes(storage.join(manifest.checkpoint_uri(f"{tmp_path}/run", name), file), b"x")
        manifest.commit(f"{tmp_path}/run", Manifest(state, 0, 1, {file: FileRecord(1, "0")}), lambda: None)
    assert chosen(config(None), None) == "step-00000030"
    assert chosen(config("eval_loss"), None) == "step-00000020"
    # The best one by another metric.
    assert chosen(config("eval_rewards/accuracies"), None) == "step-00000030"
    assert chosen(config("eval_loss"), "step-00000010") == "step-00000010"
    with pytest.raises(
        ConfigError, match="no checkpoint step-00000040; it has step-00000010, step-00000020, step-0000"
    ):
        chosen(config(None), "step-00000040")


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the directory of a run: it has no config.yaml"):
        read_run(str(tmp_path))
    for text, message in (("a: [", "config.yaml: damaged"), ("name: x", "config.yaml: not what a run writes there")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            read_run(str(tmp_path))
