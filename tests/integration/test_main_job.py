"""The whole way for real: SmolLM2-135M-Instruct, hh-rlhf on an S3 server, a Ray cluster of several raylets."""

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import S3Server
from helpers import tokenized
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

from dpo_ray import storage, train
from dpo_ray.config import parse_config
from dpo_ray.errors import RowError
from dpo_ray.model.files import load_tokenizer
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.store import open_store, read_chunk
from dpo_ray.types import TokenizedPair

pytestmark = [pytest.mark.integration, pytest.mark.shared, pytest.mark.timeout(1500)]
# In float32 a CPU core does some 60 GFLOP/s: a short pair costs it two seconds of training.
NUM_PAIRS, LONGEST, STEPS = 56, 100, 18


def short_rows(hh_rlhf: Path, model: Path) -> list[dict[str, str]]:
    """The first rows whose prompt and answers are short together; one that cannot become a pair is among them."""
    with gzip.open(hh_rlhf, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short, broken = [], []
    for row, pair in zip(rows, tokenized(rows, load_tokenizer(str(model)), max_length=1024), strict=True):
        if isinstance(pair, RowError):
            broken.append(row)
        elif pair.num_tokens < LONGEST:
            short.append(row)
    return [*short[: NUM_PAIRS - 1], broken[0]]


@pytest.fixture
def cluster() -> Cluster:
    """Three raylets: a head, one with room for the policy, one for the reference."""
    if ray.is_initialized():
        ray.shutdown()
    made = Cluster()
    made.add_node(num_cpus=2, include_dashboard=False)
    made.add_node(num_cpus=4, resources={"policy": 2})
    made.add_node(num_cpus=2, resources={"reference": 1})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_hh_rlhf_on_s3(s3_server: S3Server, smollm2: Path, hh_rlhf: Path, cluster: Cluster, tmp_path: Path) -> None:
    rows = short_rows(hh_rlhf, smollm2)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    storage.write_bytes(s3_server.uri("raw/hh-rlhf.jsonl.gz"), gzip.compress(lines))
    for path in smollm2.iterdir():
        storage.upload(str(path), s3_server.uri(f"models/smollm2/{path.name}"))
    config = parse_config(
        {
            "name": "hh",
            "storage_path": s3_server.uri("dpo"),
            "model": {"path": s3_server.uri("models/smollm2"), "compute_dtype": "float32"},
            "data": {
                "train": [s3_server.uri("raw/*.jsonl.gz")],
                "eval_fraction": 0.1,
                "chunk_pairs": 8,
                "max_reject_fraction": 0.02,
            },
            "reference": {"resources_per_replica": {"reference": 1}, "tokens_per_microbatch": 1500},
            "objective": {"beta": 0.1},
            "optimizer": {"learning_rate": 3e-5, "warmup_steps": 2},
            "train": {
                "global_batch_pairs": 4,
                "tokens_per_microbatch": 1000,
                "epochs": 2,
                "max_steps": STEPS,
                "eval_every_steps": STEPS,
                "checkpoint_every_steps": STEPS,
            },
            "scaling": {"workers": 2},
        }
    )
    actors = dict[str, dict[str, Any]]()

    class Reader(Watcher):
        def line(self, line: dict[str, Any]) -> None:
            if not actors:
                actors.update(ray._private.state.actors())

    result = train(config, Reader())
    assert result.steps == STEPS

    steps = [x for x in storage.read_json_lines(result.run_uri + "/metrics.jsonl") if "loss" in x]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    # Policy = reference at step 1.
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    # From step 14 on the pairs have been seen once.
    early, late = (sum(x["rewards/margins"] for x in part) / len(part) for part in (steps[:5], steps[-5:]))
    assert late > early + 0.1
    assert all(math.isfinite(line["loss"]) for line in steps)

    # A policy worker each, and the reference in a process of its own, on the node that has it.
    (reference,) = (actor for actor in actors.values() if actor["ActorClassName"] == "ReferenceReplica")
    workers = [actor for actor in actors.values() if "RayTrainWorker" in actor["ActorClassName"]]
    assert len({reference["Pid"], *(worker["Pid"] for worker in workers)}) == 3
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    assert "reference" in nodes[reference["Address"]["NodeID"]]["Resources"]

    stored = [file.uri for file in storage.expand(storage.join(config.store_uri, "reference"))]
    scored = [uri for uri in stored if uri.endswith(".parquet")]
    stored = [file.uri for file in storage.expand(storage.join(config.store_uri, "pairs"))]
    manifest = next(uri for uri in stored if uri.endswith("manifest.json"))
    store = open_store(os.path.dirname(manifest))
    assert store is not None
    assert len(scored) == len(store.train) + len(store.eval)
    # Both ranks wrote their shards of the checkpoint, of like size: the weights are sharded.
    files = storage.read_json(result.run_uri + "/checkpoints/step-00000018/manifest.json")["files"]
    sizes = sorted(about["size"] for name, about in files.items() if "/rank-" in name)
    assert len(sizes) == 2
    assert sizes[0] > 0.8 * sizes[1]

    # What became of the rows.
    counts = store.counts
    assert counts["rows"] == len(rows)
    assert counts["pairs"] + counts["eval_pairs"] + counts["rejects"] + counts["duplicates"] + counts[
        "identical"
    ] == len(rows)
    held = {pair.pair_id for chunk in store.eval for pair in read_chunk(store.uri, chunk)}
    everything = held | {pair.pair_id for chunk in store.train for pair in read_chunk(store.uri, chunk)}
    (first, *_) = tokenized(rows, load_tokenizer(str(smollm2)), max_length=1024)
    assert isinstance(first, TokenizedPair)
    assert first.pair_id in everything

    # The export in plain transformers: its log-probabilities are those that the policy had at its last evaluation.
    folder = tmp_path / "export"
    for file in storage.expand(result.export_uri):
        storage.download(file.uri, str(folder / os.path.basename(file.uri)))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    pairs = [pair for chunk in store.eval for pair in read_chunk(store.uri, chunk)]
    for index, name in enumerate(("chosen", "rejected")):
        total = 0.0
        for pair in pairs:
            ids = torch.tensor([*pair.prompt, *pair.answers[index]], dtype=torch.int64)
            with torch.no_grad():
                logps = model(ids[None]).logits[0].log_softmax(-1)
            predicted = logps[:-1].gather(1, ids[1:, None])[:, 0]
            total += float(predicted[len(pair.prompt) - 1 :].double().sum())
        assert result.eval_metrics[f"eval_logps/{name}"] == pytest.approx(total / len(pairs), rel=1e-5)
    assert (folder / "chat_template.jinja").exists()

    # How it ended is on record.
    assert storage.read_json(result.run_uri + "/outcome.json")["outcome"] == "finished"
    page = storage.read_bytes(result.run_uri + "/report.html").decode()
    assert f"{STEPS} of {STEPS} steps; the model is exported" in page
    assert (folder / "generation_config.json").exists()
    assert "library_name: transformers" in (folder / "README.md").read_text()
