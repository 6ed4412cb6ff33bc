"""A cluster that the tests of a module share."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[None]:
    """A cluster that the commands of a module's tests connect to, so that they need not start Ray each."""
    cluster = Cluster()
    cluster.add_node(num_cpus=4, include_dashboard=False)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_ADDRESS", cluster.address)
        yield
    ray.shutdown()
    cluster.shutdown()
