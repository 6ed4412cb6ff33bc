"""What one sees in the terminal: a progress bar while training, tables at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dpo_ray.orchestration.trainer import Result, Watcher
from dpo_ray.pairs.plan import Plan

CLOSING_ROWS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class ProgressBar(Watcher):
    """A bar with loss, accuracy, margin, pairs/s and time left; a line now and then where there is no terminal."""

    def __init__(self, console: Console) -> None:
        """Args: console: Where to write."""
        self._console = console
        self._total = 0
        self._progress = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def phase(self, text: str) -> None:
        """Shows what the driver is doing."""
        self._console.print(f"[dim]{text} ...[/dim]")

    def planned(self, plan: Plan, position: int) -> None:
        """Starts the bar."""
        self._total = plan.total_steps
        if position:
            self.phase(f"going on after step {position} of {plan.total_steps}")
        self._task = self._progress.add_task("training", total=plan.total_steps, completed=position, metrics="")

    def line(self, line: dict[str, Any]) -> None:
        """Moves the bar."""
        if "loss" in line:
            self._progress.update(self._task, completed=line["step"], metrics=_brief(line))
            every = max(1, self._total // 20)
            if not self._console.is_terminal and (line["step"] % every == 0 or line["step"] == 1):
                self._console.print(f"step {line['step']}/{self._total}  {_brief(line)}")
        elif "eval_loss" in line:
            held_out = {name.removeprefix("eval_"): value for name, value in line.items()}
            self._console.print(f"held-out pairs after step {line['step']}: {_brief(held_out)}")


def _brief(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.4f}"]
    if "rewards/margins" in line:
        parts += [f"accuracy {line['rewards/accuracies']:.2f}", f"margin {line['rewards/margins']:.3f}"]
    if "perf/pairs_per_s" in line:
        parts.append(f"{line['perf/pairs_per_s']:.1f} pairs/s")
    return "  ".join(parts)


def closing_table(result: Result) -> Table:
    """The last training step and the last evaluation side by side."""
    table = Table(title=f"{result.steps} steps done")
    table.add_column("")
    table.add_column("last step", justify="right")
    table.add_column("held-out pairs", justify="right")
    for name in CLOSING_ROWS:
        if name in result.metrics:
            table.add_row(name, _number(result.metrics[name]), _number(result.eval_metrics.get(f"eval_{name}")))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
