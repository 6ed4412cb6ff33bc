"""What one sees in the terminal: a progress bar while training, tables at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dpo_ray.orchestration.watch import SourcePreview, Watcher
from dpo_ray.pairs.near_duplicates import SHINGLE_TOKENS, THRESHOLD, NearDuplicates
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.statistics import PERCENTILES, Statistics, bars
from dpo_ray.pairs.store import COUNTS, PairStore
from dpo_ray.report.facts import eval_prefixes

if TYPE_CHECKING:  # Not every command needs Ray.
    from dpo_ray.evaluation.statistics import Estimate as Measured
    from dpo_ray.orchestration.estimate import Estimate
    from dpo_ray.orchestration.evaluate_job import Answers, Evaluation
    from dpo_ray.orchestration.reference_job import Status
    from dpo_ray.orchestration.submit import Job
    from dpo_ray.orchestration.sweep import Outcome
    from dpo_ray.orchestration.trainer import Result
    from dpo_ray.reference.usage import Unused
    from dpo_ray.training.sizing import Hardware

LINES_PER_PHASE = 20
SHOWN_CHARS = 600
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 12, 40
# Shares of the steps' time: above, more replicas would help; below, fewer might do.
WAITED_MUCH, WAITED_LITTLE = 0.05, 0.005
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
    """A bar for what takes long, with time left; a line now and then where there is no terminal."""

    def __init__(self, console: Console) -> None:
        """Shows nothing yet.

        Args:
            console: Where to write.
        """
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[count]}{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def phase(self, text: str) -> None:
        """Shows what the driver is doing."""
        self._console.print(Text(f"{text} ...", style="dim"))

    def warning(self, text: str) -> None:
        """Shows a warning."""
        self._console.print(Text(f"warning: {text}", style="yellow"))

    def source(self, preview: SourcePreview) -> None:
        """Shows how a source is read, with the first pairs as the model will see them."""
        self._console.print(source_table(preview))
        if preview.problem is not None:
            self.warning(f"{preview.pattern}: the first row that cannot become a pair: {preview.problem}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Moves the bar of a phase; it goes when all is done."""
        task = self._bar(what, total)
        if done < total and not self._task(task).visible:
            # Another run's, as in a sweep: with a time of its own.
            self._progress.reset(task, total=total, visible=True)
        self._progress.update(task, total=total, completed=done, count=f"{done:,}/{total:,}")
        if not self._console.is_terminal and self._due(what, done, total):
            left = self._task(task).time_remaining
            self._console.print(f"{what} {done:,}/{total:,}" + (f"  {left:.0f} s left" if left else ""))
        if done == total:
            self._progress.update(task, visible=False)

    def prepared(self, pairs: PairStore) -> None:
        """Shows what became of the rows."""
        self._console.print(pairs_table(pairs))
        if differ := pairs.counts["prompts_differ"]:
            self.warning(
                f"of {differ:,} pairs the chat template writes another prompt before an answer than it asks the model "
                "with: what is trained is the one before the answer; see the prompts above"
            )

    def planned(self, plan: Plan, position: int) -> None:
        """Starts the bar of the training."""
        if position:
            self.phase(f"going on after step {position} of {plan.total_steps}")
        task, count = self._bar("training", plan.total_steps), f"{position}/{plan.total_steps}"
        # Not an update: a bar that another run has filled would never have time left.
        self._progress.reset(task, total=plan.total_steps, completed=position, count=count, metrics="")
        self._told.pop("training", None)

    def line(self, line: dict[str, Any]) -> None:
        """Moves the bar of the training."""
        if "warning" in line:
            self.warning(line["warning"])
        elif "loss" in line:
            task = self._tasks["training"]
            total = int(self._task(task).total or 0)
            count = f"{line['step']}/{total}"
            self._progress.update(task, completed=line["step"], count=count, metrics=f" {_brief(line)}")
            if not self._console.is_terminal and (self._due("training", line["step"], total) or line["step"] == 1):
                self._console.print(f"step {count}  {_brief(line)}")
        elif "eval_loss" in line:
            for held_out, metrics in _by_set(line).items():
                self._console.print(f"{held_out} after step {line['step']}: {_brief(metrics)}")

    def _bar(self, what: str, total: int) -> TaskID:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, count=f"0/{total:,}", metrics="")
        return self._tasks[what]

    def _task(self, task: TaskID) -> Task:
        return self._progress.tasks[self._progress.task_ids.index(task)]

    def _due(self, what: str, done: int, total: int) -> bool:
        """Whether another twentieth is done."""
        share = done * LINES_PER_PHASE // max(1, total)
        due = share > self._told.get(what, 0)
        self._told[what] = share
        return due


