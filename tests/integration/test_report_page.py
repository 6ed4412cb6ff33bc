"""The run's page in a real browser: Chromium opens the file from disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import Began, add_evaluation, make_run

from dpo_ray.errors import RecoveryError
from dpo_ray.pairs.statistics import describe
from dpo_ray.pairs.store import open_store
from dpo_ray.report.page import write_comparison, write_data_page, write_report
from dpo_ray.training.faults import record_fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTHS = (375, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs Chromium: one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        # As root, in a container, Chromium has no sandbox of its own.
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run with three faults that failed, with long words everywhere; an evaluated one; both compared; their pairs."""
    folder, word = tmp_path_factory.mktemp("runs"), "x" * 300
    reasons = ("start", f"rank 1: {word}", "1 node with workers died", "rank 0 stood still")
    began = [Began(position, reason) for position, reason in zip((0, 100, 200, 300), reasons, strict=True)]
    error = RecoveryError(f"failure 4 of this kind: {word}\nTraceback\n  {word}")
    model = {"path": f"models/{word}"}
    failed = make_run(
        folder, "failed-with-a-long-name" * 4, steps=400, total=500, began=began, error=error, model=model
    )
    for _ in range(2):
        record_fault(failed, f"a replica of the reference was lost over {word}: its process died")
    finished = make_run(folder, "finished", chosen_falls=False)
    add_evaluation(finished)
    (store,) = (folder / "store" / "pairs").iterdir()
    pairs = open_store(str(store))
    assert pairs is not None
    write_data_page(describe(pairs), str(folder / "data.html"))
    write_comparison([failed, finished], str(folder / "both.html"))
    return [write_report(failed), write_report(finished), str(folder / "both.html"), str(folder / "data.html")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser(browser: Any, pages: list[str], width: int, scheme: str) -> None:
    """No message, no request, nothing wider than the window, no fault that axe-core knows, all tables open or not."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra `browser`")
    for place in pages:
        address = Path(place).as_uri()
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page, told, asked = context.new_page(), list[str](), list[str]()
        page.on("console", lambda message, told=told: told.append(message.text))
        page.on("pageerror", lambda error, told=told: told.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(address)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        # The first key leads past the navigation, and shows where one is.
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["x"] >= 0
        assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
        for opened in (False, True):
            if opened:
                page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (place, opened)
        assert asked == [address]
        assert told == []
        if width == WIDTHS[0]:
            found = axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
        context.close()
