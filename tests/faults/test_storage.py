"""The storage fails, breaks off, crawls and damages what it holds: runs wait, ask again, fall back, or say why."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import S3Server
from fault_proxy import FaultProxy
from helpers import dpo_ray_command

from dpo_ray import storage
from dpo_ray.pairs.store import PairStore, open_store, read_chunk
from dpo_ray.training import manifest
from faults.harness import Driver, Place, until

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.timeout(900)]
EVERYTHING = ""
SHARDS = r"^PUT .*/checkpoints/.*/(rank|optimizer)-"
PAIRS = r"^GET .*/store/pairs/.*\.parquet"
RECORDS = r"^PUT .*/(metrics|ledger)\.jsonl"


@pytest.fixture(scope="module")
def way(s3_server: S3Server) -> Iterator[FaultProxy]:
    """What lies between all runs of this file and the S3 server; this process itself asks the server directly."""
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(way: FaultProxy) -> Iterator[FaultProxy]:
    """The way, clear again after the test."""
    yield way
    way.clear()


@pytest.fixture(scope="module")
def s3_place(s3_server: S3Server, way: FaultProxy, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """Runs of two workers on local Ray, that keep all but their raw pairs on S3."""
    folder = tmp_path_factory.mktemp("storage-faults")
    environment = {"AWS_ENDPOINT_URL": way.endpoint}
    return Place(s3_server.uri(folder.name), folder, tiny_model, environment)


def config_of(place: Place, name: str, **sections: dict[str, Any]) -> Path:
    """A run whose pairs lie in a dozen chunks, and whose checkpoints are all kept."""
    train = {"keep_checkpoints": 10, **sections.pop("train", {})}
    return place.config(name, data={"chunk_pairs": 16}, train=train, **sections)


@pytest.fixture(scope="module")
def s3_twin(s3_place: Place) -> str:
    """The run that nothing happens to, on the same S3."""
    driver = s3_place.start(config_of(s3_place, "twin"), pace_s=0.0)
    driver.finish()
    assert driver.warnings() == []
    s3_place.assert_exact("twin")
    return "twin"


@dataclass(frozen=True)
class Outage:
    """When an outage was first felt, and by which request where one was told so; when it ended; as `time.time`."""

    felt: float
    request: str
    ended: float


def outage(proxy: FaultProxy, driver: Driver, seconds: float, where: str = EVERYTHING, status: int = 0) -> Outage:
    """Fails requests with a status, or refuses all connections where it is 0, for so long after it was first felt."""
    first = ""
    if status:
        before = len(proxy.requests)
        fault = proxy.inject("status", status, where)
        until(lambda: fault.count, driver, 60)
        first = next(request for request in proxy.requests[before:] if re.search(where, request))
    else:
        proxy.refuse()
    felt = time.time()
    while time.time() < felt + seconds:
        assert driver.process.poll() is None, driver.said[-5:]
        time.sleep(0.05)
    proxy.clear()
    return Outage(felt, first, time.time())


def steps_during(driver: Driver, outage: Outage) -> list[int]:
    """Steps that were told of in an outage."""
    return [
        said["step"] for said in driver.said if said["event"] == "step" and outage.felt < said["time"] < outage.ended
    ]


def assert_undisturbed(place: Place, name: str, twin: str, driver: Driver) -> None:
    """One group of workers from beginning to end, and every number the twin's."""
    assert len(place.attempts(name)) == 1, place.attempts(name)
    assert not [text for text in driver.warnings() if "starting again" in text]
    place.assert_like_twin(name, twin)


