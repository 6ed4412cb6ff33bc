"""The command line.

Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 128 + its number for a signal that asked to stop
(a checkpoint is written), 1 anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_ray import config as configuration
from dpo_ray import storage
from dpo_ray.errors import ConfigError, FinalError, StoppedError, UserError
from dpo_ray.redaction import without_secrets

if TYPE_CHECKING:
    from dpo_ray.orchestration.verify import Verdict

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Direct Preference Optimization on Ray: from preference pairs on object storage to an aligned model.",
)
console = Console(highlight=False, soft_wrap=True)

ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file; `dpo-ray config --template` prints one.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides a key; may be repeated.")
]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Trains, from raw pairs to an exported model; given again, goes on where the run stands.

    Example: dpo-ray train jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml --set scaling.workers=2
    """
    _train(configuration.load_config(config, overrides))


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Trains only the start that sft.epochs asks for, by the likelihood of the chosen answers, as the run NAME-sft.

    `dpo-ray train` does so by itself, and goes on from there.

    Example: dpo-ray sft my-run.yaml --set sft.epochs=1
    """
    parsed = configuration.load_config(config, overrides)
    if parsed.sft.epochs is None:
        raise ConfigError("sft.epochs is null: set how many passes the start by likelihood shall make, e.g. 1")
    _train(parsed, only_start=True)


def _train(parsed: configuration.Config, only_start: bool = False) -> None:
    from dpo_ray.display import ProgressBar, closing_table
    from dpo_ray.orchestration import trainer

    with ProgressBar(console) as watcher:
        result = trainer.make_start(parsed, watcher) if only_start else trainer.train(parsed, watcher)
    console.print(closing_table(result))
    console.print(f"model    {result.export_uri}\nmetrics  {result.run_uri}/metrics.jsonl")
    console.print(f"curves   tensorboard --logdir {result.run_uri}/tensorboard")
    if storage.exists(report := storage.join(result.run_uri, "report.html")):
        console.print(f"report   {report}")


@app.command()
def sweep(
    config: ConfigPath,
    grid: Annotated[
        list[str], typer.Option(metavar="SECTION.KEY=[A, B]", help="Values to try; repeated: all combinations.")
    ],
    evaluated: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Also evaluates each model: KL to the reference, and what no other run gains at as little.",
        ),
    ] = False,
    stop_early: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Stops runs that are behind the median of those before them: by eval_rewards/accuracies, "
            "eval_rewards/margins or eval_loss.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Prints the outcomes as JSON.")] = False,
    overrides: Overrides = None,
) -> None:
    """Trains a run for each combination of some settings, all on the same pairs and scores; then a table and a page.

    Each run is called after its settings. Given again, it goes on; exit code 1: some of them failed.

    Example: dpo-ray sweep my-run.yaml --grid 'objective.beta=[0.1, 0.3]' --grid 'objective.loss=["ipo", "hinge"]'
    """
    from dpo_ray.display import ProgressBar, sweep_table
    from dpo_ray.orchestration import sweep as sweeping

    found = sweeping.points(config, grid, overrides or [])
    if as_json:
        outcomes = list(sweeping.sweep(found, None, evaluated, stop_early))
        typer.echo(json.dumps(sweeping.as_json(outcomes), indent=1))
    else:
        with ProgressBar(console) as watcher:
            outcomes = list(sweeping.sweep(found, watcher, evaluated, stop_early))
        console.print(sweep_table(outcomes))
    if (page := sweeping.write_page(found)) and not as_json:
        console.print(f"report  {page}")
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def submit(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file: the run to start.")] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard, e.g. http://127.0.0.1:8265; else by Ray's own rules.")
    ] = None,
    command: Annotated[
        Literal["train", "prepare", "reference", "sft", "pairs"], typer.Option(help="What the job does.")
    ] = "train",
    detach: Annotated[bool, typer.Option("--detach", help="Does not wait for the end.")] = False,
    status: Annotated[str | None, typer.Option(metavar="JOB", help="Shows how a job stands.")] = None,
    follow: Annotated[str | None, typer.Option(metavar="JOB", help="Shows what a job writes, until it ends.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="Has a job write a checkpoint and end.")] = None,
    overrides: Overrides = None,
) -> None:
    """Trains, or does another command, as a job of a Ray cluster, and shows what it writes; its exit code is the job's.

    The resolved configuration, and losses, formats and trackers of your own, travel with it; of the environment of this
    machine nothing does. Ctrl-C leaves the job alone. Given again, it goes on where the run stands.

    Example: dpo-ray submit my-run.yaml --address http://127.0.0.1:8265
    """
    from dpo_ray.display import job_table
    from dpo_ray.orchestration.submit import Jobs, local_places

    if sum(each is not None for each in (config, status, follow, stop)) != 1:
        raise ConfigError("dpo-ray submit: give a CONFIG, or one of --status, --follow and --stop with a job's id")
    if config is None and (overrides or detach or command != "train"):
        raise ConfigError("dpo-ray submit: --set, --command and --detach are for a CONFIG")
    parsed = configuration.load_config(config, overrides) if config is not None else None
    jobs = Jobs(address)
    if status is not None:
        console.print(job_table(jobs.job(status)))
        return
    if parsed is not None:
        if places := local_places(parsed):
            console.print(f"paths that must be the same on every node: {', '.join(places)}")
        job = jobs.submit(parsed, command)
        console.print(f"job    {job}\nrun    {parsed.run_uri}")
        if detach:
            return
    else:
        job = follow or stop or ""
    if stop is not None:
        jobs.stop(job)
    try:
        ended = jobs.follow(job, lambda text: console.print(Text.from_ansi(text), end=""))
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; dpo-ray submit --follow {job}, or --stop {job}")
        raise typer.Exit(0) from None
    console.print(f"job {job}: {ended.status}")
    if ended.exit_code:
        raise typer.Exit(ended.exit_code)


@app.command()
def plan(
    config: ConfigPath,
    device_memory_gib: Annotated[float, typer.Option(min=1.0, help="Memory of a device.")] = 80.0,
    device_tflops: Annotated[float, typer.Option(min=0.001, help="Its peak in bfloat16; an H100's.")] = 989.0,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the peak that is used.")] = 0.4,
    price_per_hour: Annotated[float, typer.Option(min=0.0, help="Of a device, in any currency.")] = 2.5,
    devices_per_node: Annotated[int, typer.Option(min=1, help="Devices of a node.")] = 8,
    near_gb_s: Annotated[float, typer.Option(min=0.001, help="GB/s of a device within its node.")] = 450.0,
    far_gb_s: Annotated[float, typer.Option(min=0.001, help="GB/s of a device to other nodes.")] = 50.0,
    pair_tokens: Annotated[
        int | None,
        typer.Option(min=3, help="Mean tokens of a pair, its prompt once; of the prepared pairs if left out."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="For the memory of a device; the fewest of scaling.workers if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Prints the numbers as JSON.")] = False,
    overrides: Overrides = None,
) -> None:
    """Says what a run takes before there is a cluster: memory of a device, pairs per second, cost. Nothing is measured.

    Reads the model's config.json and no weights; needs no Ray.

    Example: dpo-ray plan my-run.yaml --device-memory-gib 80 --price-per-hour 2.5
    """
    from dataclasses import asdict

    from dpo_ray.display import estimate_tables, estimate_verdict
    from dpo_ray.orchestration.estimate import estimate
    from dpo_ray.training.sizing import Hardware, Network

    network = Network(devices_per_node, near_gb_s, far_gb_s)
    hardware = Hardware(device_memory_gib, device_tflops, utilisation, price_per_hour, network)
    found = estimate(configuration.load_config(config, overrides), hardware, workers, pair_tokens)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "hardware": asdict(hardware)}, indent=1))
        return
    for table in estimate_tables(found, hardware):
        console.print(table)
    console.print(Text(estimate_verdict(found), style="bold"))
    console.print("assumed:")
    for assumption in found.assumptions:
        console.print(Text(f"- {assumption}"))


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Makes the pair store: reads, checks, renders and tokenizes the pairs.

    Example: dpo-ray prepare jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml
    """
    from dpo_ray.display import ProgressBar
    from dpo_ray.orchestration import prepare as preparing
    from dpo_ray.orchestration.gauges import Gauges
    from dpo_ray.orchestration.trainer import final_errors, start_ray

    parsed = configuration.load_config(config, overrides)
    preparing.check_reachable(parsed)
    with final_errors(), ProgressBar(console) as bar, Gauges(parsed, bar) as watcher:
        found = preparing.survey(parsed, watcher)
        if found.job is not None:
            start_ray(parsed)
        made = preparing.prepare(parsed, watcher, found)
    console.print(f"pair store  {made.uri}")


