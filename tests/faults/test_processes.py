"""Processes of a run die, stop or raise: the run goes on by itself, or when the same command is given again."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import psutil
import pytest

from dpo_ray import storage
from dpo_ray.training import manifest
from faults.harness import READY_S, Driver, Place, named, until, workers_of

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.timeout(600)]


def recovered_in_s(driver: Driver, after: float, step: int) -> float:
    """Seconds from a time to the first finished step of the next attempt; the step is one that was not done before."""
    done = driver.wait_for(lambda said: said["event"] == "step" and said["time"] > after and said["step"] > step)
    return float(done["time"] - after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "rank", "what", "step", "resumes_at"),
    [
        pytest.param("backward", 1, "raise", 7, 4, id="1-exception-mid-backward"),
        pytest.param("shard", 1, "kill", 8, 4, id="3-kill-before-a-shard"),
        pytest.param("commit", 0, "kill", 8, 4, id="4-kill-between-shards-and-manifest"),
        pytest.param("commit", 0, "kill", 24, 20, id="5-kill-in-the-last-save"),
    ],
)
def test_at_a_point(
    place: Place, twin: str, drivers: Any, point: str, rank: int, what: str, step: int, resumes_at: int
) -> None:
    name = f"{point}-{what}-{step}"
    driver = place.start(place.config(name), {"point": point, "rank": rank, "step": step, "do": what}, pace_s=0.1)
    drivers.append(driver)
    driver.finish()
    place.assert_like_twin(name, twin)
    assert [attempt["position"] for attempt in place.attempts(name)] == [0, resumes_at]
    assert len(driver.warnings()) == 1
    # Nothing is left of what the dead attempt had begun to write.
    for checkpoint in manifest.committed(place.uri(name)):
        there = storage.list_names(manifest.checkpoint_uri(place.uri(name), checkpoint))
        written_by = manifest.read_manifest(place.uri(name), checkpoint).attempt
        assert [each for each in there if "." not in each] == [manifest.attempt_folder(written_by)]


@pytest.mark.slow
def test_out_of_memory(place: Place, twin: str, drivers: Any) -> None:
    """One rank runs out of memory, twice: all go on with smaller microbatches, 0.7 times as large each time."""
    faults = [{"point": "backward", "rank": 1, "step": step, "do": "memory"} for step in (7, 10)]
    driver = place.start(place.config("memory", recovery={"max_worker_failures": 0}), *faults)
    drivers.append(driver)
    driver.finish()
    place.assert_same_but_for_rounding("memory", twin)
    assert [attempt["position"] for attempt in place.attempts("memory")] == [0, 4, 8]
    told = [text for text in driver.warnings() if "out of memory" in text]
    assert ["microbatches of 600 tokens; going on with 420" in told[0], "of 420 tokens; going on with 294" in told[1]]
    assert storage.read_json(storage.join(place.uri("memory"), "budget.json"))["tokens"] == 294


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(place: Place, twin: str, drivers: Any, number: signal.Signals) -> None:
    """The step under way is finished and kept, nothing is done twice, and the same command goes on after it."""
    name = f"asked-{number.name}"
    driver = place.start(place.config(name))
    drivers.append(driver)
    driver.wait_for_step(6)
    driver.process.send_signal(number)
    told = driver.fail()
    newest = manifest.newest(place.uri(name))
    assert newest is not None
    step = newest[1].state.step
    assert f"was stopped by {number.name}; its newest checkpoint is of step {step}, and the same command" in told
    assert step >= 6
    assert step % 4 or step == max(said["step"] for said in driver.said if said["event"] == "step")
    again = place.start(place.config(name))
    drivers.append(again)
    again.finish()
    place.assert_like_twin(name, twin)
    assert [attempt["position"] for attempt in place.attempts(name)] == [0, step]
    assert driver.warnings() == again.warnings() == []


@pytest.mark.slow
def test_kill_right_after_a_commit(place: Place, twin: str, drivers: Any) -> None:
    """Fault 2: what was committed is not lost."""
    driver = place.start(place.config("after-commit"))
    drivers.append(driver)
    until(lambda: "step-00000008" in manifest.committed(place.uri("after-commit")), driver)
    workers_of(driver)[1].kill()
    killed, seen = time.time(), max(said["step"] for said in driver.said if said["event"] == "step")
    # Lines of steps before the kill may still be on their way.
    took_s = 1.5 + recovered_in_s(driver, killed + 1.5, seen)
    driver.finish()
    place.assert_like_twin("after-commit", twin)
    assert place.attempts("after-commit")[1]["position"] >= 8
    print(f"from the kill to the next step: {took_s:.1f} s")


@pytest.mark.slow
def test_kill_controller_then_driver(place: Place, twin: str, drivers: Any) -> None:
    """Fault 11: without Ray Train's controller the driver goes on; without the driver the same command does."""
    config = place.config("controller")
    driver = place.start(config)
    drivers.append(driver)
    driver.wait_for_step(6)
    (controller,) = named(driver, "TrainController")
    controller.kill()
    driver.wait_for(lambda said: said["event"] == "warning" and "starting again" in said["text"])
    driver.wait_for_step(13)
    workers = workers_of(driver)
    os.kill(driver.process.pid, signal.SIGKILL)  # The driver alone: what it started finds out by itself.
    again = place.start(config)
    drivers.append(again)
    again.finish()
    place.assert_like_twin("controller", twin)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    generations = [attempt["generation"] for attempt in place.attempts("controller")]
    assert generations == [1, 1, 2]


