"""One place of pairs, model and stores for all runs of a test session, and the undisturbed twin among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.harness import Driver, Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """Runs of two workers on local Ray, on a local storage path."""
    folder = tmp_path_factory.mktemp("faults")
    return Place(str(folder / "storage"), folder, tiny_model)


@pytest.fixture(scope="session")
def twin(place: Place) -> str:
    """The run that nothing happens to."""
    driver = place.start(place.config("twin"), pace_s=0.0)
    driver.finish()
    assert driver.warnings() == []
    assert len(place.attempts("twin")) == 1
    place.assert_exact("twin")
    return "twin"


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    """Drivers that are gone after the test, however it ends."""
    started: list[Driver] = []
    yield started
    for driver in started:
        if driver.process.poll() is None:
            driver.kill()
