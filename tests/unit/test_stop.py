"""A signal asks; a second one does what it would have done before."""

import signal
import threading
from collections.abc import Iterator

import pytest

from dpo_ray.errors import StoppedError
from dpo_ray.orchestration.stop import Stop


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """Python's own, which a process in the background of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_asks_and_the_second_acts() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Stop() as stop:
        stop.check("runs/a", 3)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == "SIGTERM"
        with pytest.raises(StoppedError, match="runs/a was stopped by SIGTERM; .* of step 3, and the same") as found:
            stop.check("runs/a", 3)
        assert found.value.signal == 15
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_line_asks_and_a_signal_is_heard_besides() -> None:
    """The signal, which is the user's, is what the run is said to have been stopped by."""
    with Stop(lambda line: "far behind" if line["step"] == 2 else None) as stop:
        stop.hear({"step": 1})
        assert stop.asked is None
        stop.hear({"step": 2})
        assert stop.asked == "far behind"
        with pytest.raises(StoppedError, match="runs/a was stopped: far behind; .* of step 3") as found:
            stop.check("runs/a", 3)
        assert found.value.signal == 0
        stop.check("runs/a", 3, trained=True)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedError, match="by SIGTERM") as found:
            stop.check("runs/a", 3)
        assert found.value.signal == 15
        with pytest.raises(StoppedError, match="by SIGTERM"):
            stop.check("runs/a", 3, trained=True)


def test_a_tracker_asks() -> None:
    stop = Stop()
    stop.hear({"stop": "my_module:Check: low enough"})
    assert stop.asked == "my_module:Check: low enough"


def test_handlers_are_put_back_and_other_threads_ask_nobody() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before

    def elsewhere() -> None:
        with Stop():
            found.append(signal.getsignal(signal.SIGINT))

    found = list[object]()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]
