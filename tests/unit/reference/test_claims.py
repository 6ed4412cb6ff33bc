"""Claims: of many fillers one scores a chunk, and a dead one's chunks go to exactly one other."""

import threading
from pathlib import Path

import pytest

from dpo_ray import storage
from dpo_ray.reference import claims
from dpo_ray.reference.claims import Claims, living_fillers


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.02)
    monkeypatch.setattr(claims, "LOOK_S", 0.2)
    monkeypatch.setattr(claims, "LOOKS", 6)


def die(*fillers: Claims) -> None:
    """As a process that is killed: no beat any more, and nothing given back."""
    for filler in fillers:
        filler._closed.set()
        filler._thread.join()


def test_one_of_many_takes_a_chunk(tmp_path: Path) -> None:
    fillers = [Claims(str(tmp_path), f"run{index}") for index in range(8)]
    keys = [f"chunk{index}" for index in range(20)]
    taken: dict[str, list[int]] = {key: [] for key in keys}

    def take(index: int) -> None:
        for key in keys:
            if fillers[index].take(key):
                taken[key].append(index)

    threads = [threading.Thread(target=take, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    die(*fillers)
    assert all(len(owners) == 1 for owners in taken.values())


def test_what_is_given_back_can_be_taken(tmp_path: Path) -> None:
    one, other = Claims(str(tmp_path), "one"), Claims(str(tmp_path), "other")
    assert all([one.take("a"), one.take("a"), one.take("b")])
    assert not other.take("a")
    one.release("a")
    assert other.take("a")
    assert not one.take("a")
    one.close()
    assert other.take("b")
    other.close()
    assert storage.list_names(str(tmp_path / "claims")) == storage.list_names(str(tmp_path / "fillers")) == []


def test_the_living_keep_what_they_have(tmp_path: Path) -> None:
    owner, other = Claims(str(tmp_path), "owner"), Claims(str(tmp_path), "other")
    assert owner.take("a")
    for _ in range(10):
        assert not other.take("a")
        threading.Event().wait(0.22)
    assert set(living_fillers(str(tmp_path))) == {"owner.00000000", "other.00000000"}
    die(owner, other)


def test_one_takes_over_from_the_dead(tmp_path: Path) -> None:
    """Six looks at a count that stands still, and one of two gets the chunk; from that one, when it dies, a third."""
    dead = Claims(str(tmp_path), "dead")
    assert dead.take("a")
    die(dead)
    heirs = [Claims(str(tmp_path), f"heir{index}") for index in range(2)]
    looks, got = 0, [False, False]
    while not any(got):
        got = [heir.take("a") for heir in heirs]
        looks += 1
        threading.Event().wait(0.22)
    assert looks > 6
    assert got.count(True) == 1
    die(*heirs)
    heir, third = heirs[got.index(True)], Claims(str(tmp_path), "third")
    while not third.take("a"):
        threading.Event().wait(0.22)
    third.release("a")
    assert storage.list_names(str(tmp_path / "claims")) == []
    assert heir.filler != third.filler


def test_the_next_driver_of_a_run_need_not_wait(tmp_path: Path) -> None:
    before = Claims(str(tmp_path), "run", 3)
    assert before.take("a")
    die(before)
    after = Claims(str(tmp_path), "run", 4)
    assert after.take("a")
    assert storage.list_names(str(tmp_path / "fillers")) == ["run.00000004"]
    after.release("a")
    assert storage.list_names(str(tmp_path / "claims")) == []
