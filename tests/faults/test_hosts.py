"""Hosts of their own lose their power or their network in the middle of a job, and come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import S3Server, serve_s3
from doors import CALLS, knock
from hosts import AGENT_PORT, DASHBOARD_PORT, GCS_PORT, Host, Network, RayHosts, issue_certificates, needs_hosts
from wire import Flow

from dpo_ray import storage
from faults.harness import Driver, Place, until

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]
# One worker, and the reference, fit on a host.
SCALING = {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 2, "grow_after_s": 1}
CPUS = 3
# What each side of a connection over TLS sends first.
TLS_HANDSHAKE = b"\x16\x03"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    needs_hosts()
    names = ("head", "worker-1", "worker-2", "laptop")
    with Network(*names, *(f"tls-{name}" for name in names), "store") as made:
        yield made


@pytest.fixture(scope="module")
def store(network: Network) -> Iterator[S3Server]:
    with serve_s3(network["store"].address, network["store"].prefix) as server:
        yield server


@pytest.fixture(scope="module")
def s3_place(store: S3Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Runs of which everything lies on the S3 server."""
    place = Place(store.uri("faults"), tmp_path_factory.mktemp("hosts"), tiny_model)
    for path in tiny_model.iterdir():
        storage.upload(str(path), store.uri(f"model/{path.name}"))
    storage.upload(place.pairs, store.uri("pairs.jsonl"))
    place.model, place.pairs = store.uri("model"), store.uri("pairs.jsonl")
    return place


@pytest.fixture(scope="module")
def s3_twin(s3_place: Place) -> str:
    """The run that nothing happens to, on this machine; it has all pairs scored."""
    s3_place.start(s3_place.config("twin"), pace_s=0.0).finish()
    s3_place.assert_exact("twin")
    return "twin"


@pytest.fixture(scope="module")
def cluster(network: Network, s3_place: Place, s3_twin: str) -> RayHosts:
    """Two workers, and a token."""
    made = RayHosts(network["head"], [network["worker-1"], network["worker-2"]], CPUS)
    made.ask_for_a_token(network["laptop"])
    for host in (made.head, *made.workers):
        host.own_environment |= s3_place.planted_environment("cluster")
    made.start()
    return made


def job(laptop: Host, cluster: RayHosts, place: Place, name: str, **sections: dict[str, Any]) -> Driver:
    """A run as a job, sent from the laptop."""
    config = place.config(name, scaling=SCALING, **sections)
    (place.folder / name).mkdir()
    submit = ("ray", "job", "submit", "--working-dir", str(place.folder / name), "--")
    environment = {**laptop.environment, "RAY_ADDRESS": cluster.dashboard}
    return place.start(config, prefix=(*laptop.prefix, *submit), pace_s=1.0, **environment)


def goes_on_alone(driver: Driver, place: Place, name: str) -> None:
    """A group of one makes steps."""
    until(lambda: len(place.attempts(name)) == 2, driver)
    seen = len(driver.said)
    driver.wait_for_step(1, after=seen)
    # The run shall not be over before the other is back.
    place.plant("cluster", [], pace_s=8.0)


def finishes_together(driver: Driver, place: Place, name: str, twin: str) -> None:
    """The group is of two again, and the run what it would have been."""
    until(lambda: len(place.attempts(name)) == 3, driver)
    place.plant("cluster", [], pace_s=0.0)
    driver.finish()
    assert [attempt["world_size"] for attempt in place.attempts(name)] == [2, 1, 2]
    assert place.attempts(name)[2]["reason"] == "there is room for 2 workers instead of 1"
    place.assert_same_but_for_rounding(name, twin)


def test_a_host_loses_its_power(
    network: Network, cluster: RayHosts, s3_place: Place, s3_twin: str, drivers: list[Driver]
) -> None:
    driver = job(network["laptop"], cluster, s3_place, "power")
    drivers.append(driver)
    driver.wait_for_step(6)
    cluster.workers[0].power_off()
    goes_on_alone(driver, s3_place, "power")
    assert s3_place.attempts("power")[1]["reason"] == "1 node with workers died"
    cluster.add(cluster.workers[0])
    finishes_together(driver, s3_place, "power", s3_twin)


