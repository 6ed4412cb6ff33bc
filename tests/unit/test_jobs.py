"""Every shipped recipe is a valid configuration, named as its file says."""

from pathlib import Path

import pytest

from dpo_ray.config import load_config

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=[path.stem for path in JOBS])
def test_recipe(path: Path) -> None:
    config = load_config(str(path))
    nodes, gpus = path.stem.rsplit("-", 2)[1].removesuffix("g").split("n")
    assert config.scaling.gpus_per_worker * config.scaling.workers == int(nodes) * int(gpus)
