"""How many floating-point operations a device can do at most: what model-FLOP utilisation is measured against."""

from __future__ import annotations

import re
import time

import torch

from dpo_ray.model.linear import widens

# Dense bfloat16, in TFLOP/s, from the makers' data sheets, by words of the device's name; the first match counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second: the data sheet's, or, where it is not known, a large product's.

    Args:
        device: Where to compute.
        dtype: Of the products.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return tflops * 1e12
    return _measured(device, torch.float32 if widens(dtype, device) else dtype)


def _measured(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    size = 1024 if device.type == "cpu" else 8192
    matrix, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        _ = matrix @ matrix
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
