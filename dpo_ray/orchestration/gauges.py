"""What Prometheus sees of a run: gauges, kept by the driver from what it is told, exported by Ray on its node.

metrics.jsonl stays the truth; nothing is measured for a gauge, and nothing waits for one. Ray puts `ray_` before a
name, and drops a gauge that is not set again within some 20 seconds: what a driver leaves behind is gone soon after
it, and no alert stays. (Counters and histograms of Ray's would stay as long as the node: there are none here.) Nor does
Ray export what is not a number: whether the loss is finite is a gauge of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import ray
from ray.util.metrics import Gauge

from dpo_ray.config import Config
from dpo_ray.errors import NonFiniteLossError, StoppedError
from dpo_ray.orchestration.watch import SourcePreview, Watcher
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.store import PairStore
from dpo_ray.types import Attempt

# Well within the time after which Ray takes a gauge for stale.
REFRESH_S = 5.0
# How an attempt may end (see `group.End`), and an error that ends the run.
FAILURES = ("worker", "node", "hang", "storage", "memory", "ray", "final")

# Name -> its labels besides `run`, and what it is. Units are in the names, as Prometheus has them.
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "dpo_step": ((), "Optimizer steps done."),
    "dpo_steps_planned": ((), "Optimizer steps at which training ends."),
    "dpo_epoch": ((), "Epochs done, including the fraction."),
    "dpo_trained_tokens": ((), "Tokens trained on so far, prompts once per pair."),
    "dpo_loss": ((), "Mean loss of the last step's pairs."),
    "dpo_loss_finite": ((), "0 when a loss or gradient that is not finite has ended the run, else 1."),
    "dpo_reward_chosen": ((), "Mean implicit reward of the chosen answers in the last step."),
    "dpo_reward_rejected": ((), "Mean implicit reward of the rejected answers in the last step."),
    "dpo_reward_margin": ((), "Mean reward of chosen less rejected answers in the last step."),
    "dpo_reward_accuracy": ((), "Share of the last step's pairs whose chosen answer has the higher reward."),
    "dpo_grad_norm": ((), "Norm of the last step's gradient before clipping."),
    "dpo_learning_rate": ((), "Learning rate of the last step."),
    "dpo_eval_loss": ((), "Mean loss of the held-out pairs at the last evaluation."),
    "dpo_eval_reward_margin": ((), "Mean reward of chosen less rejected held-out answers."),
    "dpo_eval_reward_accuracy": ((), "Share of held-out pairs whose chosen answer has the higher reward."),
    "dpo_step_seconds": ((), "Seconds of the last step, from the end of the one before."),
    "dpo_data_wait_seconds": ((), "Seconds of the last step in which rank 0 waited for its pairs."),
    "dpo_reference_wait_seconds": ((), "Seconds of that wait that were for scores of the reference."),
    "dpo_pairs_per_second": ((), "Pairs of the last step by its seconds."),
    "dpo_tokens_per_second": ((), "Different tokens of the last step by its seconds."),
    "dpo_mfu_ratio": ((), "Model FLOPs utilisation of the last step."),
    "dpo_slowest_rank": ((), "The rank that computed longest in the step before the last."),
    "dpo_rank_spread_ratio": ((), "How long it computed, by the median of the ranks."),
    "dpo_last_step_timestamp_seconds": ((), "When the last step ended; before it, when its worker group was started."),
    "dpo_last_checkpoint_timestamp_seconds": (
        (),
        "When the newest checkpoint was committed; before this driver's first one, when it began to train.",
    ),
    "dpo_checkpoint_step": ((), "Step of the newest checkpoint."),
    "dpo_attempt": ((), "Number of the attempt, counted from 0 over the life of the run."),
    "dpo_workers": ((), "Policy workers of the attempt; 0 while none is under way."),
    "dpo_workers_min": ((), "scaling.workers, the fewest."),
    "dpo_workers_max": ((), "scaling.workers, the most."),
    "dpo_failures": (("kind",), f"Failures since the driver started; kind is one of {', '.join(FAILURES)}."),
    "dpo_reference_replicas": ((), "Replicas of the reference that have room."),
    "dpo_reference_replicas_max": ((), "reference.replicas, the most."),
    "dpo_reference_replicas_lost": ((), "Replicas of the reference that were lost."),
    "dpo_reference_chunks_left": ((), "Chunks of pairs that still have no scores."),
    "dpo_reference_pairs_left": ((), "Pairs that still have no scores."),
    "dpo_reference_pairs_scored": ((), "Pairs scored by this driver's replicas."),
    "dpo_reference_pairs_found": ((), "Pairs whose scores were in the store already."),
    "dpo_reference_pairs_elsewhere": ((), "Pairs that another run scored meanwhile."),
    "dpo_reference_pairs_per_second": ((), "Pairs that one replica scores in a second."),
    "dpo_prepare_rows": (("outcome",), "Rows read, and what became of them: rows, pairs, rejects, duplicates, ..."),
    "dpo_progress_ratio": (("phase",), "How far a phase before training is."),
}

# Key of a line of metrics -> the gauge that shows it.
LINE = {
    "step": "dpo_step",
    "epoch": "dpo_epoch",
    "num_tokens": "dpo_trained_tokens",
    "loss": "dpo_loss",
    "rewards/chosen": "dpo_reward_chosen",
    "rewards/rejected": "dpo_reward_rejected",
    "rewards/margins": "dpo_reward_margin",
    "rewards/accuracies": "dpo_reward_accuracy",
    "grad_norm": "dpo_grad_norm",
    "learning_rate": "dpo_learning_rate",
    "eval_loss": "dpo_eval_loss",
    "eval_rewards/margins": "dpo_eval_reward_margin",
    "eval_rewards/accuracies": "dpo_eval_reward_accuracy",
    "perf/step_s": "dpo_step_seconds",
    "perf/data_wait_s": "dpo_data_wait_seconds",
    "perf/reference_wait_s": "dpo_reference_wait_seconds",
    "perf/pairs_per_s": "dpo_pairs_per_second",
    "perf/tokens_per_s": "dpo_tokens_per_second",
    "perf/mfu": "dpo_mfu_ratio",
    "perf/slowest_rank": "dpo_slowest_rank",
    "perf/rank_spread": "dpo_rank_spread_ratio",
}
# What a filler counts -> the gauge that shows it.
FILLED = {
    "replicas": "dpo_reference_replicas",
    "lost_replicas": "dpo_reference_replicas_lost",
    "left_chunks": "dpo_reference_chunks_left",
    "left_pairs": "dpo_reference_pairs_left",
    "scored_pairs": "dpo_reference_pairs_scored",
    "hit_pairs": "dpo_reference_pairs_found",
    "elsewhere_pairs": "dpo_reference_pairs_elsewhere",
    "pairs_per_s": "dpo_reference_pairs_per_second",
}


class Gauges(Watcher):
    """A watcher that keeps a run's gauges, and tells another one everything.

    A context manager: what is known is set again and again, in a thread, until its exit.

    Attributes:
        values: What is known, by gauge and label; the label is empty where a gauge has none but `run`.
    """

    def __init__(self, config: Config, watcher: Watcher) -> None:
        """Makes the gauges.

        Args:
            config: The run.
            watcher: Who is told too.
        """
        self._config, self._watcher = config, watcher
        self.values: dict[tuple[str, str], float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._refresh_now_and_then, name="gauges", daemon=True)

    def __enter__(self) -> Gauges:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NonFiniteLossError):
            self._set("dpo_loss_finite", 0)
        if isinstance(error, Exception) and not isinstance(error, StoppedError):
            self._failed("final")
        self._done.set()
        self._thread.join()
        self._refresh()

    def phase(self, text: str) -> None:
        """Handed on."""
        self._watcher.phase(text)

    def warning(self, text: str) -> None:
        """Handed on."""
        self._watcher.warning(text)

    def source(self, preview: SourcePreview) -> None:
        """Handed on."""
        self._watcher.source(preview)

    def progress(self, what: str, done: int, total: int) -> None:
        """How far a phase is."""
        self._set("dpo_progress_ratio", done / max(1, total), what)
        self._watcher.progress(what, done, total)

    def rows(self, counts: Mapping[str, int]) -> None:
        """What became of the rows."""
        for outcome, count in counts.items():
            self._set("dpo_prepare_rows", count, outcome)
        self._watcher.rows(counts)

    def prepared(self, pairs: PairStore) -> None:
        """What became of the rows, in the end."""
        self.rows(pairs.counts)
        self._watcher.prepared(pairs)

    def planned(self, plan: Plan, position: int) -> None:
        """How far there is to go."""
        self._set("dpo_step", position)
        self._set("dpo_steps_planned", plan.total_steps)
        self._watcher.planned(plan, position)

    def began(self, attempt: Attempt) -> None:
        """A worker group is started."""
        now, scaling = time.time(), self._config.scaling
        self._set("dpo_attempt", attempt.attempt)
        self._set("dpo_workers", attempt.world_size)
        self._set("dpo_workers_min", scaling.min_workers)
        self._set("dpo_workers_max", scaling.max_workers)
        self._set("dpo_step", attempt.position)
        self._set("dpo_checkpoint_step", attempt.position)
        self._set("dpo_last_step_timestamp_seconds", now)
        self.values.setdefault(("dpo_last_checkpoint_timestamp_seconds", ""), now)
        self.values.setdefault(("dpo_loss_finite", ""), 1.0)
        for each in FAILURES:
            self.values.setdefault(("dpo_failures", each), 0.0)
        self._watcher.began(attempt)

    def ended(self, kind: str) -> None:
        """A worker group has ended."""
        self._set("dpo_workers", 0)
        if kind in FAILURES:
            self._failed(kind)
        self._watcher.ended(kind)

    def line(self, line: dict[str, Any]) -> None:
        """A line of metrics: of a step, of an evaluation, or of a checkpoint."""
        now = time.time()
        for key, name in LINE.items():
            # An evaluation beside training is of a step that is past.
            if key in line and (key != "step" or "loss" in line):
                self._set(name, line[key])
        if "loss" in line:
            self._set("dpo_last_step_timestamp_seconds", now)
        if "checkpoint" in line:
            self._set("dpo_checkpoint_step", line["checkpoint"])
            self._set("dpo_last_checkpoint_timestamp_seconds", now)
        self._watcher.line(line)

    def scored(self, filled: Mapping[str, float | None]) -> None:
        """What the replicas of the reference have done so far."""
        self._set("dpo_reference_replicas_max", self._config.reference.most_replicas)
        for key, name in FILLED.items():
            if (value := filled[key]) is not None:
                self._set(name, value)
        self._watcher.scored(filled)

    def _set(self, name: str, value: float, label: str = "") -> None:
        self.values[name, label] = float(value)

    def _failed(self, kind: str) -> None:
        self._set("dpo_failures", self.values.get(("dpo_failures", kind), 0.0) + 1, kind)

    def _refresh_now_and_then(self) -> None:
        while not self._done.wait(REFRESH_S):
            self._refresh()

    def _refresh(self) -> None:
        """Gives Ray what is known, once there is Ray."""
        if not ray.is_initialized():
            return
        with contextlib.suppress(Exception):  # Of a node that is just going: no gauge is worth a run.
            for (name, label), value in list(self.values.items()):
                labels, about = GAUGES[name]
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, about, tag_keys=("run", *labels))
                self._gauges[name].set(value, {"run": self._config.name, **dict.fromkeys(labels, label)})
