"""The order of the house: a file imports only files listed above it, and each heavy dependency has its owners."""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dpo_ray"

# The way of a pair. A module may import those above it.
ORDER = [
    "redaction",
    "errors",
    "types",
    "extensions",
    "objective.logps",
    "objective.losses",
    "objective.rewards",
    "pairs.turns",
    "pairs.parsers",
    "pairs.formats",
    "config.base",
    "config.model",
    "config.data",
    "config.reference",
    "config.objective",
    "config.training",
    "config.answers",
    "config.run",
    "config.resume",
    "config.file",
    "config",
    "storage_errors",
    "storage_requests",
    "storage",
    "lease",
    "pairs.specials",
    "pairs.render",
    "pairs.tokenize",
    "pairs.store",
    "pairs.statistics",
    "pairs.near_duplicates",
    "pairs.runs",
    "pairs.plan",
    "pairs.pack",
    "model.files",
    "model.weights",
    "model.malloc",
    "model.linear",
    "model.peak",
    "model.clock",
    "model.attention",
    "model.forward",
    "model.load",
    "model.sample",
    "model.adapter",
    "model.shard",
    "model.footprint",
    "model.card",
    "model.export",
    "reference.store",
    "reference.versions",
    "reference.claims",
    "reference.demand",
    "reference.usage",
    "reference.scorer",
    "reference.brought",
    "training.feed",
    "training.optimizer",
    "training.step",
    "training.budget",
    "training.sizing",
    "training.metrics",
    "training.manifest",
    "training.attempts",
    "training.faults",
    "training.outcome",
    "training.evaluations",
    "training.evaluate",
    "training.checkpoint_tensors",
    "training.checkpoint_files",
    "training.checkpoint",
    "training.kept",
    "training.moving",
    "training.trackers",
    "training.record",
    "training.own_reference",
    "training.loop",
    "report.charts",
    "report.answers",
    "report.facts",
    "report.page",
    "evaluation.statistics",
    "evaluation.held_out",
    "evaluation.judge",
    "orchestration.watch",
    "orchestration.gauges",
    "orchestration.rows",
    "orchestration.prepare",
    "orchestration.originals",
    "orchestration.forget",
    "orchestration.stream",
    "orchestration.logs",
    "orchestration.monitor",
    "orchestration.nodes",
    "orchestration.autoscaler",
    "orchestration.resources",
    "orchestration.worker",
    "orchestration.group",
    "orchestration.replicas",
    "orchestration.reference_filler",
    "orchestration.moving_filler",
    "orchestration.evaluator",
    "orchestration.stop",
    "orchestration.supervisor",
    "orchestration.preflight",
    "orchestration.estimate",
    "orchestration.trainer",
    "orchestration.reference_job",
    "orchestration.parts",
    "orchestration.pairs_job",
    "orchestration.answers_job",
    "orchestration.benchmarks_job",
    "orchestration.evaluate_job",
    "orchestration.early_stop",
    "orchestration.sweep",
    "orchestration.verify",
    "orchestration.submit",
    "display",
    "demo_data",
    "demo",
    "cli",
]
OWNERS = {
    "ray": ("orchestration",),
    "fsspec": ("storage_requests", "storage"),
    "s3fs": ("storage",),
    "peft": ("model.adapter",),
    "huggingface_hub": ("model.card",),
    "accelerate": ("model.load", "model.shard"),
    "bitsandbytes": ("training.optimizer",),
    "pydantic": ("config",),
    "typer": ("cli",),
    "wandb": ("training.trackers",),
    "mlflow": ("training.trackers",),
    "requests": ("evaluation.judge", "orchestration.submit"),
    "scipy": ("evaluation.statistics",),
    "datasketch": ("pairs.near_duplicates",),
    "jinja2": ("pairs.render", "report.page"),
    "rich": ("cli", "display", "demo"),
    "torch.distributed.fsdp": ("model.shard",),
    "torch.distributed.checkpoint": ("model.shard", "training.checkpoint_files", "training.checkpoint"),
}


def modules() -> dict[str, Path]:
    named = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    found = {name: path for name, path in named.items() if not name.endswith("__init__")}
    # A folder's own file counts where it has code.
    folders = {name.removesuffix(".__init__"): path for name, path in named.items() if name.endswith(".__init__")}
    return found | {name: path for name, path in folders.items() if imports(path)}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def test_every_module_is_in_the_order() -> None:
    assert sorted(modules()) == sorted(ORDER)


def test_modules_import_only_what_stands_above_them() -> None:
    for name, path in modules().items():
        own = {imported.removeprefix("dpo_ray.") for imported in imports(path) if imported.startswith("dpo_ray.")}
        below = {imported for imported in own if imported in ORDER and ORDER.index(imported) >= ORDER.index(name)}
        assert not below, f"{name} imports {below}, which stands below it"


def test_heavy_dependencies_have_owners() -> None:
    for name, path in modules().items():
        for dependency, owners in OWNERS.items():
            used = any(imported == dependency or imported.startswith(dependency + ".") for imported in imports(path))
            owned = any(name == owner or name.startswith(owner + ".") for owner in owners)
            assert not used or owned, f"{name} imports {dependency}, which belongs to {owners}"


def test_the_loop_can_be_read_in_a_minute() -> None:
    assert len((PACKAGE / "training" / "loop.py").read_text().splitlines()) <= 100
