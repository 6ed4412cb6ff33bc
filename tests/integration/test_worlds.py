"""The same configuration with 1, 2, 3 and 4 workers: the same pairs in each global batch, the same losses."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import read_lines, steps_of, tiny_config, write_pairs
from safetensors.torch import load_file
from typer.testing import CliRunner

from dpo_ray import train
from dpo_ray.cli import app
from dpo_ray.pairs.store import open_store, read_chunk
from dpo_ray.storage import read_json_lines
from dpo_ray.training.kept import export_kept

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_worlds(tmp_path: Path, tiny_model: Path, local_ray: None) -> None:
    """200 pairs, about 180 to train on, batches of 12: 15 or 16 steps an epoch: 20 steps pass an epoch's end."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 200)
    stores = set()
    for workers in (1, 2, 3, 4):
        config = tiny_config(
            str(tmp_path),
            f"w{workers}",
            tiny_model,
            pairs,
            scaling={"workers": workers},
            train={"epochs": 2, "ledger": "full"},
        )
        result = train(config)
        assert result.steps == 20
        stores |= {path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.parquet")}
    scored = list((tmp_path / "store" / "reference").rglob("*.parquet"))
    manifest = next((tmp_path / "store" / "pairs").rglob("manifest.json"))
    store = open_store(str(manifest.parent))
    assert store is not None
    # The later runs found both stores and wrote neither: every file has one time of writing. Each chunk has two.
    assert len(stores) == len(scored) + 2 * (len(store.train) + len(store.eval))

    first = steps_of(tmp_path / "w1")
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first[-1]["rewards/margins"] > first[1]["rewards/margins"] + 0.1
    for workers in (2, 3, 4):
        steps = steps_of(tmp_path / f"w{workers}")
        assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in first], rel=1e-5)
        assert [line["num_tokens"] for line in steps] == [line["num_tokens"] for line in first]
    ledgers = [read_lines(tmp_path / f"w{workers}" / "ledger.jsonl") for workers in (1, 2, 3, 4)]
    for ledger in ledgers[1:]:
        assert [entry["pair_ids"] for entry in ledger] == [entry["pair_ids"] for entry in ledgers[0]]

    # Every pair once in the first epoch: no gap, no duplicate.
    num_pairs = sum(chunk.num_pairs for chunk in store.train)
    epoch = [pair_id for entry in ledgers[0][: -(-num_pairs // 12)] for pair_id in entry["pair_ids"]]
    everything = {p.pair_id.hex() for chunk in store.train for p in read_chunk(store.uri, chunk)}
    assert len(epoch) == num_pairs
    assert set(epoch) == everything
    assert read_json_lines(str(tmp_path / "w3" / "attempts.jsonl"))[0]["world_size"] == 3
    # The weights of two workers are sharded: each wrote about half of the checkpoint.
    shards = json.loads((tmp_path / "w2" / "checkpoints" / "step-00000020" / "manifest.json").read_text())["files"]
    sizes = sorted(about["size"] for name, about in shards.items() if "/rank-" in name)
    assert len(sizes) == 2
    assert sizes[0] > 0.8 * sizes[1]

    # The newest checkpoint, of two workers, makes the very model that the run has exported, in one process.
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["export", str(tmp_path / "w2")])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    kept, ended = (tmp_path / "w2" / each for each in ("exports/step-00000020", "export"))
    assert str(kept) in shown.output
    one, other = (load_file(folder / "model.safetensors") for folder in (kept, ended))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((kept / "exported.json").read_text()) == {"step": 20, "merged": True}
    # An earlier one is another model, in the folder that is asked for.
    (earlier, _) = sorted(path.name for path in (tmp_path / "w2" / "checkpoints").iterdir())
    assert export_kept(str(tmp_path / "w2"), earlier, str(tmp_path / "mine")) == (
        str(tmp_path / "mine"),
        int(earlier[5:]),
    )
    before = load_file(tmp_path / "mine" / "model.safetensors")
    assert not all(torch.equal(one[name], before[name]) for name in one)