@pytest.mark.slow
def test_short_outages(s3_place: Place, s3_twin: str, proxy: FaultProxy, drivers: Any) -> None:
    """Fault 14: five seconds each of everything, the shards, the records, the pairs, and a port that is closed."""
    driver = s3_place.start(config_of(s3_place, "short"), pace_s=0.5)
    drivers.append(driver)
    for step, where, status in (
        (1, EVERYTHING, 503),
        (6, SHARDS, 500),
        (9, RECORDS, 500),
        (13, PAIRS, 503),
        (18, "", 0),
    ):
        driver.wait_for_step(step)
        outage(proxy, driver, 5, where, status)
    driver.finish()
    assert_undisturbed(s3_place, "short", s3_twin, driver)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "status", "at_step", "seconds"),
    [
        pytest.param(EVERYTHING, 0, 5, 60, id="everything-refused"),
        pytest.param(EVERYTHING, 503, 5, 60, id="everything-503"),
        pytest.param(SHARDS, 500, 5, 60, id="shards-500"),
        pytest.param(PAIRS, 503, 0, 60, id="pairs-503"),
        pytest.param(RECORDS, 500, 5, 60, id="records-500"),
        pytest.param(EVERYTHING, 503, 5, 600, id="everything-503-ten-minutes", marks=pytest.mark.timeout(1500)),
    ],
)
def test_long_outage(
    s3_place: Place,
    s3_twin: str,
    proxy: FaultProxy,
    drivers: Any,
    where: str,
    status: int,
    at_step: int,
    seconds: float,
    request: pytest.FixtureRequest,
) -> None:
    """Fault 14: waited out however long, though a hang would be noticed sooner; steps go on while there is data."""
    name = request.node.callspec.id
    before = len(proxy.requests)
    driver = s3_place.start(config_of(s3_place, name, recovery={"hang_timeout_s": 30}), pace_s=0.5)
    drivers.append(driver)
    if at_step:
        driver.wait_for_step(at_step)
    else:  # The stream reads far ahead: its storage fails as soon as there is an attempt.
        until(lambda: any(puts(line, "attempts.jsonl") for line in proxy.requests[before:]), driver)
    failed = outage(proxy, driver, seconds, where, status)
    driver.finish(240)
    assert_undisturbed(s3_place, name, s3_twin, driver)
    if where == SHARDS:
        # That save waits, and the next one, four steps later, waits for it. Telling takes a second: a step of grace.
        (saved,) = map(int, re.findall(r"step-(\d+)", failed.request))
        told = steps_during(driver, failed)
        assert {saved + 2, saved + 3, saved + 4} <= set(told)
        assert max(told) == saved + 4


def puts(line: str, name: str) -> bool:
    """Whether a request puts a file of this name."""
    return line.startswith("PUT ") and line.partition("?")[0].endswith(name)


@pytest.mark.slow
def test_cut_and_slow(s3_place: Place, s3_twin: str, proxy: FaultProxy, drivers: Any) -> None:
    """Fault 15: answers and requests that break off, or crawl, before and after a restart; all asked for again."""
    faults = [
        proxy.inject("slow", 1000, SHARDS, times=1),
        proxy.inject("slow", 1000, PAIRS, times=2),
        proxy.inject("cut_answer", 300, r"^GET .*\.(parquet|safetensors|json|jsonl)", probability=0.3, times=40),
        proxy.inject("cut_request", 300, r"^PUT .*\.(safetensors|json|jsonl)", probability=0.3, times=40),
    ]
    kill = {"point": "step", "step": 14, "rank": 1, "do": "kill"}
    driver = s3_place.start(config_of(s3_place, "cut"), kill, pace_s=0.3)
    drivers.append(driver)
    driver.finish(420)
    s3_place.assert_like_twin("cut", s3_twin)
    assert len(s3_place.attempts("cut")) == 2
    assert all(fault.count for fault in faults), faults


