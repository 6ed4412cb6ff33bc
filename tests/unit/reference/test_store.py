"""Where scores are kept: what decides them names the store, and nothing else does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_config
from safetensors.torch import load_file, save_file

from dpo_ray.errors import ConfigError, ScoresLostError
from dpo_ray.orchestration.reference_filler import open_reference_store
from dpo_ray.orchestration.reference_job import fill_reference
from dpo_ray.pairs.store import Chunk
from dpo_ray.reference import store as module
from dpo_ray.reference.store import ReferenceStore


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
    quantized = {"adapter": {"rank": 4, "quantize": "nf4"}, "reference": {"place": "adapter_off"}}
    places = {
        place(tmp_path, tiny_model),
        place(tmp_path, other),
        place(tmp_path, tiny_model, reference={"dtype": "bfloat16"}),
        open_reference_store(eager, "pairs").uri,
        place(tmp_path, tiny_model, objective={"ld_alpha": 0.5}),
        place(tmp_path, tiny_model, **quantized),
    }
    assert len(places) == 6
    # An adapter beside weights as they are has the scores of those.
    assert place(tmp_path, tiny_model, adapter={"rank": 4}, reference={"place": "adapter_off"}) in places
    with pytest.raises(ConfigError, match="adapter.quantize is nf4, .* nothing can be scored ahead of it"):
        fill_reference(tiny_config(str(tmp_path), "run", tiny_model, "pairs.jsonl", **quantized))
    # Scores of tokens are good for any.
    assert place(tmp_path, tiny_model, objective={"ld_alpha": 0.1}) in places


def test_who_waits_for_what_nobody_mends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged scores end the wait where no filler makes them again; scores that are still to come do not."""
    monkeypatch.setattr(module, "MISSING_S", 0.0)
    chunk, ids = Chunk("train-000000.parquet", "key", "", 1, 1), [b"0" * 16]
    reference = ReferenceStore(str(tmp_path), filled_beside=False)
    looks = list[int]()

    def check() -> None:
        looks.append(1)
        if len(looks) == 3:
            reference.put(chunk, ids, [np.array([-1.0, -2.0], dtype=np.float32)])

    (scores,), _ = reference.wait(chunk, ids, check, poll_s=0.01)
    assert scores.tolist() == [-1.0, -2.0]
    assert not reference.damaged([chunk])
    Path(reference.place("key")).write_bytes(b"damaged")
    with pytest.raises(ScoresLostError, match="key.parquet: the scores are refused"):
        reference.wait(chunk, ids, check, poll_s=0.01)
    assert reference.damaged([chunk])
    assert not reference.damaged([Chunk("train-000001.parquet", "other", "", 1, 1)])
    assert reference.missing([chunk]) == [chunk]
    reference.put(chunk, ids, scores[None])
    assert not reference.damaged([chunk])


def test_of_two_that_score_a_chunk_the_first_is_believed(tmp_path: Path) -> None:
    """Packed otherwise the same pairs have other scores, by rounding: who reads again finds what it has found."""
    chunk, ids = Chunk("train-000000.parquet", "key", "", 1, 1), [b"0" * 16]
    reference, first = ReferenceStore(str(tmp_path)), np.array([-1.0, -2.0], dtype=np.float32)
    reference.put(chunk, ids, [first])
    reference.put(chunk, ids, [first + 1])
    assert reference.get(chunk, ids)[0].tolist() == [-1.0, -2.0]
    # Not what nobody can read.
    Path(reference.place("key")).write_bytes(b"damaged")
    reference.put(chunk, ids, [first + 1])
    assert reference.get(chunk, ids)[0].tolist() == [0.0, -1.0]
