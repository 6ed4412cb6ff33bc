"""A driver under test: trains, and prints what happens as JSON lines with the time of its printing."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from dpo_ray import train
from dpo_ray.config import load_config
from dpo_ray.errors import FinalError
from dpo_ray.orchestration.watch import Watcher


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, "time": time.time(), **values}), flush=True)


class Teller(Watcher):
    """Prints what the driver tells."""

    def phase(self, text: str) -> None:
        say("phase", text=text)

    def warning(self, text: str) -> None:
        say("warning", text=text)

    def line(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            say("step", step=line["step"])


if __name__ == "__main__":
    try:
        result = train(load_config(sys.argv[1]), Teller())
    except FinalError as error:
        say("error", kind=type(error).__name__, text=str(error))
        sys.exit(1)
    say("done", steps=result.steps)