def test_a_cable_is_pulled(
    network: Network, cluster: RayHosts, s3_place: Place, s3_twin: str, drivers: list[Driver]
) -> None:
    """The host that is cut off reaches neither the others nor the storage; it comes back with all its processes."""
    until(lambda: cluster.num_alive() == 3)
    driver = job(network["laptop"], cluster, s3_place, "cable", recovery={"hang_timeout_s": 10})
    drivers.append(driver)
    driver.wait_for_step(6)
    host = cluster.workers[1]
    host.cut()
    goes_on_alone(driver, s3_place, "cable")
    host.heal()

    def back() -> bool:
        # Where Ray has given it up, it ends by itself, and somebody starts it again.
        if not host.is_on:
            host.forget()
            cluster.add(host)
        return len(s3_place.attempts("cable")) == 3

    until(back, driver)
    finishes_together(driver, s3_place, "cable", s3_twin)


def test_a_job_over_tls(network: Network, s3_place: Place, s3_twin: str, drivers: list[Driver], tmp_path: Path) -> None:
    """Ray's servers want a certificate of whoever calls them; the dashboard has none, and asks for the token alone."""
    made = RayHosts(network["tls-head"], [network["tls-worker-1"], network["tls-worker-2"]], CPUS)
    made.ask_for_a_token(network["tls-laptop"])
    hosts = (made.head, *made.workers)
    authority = issue_certificates(hosts, tmp_path)
    for host in hosts:
        host.own_environment |= s3_place.planted_environment("cluster")
    laptop = network["tls-laptop"]
    with network.overheard() as overheard:
        made.start()
        driver = job(laptop, made, s3_place, "tls")
        drivers.append(driver)
        s3_place.plant("cluster", [], pace_s=0.0)
        driver.finish()
    s3_place.assert_same_but_for_rounding("tls", s3_twin)
    check_what_is_in_the_clear(overheard, made)

    address = f"{made.head.address}:{GCS_PORT}"
    assert knock(made.head.address, DASHBOARD_PORT, made.token) == "lets in"
    # The token alone is not enough, with TLS or without.
    assert knock(made.head.address, GCS_PORT, made.token) == "other"
    own, key = made.head.home / "host.pem", made.head.home / "host.key"
    assert not _answers(address, made.token, authority)
    assert not _answers(address, None, authority, key, own)
    assert _answers(address, made.token, authority, key, own)
    status = ("ray", "status", "--address", address)
    assert laptop.run(*status).returncode != 0
    assert "6.0 CPU" in made.head.run(*status).stdout
    for host in hosts:
        host.power_off()


def check_what_is_in_the_clear(overheard: dict[Flow, bytes], cluster: RayHosts) -> None:
    """All that a cluster's hosts send each other is TLS, but for Ray's HTTP, with the token, and what torch sends."""
    http = {flow for flow in overheard if {flow.source_port, flow.target_port} & {DASHBOARD_PORT, AGENT_PORT}}
    told = {flow for flow, content in overheard.items() if cluster.token.encode() in content}
    assert told
    assert told <= http
    own = {host.address for host in (cluster.head, *cluster.workers)}
    clear = {
        flow: content
        for flow, content in overheard.items()
        if {flow.source, flow.target} <= own and content and not content.startswith(TLS_HANDSHAKE) and flow not in http
    }
    assert {address for flow in clear for address in (flow.source, flow.target)} == {h.address for h in cluster.workers}
    # The way in which torch's processes find each other; then gloo's tensors.
    assert any(b"init/" in content for content in clear.values())
    assert max(map(len, clear.values())) > 1_000_000


def _answers(address: str, token: str | None, authority: Path, *key_and_certificate: Path) -> bool:
    """Whether Ray's GCS answers to a client over TLS."""
    credentials = grpc.ssl_channel_credentials(
        authority.read_bytes(), *(each.read_bytes() for each in key_and_certificate)
    )
    (method, request), *_ = CALLS.items()
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.secure_channel(address, credentials) as channel:
        try:
            channel.unary_unary(method)(request, timeout=5, metadata=metadata)
            return True
        except grpc.RpcError:
            return False
