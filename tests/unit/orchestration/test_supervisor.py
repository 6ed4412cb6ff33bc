"""What the supervisor decides, without a cluster: how many workers fit, and when failures are too many."""

from collections.abc import Sequence
from typing import Any

import pytest

from dpo_ray.config import Config, RecoveryConfig, parse_config
from dpo_ray.errors import RecoveryError
from dpo_ray.orchestration import resources
from dpo_ray.orchestration.group import End
from dpo_ray.orchestration.supervisor import Failures
from dpo_ray.types import Attempt


def config(**scaling: Any) -> Config:
    """An elastic run whose reference takes one and a half CPUs."""
    return parse_config(
        {
            "name": "run",
            "storage_path": "/s",
            "model": {"path": "/m"},
            "data": {"train": ["/p"]},
            "reference": {"replicas": 1, "cpus_per_replica": 1.5},
            "scaling": {"workers": {"min": 1, "max": 8}, **scaling},
        }
    )


@pytest.mark.parametrize(
    ("total", "free", "references", "own", "fits"),
    [
        ([4, 4], [4, 4], False, [], 8),
        ([4, 3], [4, 3], True, [], 5),
        # The reference comes where it costs the fewest workers: of two and a half CPUs it leaves a whole one.
        ([2, 2.5], [2, 2.5], True, [], 3),
        # It already runs: what is free is without it, and it is not counted twice.
        ([4, 4], [2, 4], True, [], 6),
        # Half a CPU on each is not a whole one.
        ([1.5, 2.5], [1.5, 2.5], False, [], 3),
        # Four of our own run on the first node.
        ([4, 3], [0, 3], False, ["0"] * 4, 7),
        # Somebody else has all of the second.
        ([4, 4], [4, 0], False, [], 4),
        ([16], [16], False, [], 8),
        ([], [], False, [], 0),
    ],
)
def test_room(
    monkeypatch: pytest.MonkeyPatch,
    total: Sequence[float],
    free: Sequence[float],
    references: bool,
    own: Sequence[str],
    fits: int,
) -> None:
    nodes = {str(index): {"CPU": float(cpus)} for index, cpus in enumerate(total)}
    left = {str(index): {"CPU": float(cpus)} for index, cpus in enumerate(free)}
    monkeypatch.setattr(resources, "usable_nodes", lambda: nodes)
    monkeypatch.setattr(resources, "free_resources", lambda names: {name: dict(left[name]) for name in names})
    assert resources.room(config(), references, own) == (fits, sorted(nodes))


def attempt(position: int) -> Attempt:
    return Attempt(0, 1, position, None, 2, "test", "now")


def test_failures_in_a_row_are_limited_by_kind() -> None:
    failures = Failures(RecoveryConfig(max_worker_failures=2, max_hangs=0, max_node_failures=-1))
    failures.count(End("worker", "one"), attempt(0))
    failures.count(End("worker", "two"), attempt(0))
    for _ in range(100):
        failures.count(End("node", "gone"), attempt(0))
    with pytest.raises(RecoveryError, match="three: failure 3 of this kind since step 0, recovery.max_worker_failures"):
        failures.count(End("worker", "three", "trace"), attempt(0))
    # A new checkpoint: the count begins anew.
    failures.count(End("worker", "four"), attempt(5))
    with pytest.raises(RecoveryError, match=r"recovery.max_hangs is 0"):
        failures.count(End("hang", "still"), attempt(5))
