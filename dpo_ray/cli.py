"""The command line. Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 1 anything else."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_ray import config as configuration
from dpo_ray import storage
from dpo_ray.errors import ConfigError, FinalError, UserError

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
    from dpo_ray.display import ProgressBar, closing_table
    from dpo_ray.orchestration import trainer

    parsed = configuration.load_config(config, overrides)
    with ProgressBar(console) as watcher:
        result = trainer.train(parsed, watcher)
    console.print(closing_table(result))
    console.print(f"model    {result.export_uri}\nmetrics  {result.run_uri}/metrics.jsonl")
    console.print(f"curves   tensorboard --logdir {result.run_uri}/tensorboard")


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Makes the pair store: reads, checks, renders and tokenizes the pairs.

    Example: dpo-ray prepare jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml
    """
    from dpo_ray.display import ProgressBar
    from dpo_ray.orchestration import prepare as preparing
    from dpo_ray.orchestration.trainer import final_errors, start_ray

    parsed = configuration.load_config(config, overrides)
    storage.check_reachable(parsed.storage_path)
    with final_errors(), ProgressBar(console) as watcher:
        found = preparing.survey(parsed, watcher)
        if found.job is not None:
            start_ray(parsed)
        made = preparing.prepare(parsed, watcher, found)
    console.print(f"pair store  {made.uri}")


@app.command()
def reference(config: ConfigPath, overrides: Overrides = None) -> None:
    """Scores all pairs with the reference ahead of training; what is scored already is kept.

    Example: dpo-ray reference jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml
    """
    from dpo_ray.display import ProgressBar
    from dpo_ray.orchestration.trainer import fill_reference

    parsed = configuration.load_config(config, overrides)
    if not parsed.needs_reference:
        raise ConfigError(f"objective.loss: {parsed.objective.loss} uses no reference: there is nothing to score")
    with ProgressBar(console) as watcher:
        scored, uri = fill_reference(parsed, watcher)
    console.print(f"reference store  {uri}\n{scored} pairs scored now")


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
    for column in ("check", "where", "result", "how to mend"):
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
    folder: Annotated[str, typer.Argument(help="Where the demo's runs and stores go.")] = "runs/demo",
) -> None:
    """Trains a tiny model on pairs of its own, from nothing to a before/after table, in about two minutes on two cores.

    Example: dpo-ray demo
    """
    from dpo_ray.demo import run_demo

    if not run_demo(folder, console):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of `dpo-ray`."""
    try:
        app()
    except FinalError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