@pytest.mark.slow
def test_a_controller_that_stands_still(place: Place, twin: str, drivers: Any) -> None:
    """It never hears of a death, and would hold the dead group's resources for ever."""
    driver = place.start(place.config("still", recovery={"hang_timeout_s": 8}))
    drivers.append(driver)
    driver.wait_for_step(6)
    (controller,) = named(driver, "TrainController")
    controller.suspend()
    workers_of(driver)[0].kill()
    driver.finish(2 * READY_S)
    assert not controller.is_running()
    place.assert_like_twin("still", twin)
    assert len(place.attempts("still")) == 2


@pytest.mark.slow
def test_a_group_that_does_not_come_up(place: Place, twin: str, drivers: Any) -> None:
    """Nothing of it stays to hold what the next group needs."""
    driver = place.start(place.config("group"), {"point": "group", "do": "raise"})
    drivers.append(driver)
    driver.wait_for_step(1)
    assert len(workers_of(driver)) == 2
    assert len(named(driver, "TrainController")) == 1
    driver.finish()
    place.assert_like_twin("group", twin)
    assert [attempt["position"] for attempt in place.attempts("group")] == [0, 0]
    assert "planted at group" in driver.warnings()[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_rank_that_stands_still(place: Place, twin: str, drivers: Any, what: str) -> None:
    """Fault 13: a frozen process, and a rank that is not where the others wait for it."""
    name = f"hang-{what}"
    config = place.config(name, recovery={"hang_timeout_s": 8})
    driver = place.start(config, {"point": "step", "rank": 1, "step": 10, "do": what})
    drivers.append(driver)
    step = driver.wait_for_step(9)
    hang = driver.wait_for(lambda said: said["event"] == "warning" and "its threads were doing" in said["text"])
    assert hang["time"] - step["time"] < 8 + 15
    driver.finish()
    place.assert_like_twin(name, twin)
    stacks = storage.read_bytes(storage.join(place.uri(name), "hangs", "attempt-0000.txt")).decode()
    assert "State:\tT (stopped)" in stacks if what == "stop" else "time.sleep(3600)" in stacks
    assert "train_step" in stacks


@pytest.mark.slow
def test_around_the_end_of_an_epoch(place: Place, twin: str, drivers: Any) -> None:
    """Fault 20: resumed twice in an epoch, right before its end and right after."""
    per_epoch = round(1 / place.steps(twin)[0]["epoch"])
    faults = [
        {"point": "step", "rank": rank, "step": step, "do": "kill"}
        for rank, step in ((0, per_epoch // 2), (1, per_epoch), (0, per_epoch + 1), (1, per_epoch + 2))
    ]
    config = place.config("epoch", train={"checkpoint_every_steps": 1}, recovery={"max_worker_failures": 1})
    driver = place.start(config, *faults)
    drivers.append(driver)
    driver.finish()
    place.assert_like_twin("epoch", twin)
    positions = [attempt["position"] for attempt in place.attempts("epoch")]
    assert len(positions) == 5
    assert all(
        fault["step"] - 2 <= position < fault["step"] for fault, position in zip(faults, positions[1:], strict=True)
    )


@pytest.mark.slow
def test_reference_actors_die(place: Place, twin: str, drivers: Any) -> None:
    """Fault 18: killed in the middle of a chunk, twice and all of them; scored again to the same numbers."""
    config = place.config("reference", reference={"tokens_per_microbatch": 4096, "replicas": 2})
    place.forget_scores()
    driver = place.start(config, *[{"point": "score", "do": "kill"}] * 4)
    drivers.append(driver)
    driver.finish()
    place.assert_like_twin("reference", twin)
    filled = place.filled("reference")
    assert (filled["lost_replicas"], filled["scored_pairs"], filled["hit_pairs"]) == (4, 200, 0)


@pytest.mark.slow
def test_the_reference_outlives_a_worker(place: Place, twin: str, drivers: Any) -> None:
    """A worker dies while pairs are still being scored: the replica that scores them goes on."""
    place.forget_scores()
    # The worker is killed while the third chunk, of which step 3 needs nothing, is scored.
    slow = [{"point": "score", "do": "slow"}] * 3
    driver = place.start(place.config("outlived"), *slow, {"point": "step", "rank": 0, "step": 3, "do": "kill"})
    drivers.append(driver)
    driver.finish()
    place.assert_like_twin("outlived", twin)
    assert len(place.attempts("outlived")) == 2
    filled = place.filled("outlived")
    assert (filled["started_replicas"], filled["lost_replicas"], filled["scored_pairs"]) == (1, 0, 200)


@pytest.mark.slow
def test_a_reference_that_moves(place: Place, drivers: Any) -> None:
    """A replica dies over a chunk, a worker before what the reference becomes is committed, and one after it was."""
    faults = [
        {"point": "score", "do": "kill"},
        {"point": "commit", "rank": 0, "step": 10, "do": "kill"},
        {"point": "step", "rank": 1, "step": 17, "do": "kill"},
    ]
    moving = {"sync_steps": 5, "mixup_alpha": 0.6}
    for name, planted in (("moving-twin", []), ("moving", faults)):
        drivers.append(place.start(place.config(name, reference=moving), *planted, pace_s=0.0))
        drivers[-1].finish()
        place.forget_scores()
    place.assert_like_twin("moving", "moving-twin")
    # The newest that was committed by then: of the reference's steps 5 and 15, or one that came after.
    start, second, third = (attempt["position"] for attempt in place.attempts("moving"))
    assert (start, second) in ((0, 5), (0, 8))
    assert third in (15, 16)
    assert place.filled("moving")["lost_replicas"] == 1
    # What is told of each, and shown, is what died, not what the other rank made of it.
    (replica,) = (line["reason"] for line in place.lines("moving", "faults.jsonl"))
    assert re.fullmatch(r"a replica of the reference was lost over \S+: its process died", replica)
    told = [attempt["reason"] for attempt in place.attempts("moving")]
    assert [text.partition(" on ")[0] for text in told] == [
        "start",
        *(f"the process of rank {at} died" for at in (0, 1)),
    ]
    report = storage.read_bytes(storage.join(place.uri("moving"), "report.html")).decode()
    # In a list, and at a mark, where long ones are cut.
    assert all(text in report and report.count(text[:80]) >= 2 for text in (replica, *told[1:]))
    # Each version by the attempt that made it; the second had nothing of its own before step 10.
    stores = storage.list_names(storage.join(place.uri("moving"), "reference"))
    made = [(1, 0), (2, 1), (3, 1), (4, 2)]
    assert sorted(stores) == [f"version-{version:06d}-attempt-{attempt:04d}-packed" for version, attempt in made]


@pytest.mark.slow
def test_a_failure_that_comes_again(place: Place, drivers: Any) -> None:
    """Without a new checkpoint between, the budget is used up, and the last error is told."""
    faults = [{"point": "step", "rank": 0, "step": 2, "do": "raise"}] * 2
    driver = place.start(place.config("again", recovery={"max_worker_failures": 1}), *faults, pace_s=0.0)
    drivers.append(driver)
    message = driver.fail()
    assert "failure 2 of this kind since step 0, recovery.max_worker_failures is 1" in message
    assert "planted at step 2 0" in message
