"""The cluster files are what Ray accepts, and agree with the versions that the project pins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

ROOT = Path(__file__).parents[2]
AWS = ROOT / "cluster/aws.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(AWS.read_text())


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    filled = fillout_defaults(cluster)
    validate_config(filled)
    assert set(filled["available_node_types"]) == {"head", "data", "policy", "reference"}


def test_ray_refuses_an_unknown_key(cluster: dict[str, Any]) -> None:
    """The check above means something: Ray's schema is closed."""
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(fillout_defaults({**cluster, "idle_timeout": 5}))


def test_reference_devices_are_spot_and_the_policy_cannot_take_them(cluster: dict[str, Any]) -> None:
    nodes = cluster["available_node_types"]
    assert nodes["reference"]["resources"]["reference"] >= 1
    assert nodes["reference"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "reference" not in nodes["policy"]["resources"]
    assert "InstanceMarketOptions" not in nodes["policy"]["node_config"]


def test_everything_goes_to_zero_when_idle(cluster: dict[str, Any]) -> None:
    workers = {
        name: node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]
    }
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in workers.values())
    assert cluster["idle_timeout_minutes"] > 0


def test_access_comes_from_instance_roles_alone(cluster: dict[str, Any]) -> None:
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"]["Name"]
    assert not re.search(r"AKIA|aws_(access|secret)|private_key|token", AWS.read_text(), re.IGNORECASE)


def test_the_image_has_the_pinned_ray(cluster: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{pins['ray']}-py311")
