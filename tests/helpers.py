"""What several integration tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from typer.testing import CliRunner, Result

from dpo_ray.cli import app
from dpo_ray.config import Config, parse_config, to_yaml
from dpo_ray.demo_data import make_pairs
from dpo_ray.errors import RowError
from dpo_ray.pairs import store
from dpo_ray.pairs.formats import parse_row, recognise
from dpo_ray.pairs.store import PairStore, read_chunk
from dpo_ray.pairs.tokenize import Limits, PairTokenizer
from dpo_ray.types import TokenizedPair


def write_pairs(path: Path, num: int, held_out: bool = False) -> str:
    """Preference pairs of the demo as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(num, seed=1, held_out=held_out)))
    return str(path)


def tiny_config(storage_path: str, name: str, model: Path | str, pairs_file: str, **sections: dict[str, Any]) -> Config:
    """A float32 run of 20 steps on the tiny model; `sections` override keys."""
    raw: dict[str, Any] = {
        "name": name,
        "storage_path": storage_path,
        "model": {"path": str(model), "compute_dtype": "float32"},
        "data": {"train": [pairs_file], "eval_fraction": 0.1},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
        "train": {
            "global_batch_pairs": 12,
            "tokens_per_microbatch": 600,
            "max_steps": 20,
            "checkpoint_every_steps": 5,
            "eval_every_steps": 10,
        },
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_config(raw)


def tokenized(
    rows: Sequence[dict[str, str]], tokenizer: Any, chat_template: Any = "tokenizer", max_length: int = 512
) -> list[TokenizedPair | RowError]:
    """Rows as tokens, or why a row has none."""
    reading = recognise(rows)
    tokenize = PairTokenizer(tokenizer, chat_template, Limits(max_length))
    found: list[TokenizedPair | RowError] = []
    for row in rows:
        try:
            (made,) = tokenize([parse_row(row, reading)])
        except RowError as error:
            made = error
        found.append(made if isinstance(made, RowError) else made.pair)
    return found


def chunk_table(pairs: Sequence[TokenizedPair], source: str = "source") -> pa.Table:
    """Pairs as a chunk is written: sorted by id, each with the row of `source` that it came from."""
    ordered = sorted(pairs, key=lambda pair: pair.pair_id)
    table = store.table_of(ordered).append_column("source", pa.array([source] * len(ordered), pa.string()))
    return table.append_column("row", pa.array(range(len(ordered)), pa.int64()))


def dpo_ray_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user has it, with more environment variables."""
    command = [sys.executable, "-c", "from dpo_ray.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **environment}
    )


def command_here(name: str, config: Config, folder: Path) -> Result:
    """Runs a command in this process, with its Ray; an error stands in `exception`."""
    (folder / "run.yaml").write_text(to_yaml(config))
    return CliRunner().invoke(app, [name, str(folder / "run.yaml")])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The training steps of a run."""
    return [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def stored_scores(config: Config, pairs: PairStore) -> dict[bytes, list[float]]:
    """By pair, what a run's reference store holds for it."""
    from dpo_ray.orchestration.reference_filler import open_reference_store  # Ranks without Ray import this file too.

    reference, found = open_reference_store(config, pairs.uri), dict[bytes, list[float]]()
    for chunk in (*pairs.train, *pairs.eval):
        ids = [pair.pair_id for pair in read_chunk(pairs.uri, chunk)]
        found |= {pair: scores.tolist() for pair, scores in zip(ids, reference.get(chunk, ids), strict=True)}
    return found


def plain_logps(model: torch.nn.Module, pair: TokenizedPair) -> torch.Tensor:
    """Summed log-probability of each answer, one at a time through the model's own forward: Shape (2,)."""
    found = []
    for answer in pair.answers:
        whole = torch.tensor([*pair.prompt, *answer])
        logps = model(whole[None]).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(1, whole[len(pair.prompt) :, None]).sum())
    return torch.stack(found)


class JudgeServer:
    """`judge_server.py` as a process, and how tests speak with it."""

    def __init__(self, folder: Path) -> None:
        self._port_file = folder / "port"

    def __enter__(self) -> JudgeServer:
        script = Path(__file__).with_name("judge_server.py")
        self._process = subprocess.Popen([sys.executable, str(script), str(self._port_file)])
        deadline = time.monotonic() + 60
        while not self._port_file.exists():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{self._port_file.read_text()}"
        return self

    def __exit__(self, *details: object) -> None:
        self._process.kill()
        self._process.wait()

    def faults(self, *faults: dict[str, Any]) -> None:
        """What happens to the next requests; forgets those before."""
        request = urllib.request.Request(f"{self.url}/faults", json.dumps(faults).encode(), method="POST")
        urllib.request.urlopen(request).close()

    def seen(self) -> list[dict[str, Any]]:
        """The requests."""
        with urllib.request.urlopen(f"{self.url}/seen") as answer:
            found: list[dict[str, Any]] = json.load(answer)
            return found


def run_ranks(work: Callable[..., None], world_size: int, folder: Path, *arguments: Any) -> None:
    """Runs `work(rank, world_size, *arguments)` in processes joined by gloo; a failure in any is a failure here."""
    torch.multiprocessing.spawn(
        _rank, (work, world_size, str(folder / f"rendezvous-{uuid.uuid4().hex}"), arguments), nprocs=world_size
    )


def _rank(rank: int, work: Callable[..., None], world_size: int, rendezvous: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    work(rank, world_size, *arguments)
    torch.distributed.barrier()
    # Not through the interpreter's end: what is left of gloo's threads there has aborted a process that was done.
    sys.stdout.flush()
    os._exit(0)
