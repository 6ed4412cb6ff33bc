"""What workers make of where they are."""

from typing import Any

import pytest

from dpo_ray.config import ScalingConfig
from dpo_ray.orchestration.worker import group_among


@pytest.mark.parametrize(
    ("shard_over", "nodes", "group", "said"),
    [
        ("all", "AAB", 3, ""),
        ("node", "AAA", 3, ""),
        ("node", "AABB", 2, ""),
        ("node", "AAB", 3, "shard_over is node, and the 3 workers (2, 1 on a node) are no groups of that kind"),
        (2, "AABB", 2, ""),
        (2, "AA", 2, ""),
        (2, "AAB", 3, "shard_over is 2, and the 3 workers (2, 1 on a node) are no groups of that kind"),
    ],
)
def test_groups_that_cannot_be_made_are_told_of_once(
    shard_over: Any, nodes: str, group: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    scaling = ScalingConfig.model_validate({"workers": {"min": 1, "max": 8}, "shard_over": shard_over})
    assert [group_among(scaling, rank, list(nodes)) for rank in range(len(nodes))] == [group] * len(nodes)
    assert len(caplog.messages) == bool(said)
    assert said in caplog.text