@pytest.mark.slow
@pytest.mark.parametrize("what", ["flip", "delete", "truncate"])
def test_a_damaged_checkpoint(s3_place: Place, s3_twin: str, drivers: Any, what: str) -> None:
    """Fault 16: the newest checkpoint is not what was written: it is set aside, and the one before it is used."""
    config = config_of(s3_place, what)
    driver = s3_place.start(config)
    drivers.append(driver)
    until(lambda: len(manifest.committed(s3_place.uri(what))) >= 3, driver)
    driver.kill()
    before, newest = manifest.committed(s3_place.uri(what))[-2:]
    place = manifest.checkpoint_uri(s3_place.uri(what), newest)
    if what == "truncate":
        damaged = storage.join(place, "manifest.json")
        whole = storage.read_bytes(damaged)
        storage.write_bytes(damaged, whole[: len(whole) // 2])
    else:
        damaged = storage.join(place, manifest.attempt_folder(0), f"rank-000{int(what == 'flip')}.safetensors")
        data = bytearray(storage.read_bytes(damaged))
        data[len(data) // 2] ^= 1
        storage.write_bytes(damaged, bytes(data)) if what == "flip" else storage.remove(damaged)

    again = s3_place.start(config, pace_s=0.3)
    drivers.append(again)
    again.wait_for(lambda said: said["event"] == "step")
    (record,) = [name for name in storage.list_names(place) if name.startswith("set-aside-")]
    assert damaged in storage.read_json(storage.join(place, record))["reason"]
    again.finish()
    s3_place.assert_like_twin(what, s3_twin)
    positions = [attempt["position"] for attempt in s3_place.attempts(what)]
    tried = [] if what == "truncate" else [int(newest[5:])]
    assert positions == [0, *tried, int(before[5:])]
    assert damaged in "\n".join(again.warnings())


@pytest.mark.slow
def test_a_damaged_chunk(tmp_path: Path, tiny_model: Path, drivers: Any) -> None:
    """Fault 16: pairs that are not what was written end the run at once, with the name of the file."""
    place = Place(str(tmp_path / "storage"), tmp_path, tiny_model)
    config = place.config("chunk")
    done = dpo_ray_command("reference", str(config))
    assert done.returncode == 0, done.stderr
    (chunk, *_) = sorted((tmp_path / "storage").glob("store/pairs/*/train-*.parquet"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    driver = place.start(config, pace_s=0.0)
    drivers.append(driver)
    message = driver.fail()
    assert driver.said[-1]["kind"] == "DataError"
    assert f"{chunk}: the chunk is missing or damaged" in message
    assert len(place.attempts("chunk")) == 1


@pytest.mark.slow
def test_no_space_once(s3_place: Place, s3_twin: str, drivers: Any) -> None:
    """Fault 17: one rank cannot write its part: that save is none, the next attempt's is."""
    full = {"point": "shard", "rank": 1, "step": 8, "do": "full"}
    driver = s3_place.start(config_of(s3_place, "full"), full, pace_s=0.1)
    drivers.append(driver)
    driver.finish()
    s3_place.assert_like_twin("full", s3_twin)
    (warning,) = driver.warnings()
    assert "no space left on device" in warning
    assert [attempt["position"] for attempt in s3_place.attempts("full")] == [0, 4]
    assert manifest.read_manifest(s3_place.uri("full"), "step-00000008").attempt == 1


@pytest.mark.slow
def test_no_space_ever(s3_place: Place, drivers: Any) -> None:
    """Fault 17: where it stays full, the run ends with what the writer said, and without a checkpoint."""
    config = config_of(s3_place, "full-always", recovery={"max_worker_failures": 1})
    driver = s3_place.start(config, *[{"point": "shard", "rank": 1, "do": "full"}] * 4, pace_s=0.0)
    drivers.append(driver)
    message = driver.fail()
    assert "no space left on device" in message
    assert "recovery.max_worker_failures is 1" in message
    assert manifest.committed(s3_place.uri("full-always")) == []


def prepared(place: Place, name: str) -> PairStore:
    """The pair store that `dpo-ray prepare` makes, in a process with planted faults."""
    config = place.config(name, data={"chunk_pairs": 16, "max_reject_fraction": 0.01})
    done = dpo_ray_command("prepare", str(config), **place.planted_environment(name))
    assert done.returncode == 0, done.stderr
    (uri,) = storage.list_names(storage.join(place.storage_path, "store", "pairs"))
    store = open_store(storage.join(place.storage_path, "store", "pairs", uri))
    assert store is not None
    return store


@pytest.mark.slow
def test_a_tokenizing_task_dies(tmp_path: Path, tiny_model: Path) -> None:
    """Fault 19: done again, and the store is the same, byte for byte; a corrupt row is one reject and nothing else."""
    places = {name: Place(str(tmp_path / name), tmp_path, tiny_model) for name in ("twin", "killed", "corrupt")}
    stores = {"twin": prepared(places["twin"], "twin")}
    places["killed"].plant("killed", [{"point": "tokenize", "do": "kill"}], 0.0)
    stores["killed"] = prepared(places["killed"], "killed")
    assert (tmp_path / "killed.faults.json.0.happened").exists()
    assert digests(tmp_path / "killed" / "store") == digests(tmp_path / "twin" / "store")

    lines = Path(places["twin"].pairs).read_text().splitlines()
    lines[100] = lines[100].replace('"chosen"', '"chosen', 1)
    Path(places["twin"].pairs).write_text("\n".join(lines) + "\n")
    stores["corrupt"] = prepared(places["corrupt"], "corrupt")
    whole, rest = (pairs_by_id(stores[name]) for name in ("twin", "corrupt"))
    assert stores["corrupt"].counts["rejects"] == 1
    assert len(whole) - len(rest) == 1
    assert rest.items() < whole.items()
    (reject,) = sorted((tmp_path / "corrupt" / "corrupt" / "rejects").iterdir())
    assert json.loads(reject.read_text())["row"] == 101


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, and its digest."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pairs_by_id(store: PairStore) -> dict[bytes, tuple[bytes, ...]]:
    """All tokens of all pairs."""
    chunks = [*store.train, *store.eval]
    pairs = [pair for chunk in chunks for pair in read_chunk(store.uri, chunk)]
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    return {pair.pair_id: tuple(part.tobytes() for part in pair.parts) for pair in pairs}