@app.command()
def pairs(config: ConfigPath, overrides: Overrides = None) -> None:
    """Makes pairs of the model's own answers: samples, has a judge score them, writes rows to train on.

    Example: dpo-ray pairs my-run.yaml --set pairs.choose=best_worst
    """
    from dpo_ray.display import ProgressBar
    from dpo_ray.orchestration.pairs_job import make_pairs

    parsed = configuration.load_config(config, overrides)
    with ProgressBar(console) as watcher:
        made = make_pairs(parsed, watcher)
    console.print(f"{made.rows:,} rows of {made.prompts:,} prompts; {made.without:,} had no two answers that ended")
    console.print(f"pairs  {made.uri}/*.jsonl")


@app.command()
def data(
    config: ConfigPath,
    as_json: Annotated[bool, typer.Option("--json", help="Prints the numbers as JSON, whole histograms too.")] = False,
    near: Annotated[
        bool,
        typer.Option(
            "--near-duplicates",
            help="Also counts training and held-out pairs whose prompt and chosen answer are nearly those of another "
            "training pair (extra `data`); up to 60,000 pairs it took 0.3 ms and 5.4 KB of memory a pair.",
        ),
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="Also writes them as an HTML page with plots, to this place.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Shows what the prepared pairs are like: counts, lengths, length bias, repeated prompts, gaps of scores, rejects.

    Example: dpo-ray data jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml
    """
    from dataclasses import asdict

    from dpo_ray.display import ProgressBar, near_duplicates_tables, statistics_tables
    from dpo_ray.orchestration.prepare import prepared
    from dpo_ray.pairs.near_duplicates import near_duplicates
    from dpo_ray.pairs.statistics import describe
    from dpo_ray.report.page import write_data_page

    if as_json and output is not None:
        raise ConfigError("dpo-ray data: give --json or --output, not both")
    pairs = prepared(configuration.load_config(config, overrides))
    if as_json:
        alike = {"near_duplicates": asdict(near_duplicates(pairs))} if near else {}
        typer.echo(json.dumps({**asdict(describe(pairs)), **alike}, indent=1))
        return
    tables = list[Table]()
    with ProgressBar(console) as watcher:
        if near:
            duplicates = near_duplicates(pairs, lambda done, total: watcher.progress("comparing chunks", done, total))
            tables = near_duplicates_tables(duplicates, pairs)
        found = describe(pairs, lambda done, total: watcher.progress("reading chunks", done, total))
    for table in (*statistics_tables(found), *tables):
        console.print(table)
    if output is not None:
        write_data_page(found, output)
        console.print(f"page  {output}")


@app.command()
def reference(
    config: ConfigPath,
    status: Annotated[bool, typer.Option("--status", help="Only shows how much has scores.")] = False,
    gc: Annotated[bool, typer.Option("--gc", help="Removes scores that no run under storage_path uses.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --gc: does not ask.")] = False,
    overrides: Overrides = None,
) -> None:
    """Scores all pairs with the reference ahead of training; what is scored already is kept.

    Example: dpo-ray reference jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml
    """
    from dpo_ray.display import ProgressBar, reference_table, unused_table
    from dpo_ray.orchestration import reference_job

    parsed = configuration.load_config(config, overrides)
    if status and gc or yes and not gc:
        raise ConfigError("dpo-ray reference: give --status, or --gc (with --yes or without), or neither")
    if gc:
        found = reference_job.unused_scores(parsed)
        if not found:
            console.print("every score is of some run: nothing to remove")
            return
        console.print(unused_table(found))
        if yes or typer.confirm("Remove them?"):
            reference_job.remove_scores(parsed, found)
            console.print("removed")
        return
    if not parsed.needs_reference:
        raise ConfigError(f"objective.loss: {parsed.objective.name} uses no reference: there is nothing to score")
    parsed = reference_job.scored_config(parsed)
    if status:
        console.print(reference_table(reference_job.reference_status(parsed)))
        return
    with ProgressBar(console) as watcher:
        filled, uri = reference_job.fill_reference(parsed, watcher)
    console.print(f"reference store  {uri}\n{filled.scored_pairs} pairs scored now")


@app.command()
def doctor(config: ConfigPath, overrides: Overrides = None) -> None:
    """Looks at storage, pairs, model, and every node, and says what a run would stumble over.

    Exit code 0: all is well; 1: something is wrong.

    Example: dpo-ray doctor jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml
    """
    from dpo_ray.orchestration.preflight import examine
    from dpo_ray.orchestration.trainer import start_ray

    parsed = configuration.load_config(config, overrides)
    with console.status("looking at storage and nodes"):
        rows = examine(parsed, lambda: start_ray(parsed))
    table = Table(title=f"{parsed.name}: before the run")
    for column in ("check", "where", "result", "how to fix"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]✓ ok[/green]", "note": "[yellow]! note[/yellow]", "wrong": "[red]✗ wrong[/red]"}
    for row in rows:
        result = Text.assemble(Text.from_markup(marks[row.level]), f"  {row.result}")
        table.add_row(row.check, Text(row.where), result, Text(row.mend))
    console.print(table)
    wrong = sum(row.level == "wrong" for row in rows)
    console.print(f"{wrong} of {len(rows)} checks are wrong" if wrong else "all is well")
    if wrong:
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN_URI", help="A finished run's directory, <storage_path>/<name>, or its YAML file."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Prints the numbers as JSON.")] = False,
    overrides: Overrides = None,
) -> None:
    """Says whether a run's model is better than its reference, and by how much, on pairs held out of its training.

    What is scored already is kept; given again, it goes on where it stood.

    Example: dpo-ray evaluate s3://bucket/dpo/my-run
    """
    from dpo_ray.display import ProgressBar, evaluation_tables
    from dpo_ray.orchestration import evaluate_job

    if as_json:
        typer.echo(json.dumps(evaluate_job.as_json(evaluate_job.evaluate(run, overrides)), indent=1))
        return
    with ProgressBar(console) as watcher:
        found = evaluate_job.evaluate(run, overrides, watcher)
        for warning in found.warnings:
            watcher.warning(warning)
    for table in evaluation_tables(found):
        console.print(table)
    console.print(f"numbers  {found.run_uri}/evaluation/summary.json")


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN_URI", help="A run's directory: <storage_path>/<name>.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Such as step-00000050; else the best one by train.keep_best, or the newest."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Where to; else RUN_URI/exports/NAME.")] = None,
) -> None:
    """Writes a checkpoint that a run keeps as a model, whether the run has ended or not; needs no Ray.

    What a run ends with is in RUN_URI/export by itself.

    Example: dpo-ray export s3://bucket/dpo/my-run
    """
    from dpo_ray.training.kept import export_kept

    place, step = export_kept(run.rstrip("/"), checkpoint, output)
    console.print(f"model    {place}\nsteps    {step}")


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN_URI", help="A run's directory: <storage_path>/<name>.")],
    as_json: Annotated[bool, typer.Option("--json", help="Prints the verdict as JSON.")] = False,
) -> None:
    """Proves from a run's directory that every pair was trained on exactly once per epoch; needs no Ray.

    Exit code 0: the ledger is exact, as far as the run has come; 1: something is wrong.

    Example: dpo-ray verify s3://bucket/dpo/my-run
    """
    from dataclasses import asdict

    from dpo_ray.orchestration import verify as verifying

    if as_json:
        verdict = verifying.verify(run)
        typer.echo(json.dumps(asdict(verdict), indent=1))
    else:
        from dpo_ray.display import ProgressBar

        with ProgressBar(console) as watcher:
            verdict = verifying.verify(run, watcher)
        console.print(_verdict_table(verdict))
        for finding in verdict.findings:
            where = "" if finding.step is None else f"step {finding.step}: "
            console.print(Text(f"{where}{finding.text}", style="red"))
        if left := verdict.num_findings - len(verdict.findings):
            console.print(f"and {left:,} more")
        console.print(Text(verdict.line, style="green" if verdict.exact else "bold red"))
    if not verdict.exact:
        raise typer.Exit(1)


def _verdict_table(verdict: Verdict) -> Table:
    """What a run's ledger says, and its attempts."""
    epochs = verdict.steps / verdict.steps_per_epoch
    title = f"{verdict.run_uri}\n{verdict.steps:,} of {verdict.total_steps:,} steps, {epochs:.4g} epochs of "
    title += f"{verdict.pairs:,} pairs, {verdict.pairs_trained:,} pairs trained on"
    table = Table(title=Text(title), title_justify="left")
    for column in ("attempt", "after step", "workers", "steps in the ledger"):
        table.add_column(column, justify="right")
    table.add_column("reason", overflow="fold")
    for each in verdict.attempts:
        table.add_row(*map(str, (each.attempt, each.position, each.world_size, each.steps)), Text(each.reason))
    if verdict.redone_steps:
        table.caption = f"at least {verdict.redone_steps:,} steps were done again"
    return table


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_URI...", help="A run's directory: <storage_path>/<name>.")],
    compare: Annotated[bool, typer.Option("--compare", help="Writes one page of several runs, to --output.")] = False,
    output: Annotated[str | None, typer.Option(help="With --compare: the page to write.")] = None,
) -> None:
    """Writes a run at a glance, one HTML file without scripts, to RUN_URI/report.html; needs no Ray.

    `dpo-ray train` does so by itself when it ends; this shows a run that goes on, too.

    Example: dpo-ray report runs/demo/dpo
    """
    from dpo_ray.report.page import write_comparison, write_report

    if compare != (output is not None):
        raise ConfigError(
            "dpo-ray report: --compare and --output go together, e.g. --compare RUN RUN --output two.html"
        )
    if output is not None:
        write_comparison(runs, output)
        console.print(f"report   {output}")
        return
    if len(runs) != 1:
        raise ConfigError("dpo-ray report: give one run, or several with --compare and --output")
    console.print(f"report   {write_report(runs[0])}")


@app.command("config")
def config_command(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Prints this file resolved.")] = None,
    template: Annotated[bool, typer.Option("--template", help="Prints a commented file to start from.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Prints the JSON schema.")] = False,
    overrides: Overrides = None,
) -> None:
    """Prints a starting file, the JSON schema, or a configuration with all defaults filled in.

    Example: dpo-ray config --template > my-run.yaml
    """
    if template + schema + (config is not None) != 1:
        raise ConfigError("dpo-ray config: give one of --template, --schema, or a CONFIG to resolve")
    if template:
        typer.echo(configuration.template(), nl=False)
    elif schema:
        typer.echo(json.dumps(configuration.Config.model_json_schema(), indent=1))
    elif config is not None:
        typer.echo(configuration.to_yaml(configuration.load_config(config, overrides)), nl=False)


@app.command()
def demo(
    folder: Annotated[
        str, typer.Argument(help="Where the demo's runs and stores go; an earlier demo's are removed.")
    ] = "runs/demo",
) -> None:
    """Trains a tiny model on pairs of its own, from nothing to a before/after table, in three minutes on two cores.

    Example: dpo-ray demo
    """
    from dpo_ray.demo import run_demo

    if not run_demo(folder, console):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of `dpo-ray`."""
    # For code of one's own: what is installed as a command does not look in the working directory.
    with contextlib.suppress(FileNotFoundError):
        sys.path.append(os.getcwd())
    try:
        app()
    except StoppedError as error:
        Console(stderr=True, highlight=False).print(str(error), style="yellow", markup=False, soft_wrap=True)
        sys.exit(128 + error.signal if error.signal else 1)
    except FinalError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Exception:
        sys.stderr.write(without_secrets(traceback.format_exc()))
        sys.exit(1)
