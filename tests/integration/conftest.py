"""A Ray instance that the tests of one session share."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray on this machine, with more logical CPUs than cores so that all actors of a test fit."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


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
