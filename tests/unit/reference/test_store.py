"""Where scores are kept: what decides them names the store, and nothing else does."""

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config
from safetensors.torch import load_file, save_file

from dpo_ray.orchestration.reference_filler import open_reference_store


def place(storage_path: Path, model: Path, **sections: Any) -> str:
    return open_reference_store(tiny_config(str(storage_path), "run", model, "pairs.jsonl", **sections), "pairs").uri


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"beta": 0.5}},
        {"objective": {"loss": "ipo"}},
        {"optimizer": {"learning_rate": 1.0}},
        {"train": {"global_batch_pairs": 7, "epochs": 9}},
        {"scaling": {"workers": 4}},
        {"data": {"train": ["s3://elsewhere/x.jsonl"]}},
    ],
)
def test_what_does_not_matter_hits(tmp_path: Path, tiny_model: Path, sections: dict[str, Any]) -> None:
    assert place(tmp_path, tiny_model, **sections) == place(tmp_path, tiny_model)


def test_what_matters_misses(tmp_path: Path, tiny_model: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert place(tmp_path, other) == place(tmp_path, tiny_model)  # A copy elsewhere is the same model.
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = tiny_config(str(tmp_path), "run", tiny_model, "pairs.jsonl")
    eager = config.model_copy(update={"model": config.model.model_copy(update={"attention": "eager"})})
    places = {
        place(tmp_path, tiny_model),
        place(tmp_path, other),
        place(tmp_path, tiny_model, reference={"dtype": "bfloat16"}),
        open_reference_store(eager, "pairs").uri,
    }
    assert len(places) == 4