def source_table(preview: SourcePreview) -> Table:
    """How a source is read: its format, its columns, and the first pairs, every token of an answer being trained."""
    reading = preview.reading
    columns = ", ".join(role if role == name else f"{role} = {name!r}" for role, name in reading.columns.items())
    files = f"{preview.num_files} file{'s' if preview.num_files > 1 else ''}, {preview.num_bytes:,} bytes"
    title = Text(f"{preview.pattern}: {files}\nformat {reading.format}, columns {columns}")
    table = Table(title=title, title_justify="left")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("as the model sees it; the answers' tokens, all of them, are trained", overflow="fold")
    for example in preview.examples:
        texts = (example.prompt, *example.answers)
        names = ["prompt", "chosen", *["rejected"] * (len(texts) - 2)]
        for part, (name, text, count) in enumerate(zip(names, texts, example.num_tokens, strict=True), start=1):
            style = {"prompt": "dim", "chosen": "green", "rejected": "red"}[name]
            table.add_row(str(count), name, Text(_shortened(text), style=style), end_section=part == len(texts))
    return table


def _shortened(text: str) -> str:
    shown = text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS // 2]} [...] {text[-SHOWN_CHARS // 2 :]}"
    return shown.replace("\n", "\u23ce\n")


def pairs_table(pairs: PairStore) -> Table:
    """What became of the rows."""
    table = Table(title="rows", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    names = {name: name.replace("_", " ") for name in COUNTS}
    for name, shown in {**names, "pairs": "pairs to train on", "eval_pairs": "held-out pairs"}.items():
        if pairs.counts[name] or name in ("rows", "pairs"):
            table.add_row(shown, f"{pairs.counts[name]:,}")
    chunks = (*pairs.train, *pairs.eval)
    table.add_row("tokens (prompts once per pair)", f"{sum(chunk.num_tokens for chunk in chunks):,}")
    return table


def statistics_tables(found: Statistics) -> list[Table]:
    """What the pairs are like: shares, lengths, their histograms, and why rows were left out."""
    shares = Table(title=Text(found.store_uri), title_justify="left", show_header=False)
    shares.add_column()
    shares.add_column(justify="right")
    for name in COUNTS:
        if found.counts[name]:
            shares.add_row(name.replace("_", " "), f"{found.counts[name]:,}")
    shares.add_row("different prompts", f"{found.prompts:,}")
    if found.answers.keys() != {2}:
        for num, pairs in found.answers.items():
            shares.add_row(f"prompts with {num} answers", f"{pairs:,}")
    shares.add_row("chosen answer longer", f"{found.chosen_longer:.1%}")
    shares.add_row("chosen answer shorter", f"{found.chosen_shorter:.1%}")
    shares.add_row("tokens that a chosen answer has more", f"{found.more_tokens:+.1f}")
    lengths = _numbers_table("lengths in tokens", "mean", *(f"{percent} %" for percent in PERCENTILES[:-1]), "longest")
    for name, each in found.lengths.items():
        lengths.add_row(name, f"{each.mean:.1f}", *(f"{length:,}" for length in each.percentiles))
    tables = [shares, lengths]
    for name, each in found.lengths.items():
        tables.append(_histogram(name, each.histogram))
    if gaps := found.score_gaps:
        title = f"scores of {gaps.pairs:,} pairs: the best answer's less the worst's"
        table = _numbers_table(title, *(f"{percent} %" for percent in PERCENTILES[:-1]), "largest")
        table.add_row("gap", *(f"{gap:.4g}" for gap in gaps.percentiles))
        table.add_row("pairs left out with it as data.min_score_gap", *(f"{pairs:,}" for pairs in gaps.left_out))
        tables.append(table)
    if found.rejects:
        total = found.counts["rejects"]
        sample = f" in a sample of {found.rejects_read:,} of {total:,}" if found.rejects_read < total else ""
        rejects = Table(title=f"rejects, the most frequent reasons{sample}", title_justify="left")
        rejects.add_column("rows", justify="right")
        rejects.add_column("reason, without what differs from row to row", overflow="fold")
        for reason, rows in found.rejects.items():
            rejects.add_row(f"{rows:,}", Text(reason))
        tables.append(rejects)
    return tables


def near_duplicates_tables(found: NearDuplicates, pairs: PairStore) -> list[Table]:
    """How many pairs are near-duplicates, and some of them with their sources."""
    title = (
        f"near-duplicates: prompts and chosen answers share {THRESHOLD:.0%} of their runs of {SHINGLE_TOKENS} tokens"
    )
    counts = Table(title=title, title_justify="left", show_header=False)
    counts.add_column()
    counts.add_column(justify="right")
    counts.add_column(justify="right")
    for name, num, chunks in (
        ("training pairs like another one", found.train, pairs.train),
        ("held-out pairs like a training pair", found.eval, pairs.eval),
    ):
        if total := sum(chunk.num_pairs for chunk in chunks):
            counts.add_row(name, f"{num:,}", f"{num / total:.1%}")
    tables = [counts]
    for name, matches in (("training", found.train_examples), ("held-out", found.eval_examples)):
        if matches:
            table = Table(title=f"some {name} pairs, and what each is most like", title_justify="left")
            table.add_column("alike", justify="right")
            table.add_column(f"{name} pair", overflow="fold")
            table.add_column("training pair", overflow="fold")
            for match in matches:
                table.add_row(f"{match.similarity:.0%}", Text(match.place), Text(match.other))
            tables.append(table)
    return tables


def _numbers_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _histogram(name: str, histogram: Sequence[int]) -> Table:
    shown = bars(histogram, HISTOGRAM_BINS)
    table = Table(title=f"{name}: how many have which length", title_justify="left", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max(num for *_, num in shown)
    for first, last, num in shown:
        table.add_row(f"{first} to {last}", "\u2588" * round(HISTOGRAM_WIDTH * num / most), f"{num:,}")
    return table


def _brief(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.4f}"]
    if "rewards/margins" in line:
        parts += [f"accuracy {line['rewards/accuracies']:.2f}", f"margin {line['rewards/margins']:.3f}"]
    if "perf/pairs_per_s" in line:
        parts.append(f"{line['perf/pairs_per_s']:.1f} pairs/s")
    return "  ".join(parts)


def _by_set(evaluation: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of an evaluation, of all held-out pairs and of each set that has a name, without prefixes."""
    prefixes = {name or "held-out pairs": prefix for name, prefix in eval_prefixes(evaluation).items()}
    return {
        shown: {key.removeprefix(prefix): value for key, value in evaluation.items() if key.startswith(prefix)}
        for shown, prefix in prefixes.items()
    }


def closing_table(result: Result) -> Table:
    """The last training step and the last evaluation side by side."""
    table = Table(title=f"{result.steps} steps done")
    table.add_column("")
    table.add_column("last step", justify="right")
    sets = _by_set(result.eval_metrics)
    for shown in sets:
        table.add_column(shown, justify="right")
    for name in CLOSING_ROWS:
        if name in result.metrics or name in sets["held-out pairs"]:
            table.add_row(name, *(_number(each.get(name)) for each in (result.metrics, *sets.values())))
    if result.reference:
        table.caption = reference_caption(result.reference)
        table.caption_justify = "left"
    return table


def sweep_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each run of a sweep: how well it ranks held-out pairs, and how far from the reference."""
    from dpo_ray.orchestration.sweep import frontiers

    table = Table(title="by run; log-ratios are of whole answers, policy to reference")
    for key in outcomes[0].point.values:
        table.add_column(key)
    measured = any(outcome.evaluated for outcome in outcomes)
    for column in ("loss", "accuracy", "margin of log-ratios", "log-ratio of chosen", "of rejected"):
        table.add_column(column, justify="right")
    if measured:
        table.add_column("KL to the reference", justify="right")
        table.add_column("frontier")
        table.caption = (
            "KL: k3, nats an answer, on sampled answers; in brackets 95 % intervals. Frontier: no other of these runs "
            "has as much accuracy, or margin, at as little KL"
        )
        table.caption_justify = "left"
    ended = any(outcome.stopped for outcome in outcomes)
    if ended:
        table.add_column("stopped", overflow="fold")
    best = max((outcome.metrics.get("rewards/accuracies", 0.0) for outcome in outcomes), default=0.0)
    for outcome, marks in zip(outcomes, frontiers(outcomes), strict=True):
        settings = [str(value) for value in outcome.point.values.values()]
        if outcome.error is not None:
            table.add_row(*settings, Text(outcome.error, style="red"))
            continue
        accuracy, found = outcome.metrics.get("rewards/accuracies"), outcome.evaluated
        cells = [
            _number(outcome.metrics.get("loss")),
            str(found.accuracy) if found else _number(accuracy),
            str(found.margin) if found else _number(outcome.log_ratios("margins")),
            *(_number(outcome.log_ratios(of)) for of in ("chosen", "rejected")),
            *((str(found.kl) if found else "", ", ".join(marks)) if measured else ()),
            *((outcome.stopped.reason if outcome.stopped else "",) if ended else ()),
        ]
        table.add_row(*settings, *map(Text, cells), style="bold" if accuracy == best else "")
    return table


def evaluation_tables(found: Evaluation) -> list[Table]:
    """What held-out pairs say of the policy and its reference, with intervals at 95 %."""
    held_out = found.held_out
    title = f"{found.run_uri} after step {found.step}: {held_out.pairs:,} held-out pairs"
    table = _numbers_table(title, "mean", "95 % interval")
    for name, value in held_out.metrics.items():
        table.add_row(name, *_measured(value))
    table.add_row("calibration error", f"{held_out.calibration.error:.4f}", "")
    names = [name for name in next(iter(next(iter(held_out.groups.values())).values()))]
    groups = Table(title="by group", title_justify="left")
    for column in ("", "", "pairs", *(part for name in names for part in (name, "95 % interval"))):
        groups.add_column(column, justify="left" if not column else "right", overflow="fold")
    for by, each_group in held_out.groups.items():
        for number, (name, metrics) in enumerate(each_group.items(), start=1):
            num = next(iter(metrics.values())).num
            cells = (cell for value in metrics.values() for cell in _measured(value))
            groups.add_row(
                by if number == 1 else "", Text(name), f"{num:,}", *cells, end_section=number == len(each_group)
            )
    tables = [table, groups]
    if found.answers:
        tables.append(_answers_table(found.answers))
    if found.benchmarks:
        tables.append(_benchmarks_table(found.benchmarks))
    return tables


def _benchmarks_table(benchmarks: Mapping[str, Mapping[str, Measured]]) -> Table:
    models = list(dict.fromkeys(model for each in benchmarks.values() for model in each))
    table = Table(title="benchmarks, by lm_eval", title_justify="left")
    for column in ("", *(part for model in models for part in (model, "95 % interval"))):
        table.add_column(Text(column), justify="right" if column else "left", overflow="fold")
    for name, each in benchmarks.items():
        cells = (_measured(each[model]) if model in each else ("", "") for model in models)
        table.add_row(Text(name), *(cell for both in cells for cell in both))
    return table


def _answers_table(answers: Answers) -> Table:
    table = Table(title=f"answers to {answers.prompts:,} held-out prompts", title_justify="left")
    for column in ("", "", "mean", "95 % interval"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name in answers.tokens:
        table.add_row(Text(name), "tokens", *_measured(answers.tokens[name]))
        table.add_row("", "came to an end", *_measured(answers.ended[name]), end_section=True)
    for name, value in answers.kl.items():
        table.add_row("KL to the reference, nats", name, *_measured(value))
    for name, each in answers.win_rates.items():
        what = f"win rate ({each.wins:,} won, {each.ties:,} tied, {each.losses:,} lost)"
        table.add_row(Text(f"policy against {name}"), what, *_measured(each.rate))
        table.add_row("", "length-controlled", *_measured(each.length_controlled), end_section=True)
    if answers.ranking:
        for name, value in answers.ranking.strengths.items():
            mean, interval = _measured(value)
            shown = interval if answers.ranking.intervals else "too few comparisons"
            table.add_row(Text(name), "strength (Bradley-Terry)", mean, shown)
    if answers.disagreed:
        table.caption = f"{answers.disagreed:,} verdicts changed with the order, and are ties"
        table.caption_justify = "left"
    return table


def _measured(value: Measured) -> tuple[str, str]:
    interval = "" if math.isnan(value.low) else f"{value.low:.4f} to {value.high:.4f}"
    return f"{value.value:.4f}", interval


def reference_caption(filled: Mapping[str, float]) -> str:
    """What the reference has done beside training, and what another pool would change."""
    scored, waited = int(filled["scored_pairs"]), filled["waited_share"]
    hits = int(filled["hit_pairs"] + filled["elsewhere_pairs"])
    text = f"reference: {scored:,} pairs scored, {hits:,} found in the store"
    if rate := filled["pairs_per_s"]:
        text += f"; {rate:.3g} pairs/s a replica, up to {int(filled['most_replicas'])} at a time"
    text += f"; training waited {waited:.1%} of its time for it"
    if scored and waited > WAITED_MUCH:
        text += ": raise reference.replicas, or score ahead with `dpo-ray reference`"
    elif scored and filled["most_replicas"] > 1 and waited < WAITED_LITTLE:
        text += ": fewer replicas might do"
    return text


def reference_table(status: Status) -> Table:
    """How much of a run's pairs has scores."""
    table = Table(title=Text(status.store_uri), title_justify="left", show_header=False)
    table.add_row("pairs with scores", f"{status.scored_pairs:,} of {status.pairs:,}")
    table.add_row("chunks with scores", f"{status.scored_chunks:,} of {status.chunks:,}")
    table.add_row("refused by a reader, to be scored again", f"{status.refused_chunks:,}")
    table.add_row("scoring now", Text("\n".join(status.fillers) or "nobody"))
    return table


def job_table(job: Job) -> Table:
    """How a job of a cluster stands."""
    table = Table(title=Text(job.job_id), title_justify="left", show_header=False)
    table.add_row("status", job.status)
    table.add_row("run", Text(job.run_uri))
    for name, moment in (("started", job.started), ("ended", job.ended)):
        if moment is not None:
            table.add_row(name, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment)))
    table.add_row("", Text(job.message[-SHOWN_CHARS:]))
    return table


def unused_table(found: Sequence[Unused]) -> Table:
    """What no run uses, by reference store."""
    table = Table(title="scores that no run uses", title_justify="left")
    table.add_column("reference store", overflow="fold")
    table.add_column("chunks to remove", justify="right")
    table.add_column("chunks that stay", justify="right")
    for each in found:
        table.add_row(Text(each.store_uri), f"{len(each.keys):,}", f"{each.kept:,}")
    return table


def estimate_tables(found: Estimate, hardware: Hardware) -> list[Table]:
    """Memory of a device at each moment of a step, of the reference's devices, and the run by its number of workers."""
    tables = [_memory_table(f"a worker of {found.workers}: GiB at each moment of a step", found.moments)]
    if found.reference is not None:
        tables.append(_memory_table("a device of the reference: GiB", {"scoring": found.reference}))
    usable = f"tensors may take {hardware.usable_bytes / 2**30:.0f} GiB of a device"
    title = f"by number of workers; hours and cost of a million pairs; {usable}"
    # Nine columns fit into the 80 characters of a pipe.
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("workers", "sharded", "GiB", "tokens", "busy", "pairs/s", "hours", "cost", "scorers"):
        table.add_column(column, justify="right", no_wrap=True)
    larger = False
    for scale in found.scales:
        larger |= scale.batch_pairs == scale.workers
        table.add_row(
            f"{scale.workers:,}{'*' if scale.batch_pairs == scale.workers else ''}",
            f"{scale.group:,}",
            f"{scale.peak_bytes / 2**30:.1f}" + (f" + {scale.host_bytes / 2**30:.1f} host" if scale.host_bytes else ""),
            f"{scale.load.microbatches} x {scale.load.tokens:,}",
            f"{scale.busy:.0%}",
            f"{scale.pairs_per_s:,.3g}" if scale.pairs_per_s < 1000 else f"{scale.pairs_per_s:,.0f}",
            f"{scale.hours_per_million:,.3g}" if scale.hours_per_million < 1000 else f"{scale.hours_per_million:,.0f}",
            f"{scale.cost_per_million:,.0f}",
            f"{scale.reference_devices:.{'2g' if scale.reference_devices < 100 else '0f'}}"
            if found.reference is not None
            else "",
            style=None if scale.fits else "dim",
        )
    table.caption = (
        "sharded: workers that share a copy of the weights (scaling.shard_over); tokens: microbatches of a step, "
        "tokens of each; busy: what communication leaves; scorers: devices of the reference that keep pace"
    )
    table.caption_justify = "left"
    if larger:
        table.caption += "\n*: with train.global_batch_pairs of at least as many"
    return [*tables, table]


def _memory_table(title: str, moments: Mapping[str, Mapping[str, int]]) -> Table:
    """Bytes by what they are for; the worst moment is bold."""
    table, totals = Table(title=title, show_footer=True), {name: sum(parts.values()) for name, parts in moments.items()}
    table.add_column("", footer="all")
    for name, total in totals.items():
        style = "bold" if total == max(totals.values()) else None
        table.add_column(name, f"{total / 2**30:.2f}", justify="right", style=style)
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        table.add_row(part, *(f"{parts.get(part, 0) / 2**30:.2f}" for parts in moments.values()))
    return table


def estimate_verdict(found: Estimate) -> str:
    """On how many workers the run fits, and what would change that."""
    needs = [f"{setting} needs {workers}" for setting, workers in found.remedies.items()]
    if found.least_workers is None:
        text = f"does not fit on up to {found.scales[-1].workers:,} workers"
    else:
        text = f"fits on {found.least_workers:,} worker{'s' if found.least_workers > 1 else ''} or more"
    return "; ".join([text, *needs])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
