"""What a benchmark writes down of the machine that it ran on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path


def cpu_name() -> str:
    """The processor, as the system names it, and its widest vector instructions."""
    import torch  # Some benchmarks leave it to their subprocesses until they are done.

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def versions(*packages: str) -> dict[str, str]:
    """Python's version, and those of installed packages."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
