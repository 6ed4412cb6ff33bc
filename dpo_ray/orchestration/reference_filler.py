"""The reference filler: scores chunks in the plan's order into the reference store, beside the trainer.

It is a Ray Data job of its own with a pool of reference actors; nothing but the store connects it to the trainer, so
that a restart of the trainer leaves it alone, and it ends, releasing its devices, when all chunks are scored.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from typing import Any

import ray

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ReferenceFillError
from dpo_ray.model.files import weights_digest
from dpo_ray.orchestration.worker import final_error
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.store import Chunk, PairStore, read_chunk
from dpo_ray.reference.store import ReferenceStore, error_place, store_fingerprint


def open_reference_store(config: Config) -> ReferenceStore:
    """The store of the configured reference's scores."""
    digest = weights_digest(config.reference_path, storage.join(config.store_uri, "digests"))
    name = store_fingerprint(digest, config.reference_dtype, config.model.attention)
    return ReferenceStore(storage.join(config.store_uri, "reference", name))


def chunks_in_order_of_need(config: Config, plan: Plan, pairs: PairStore, position: int) -> list[Chunk]:
    """All chunks that training from `position` reads, those of the held-out pairs where they are first needed."""
    order = plan.chunks_in_order_of_need(position)
    every = config.train.eval_every_steps
    if every is None:
        return order
    before = sum(1 for _ in _until(order, every * plan.global_batch_pairs))
    return [*order[:before], *pairs.eval, *order[before:]]


def _until(order: Sequence[Chunk], num_pairs: int) -> list[Chunk]:
    taken, total = list[Chunk](), 0
    for chunk in order:
        if total >= num_pairs:
            break
        taken.append(chunk)
        total += chunk.num_pairs
    return taken


class _ScoreChunks:
    """One reference actor."""

    def __init__(self) -> None:
        # Not loaded here: of an actor that fails at its start Ray says more than what went wrong.
        self._scorer: Any = None

    def __call__(
        self, batch: dict[str, Any], config: Config, pairs_uri: str, reference: ReferenceStore
    ) -> dict[str, Any]:
        self._scorer = self._scorer or _load_scorer(config)
        counts = []
        for chunk in map(pickle.loads, batch["item"]):
            pairs = read_chunk(pairs_uri, chunk)
            reference.put(chunk, [pair.pair_id for pair in pairs], self._scorer.score(pairs))
            counts.append(len(pairs))
        return {"num_pairs": counts}


def _load_scorer(config: Config) -> Any:
    import torch  # Only the actor needs the model's libraries.

    from dpo_ray.reference.scorer import Scorer

    options = config.reference
    device = torch.device("cuda" if options.gpus_per_replica else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(options.cpus_per_replica)))
    attention = config.model.attention
    return Scorer(config.reference_path, config.reference_dtype, attention, options.tokens_per_microbatch, device)


def _message(error: BaseException) -> str:
    """What an error says, without what Ray says around it."""
    return str(final_error(error) or (str(error).strip() or type(error).__name__).splitlines()[-1])


class ReferenceFiller:
    """Fills the reference store in a thread of the driver."""

    def __init__(self, config: Config, pairs: PairStore, chunks: Sequence[Chunk], reference: ReferenceStore) -> None:
        """Looks what is missing.

        Args:
            config: The run.
            pairs: The pair store.
            chunks: What to score, in the order of need.
            reference: Where scores go.
        """
        self._config, self._pairs_uri, self._reference = config, pairs.uri, reference
        self.missing = reference.missing(chunks)
        self.scored_pairs = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="reference-filler", daemon=True)

    def start(self) -> None:
        """Begins; without missing chunks no actor or device is asked for."""
        storage.remove(error_place(self._config.run_uri))
        if self.missing:
            self._thread.start()

    def working(self) -> bool:
        """Whether reference actors have, or need, room."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Waits for the end.

        Raises:
            ReferenceFillError: Not all chunks could be scored.
        """
        if self._thread.ident is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises when the filler has stopped with an error.

        Raises:
            ReferenceFillError: Not all chunks will be scored.
        """
        if self.error is not None:
            raise ReferenceFillError(f"the reference stopped: {_message(self.error)}") from self.error

    def _fill(self) -> None:
        options = self._config.reference
        try:
            # One chunk a block, and no more blocks in flight than actors: chunks are then scored in order of need.
            chunks = [pickle.dumps(chunk) for chunk in self.missing]
            job = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
                _ScoreChunks,
                fn_args=(self._config, self._pairs_uri, self._reference),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    size=min(options.replicas, len(self.missing)), max_tasks_in_flight_per_actor=2
                ),
                num_cpus=options.cpus_per_replica,
                num_gpus=options.gpus_per_replica,
                resources=options.resources_per_replica,
            )
            job.context.execution_options.preserve_order = True
            job.context.target_max_block_size = 1
            for row in job.iter_rows():
                self.scored_pairs += row["num_pairs"]
        except BaseException as error:
            self.error = error
            # The waiting stream sees only storage.
            storage.write_json(error_place(self._config.run_uri), {"error": _message(error)})
