"""The command line. Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 1 anything else."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from dpo_ray import config as configuration
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
    from dpo_ray.orchestration.prepare import prepare as make
    from dpo_ray.orchestration.trainer import final_errors, start_ray

    parsed = configuration.load_config(config, overrides)
    start_ray(parsed)
    with final_errors():
        made = make(parsed)
    console.print(f"pair store  {made.uri}\n{json.dumps(made.counts)}")


@app.command()
def reference(config: ConfigPath, overrides: Overrides = None) -> None:
    """Scores all pairs with the reference ahead of training; what is scored already is kept.

    Example: dpo-ray reference jobs/dpo-smollm2-135m-1n0g-fsdp2.yaml
    """
    from dpo_ray.orchestration.trainer import fill_reference

    parsed = configuration.load_config(config, overrides)
    if not parsed.needs_reference:
        raise ConfigError(f"objective.loss: {parsed.objective.loss} uses no reference: there is nothing to score")
    scored, uri = fill_reference(parsed)
    console.print(f"reference store  {uri}\n{scored} pairs scored now")


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
