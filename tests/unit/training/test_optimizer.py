"""What decides an update that no rank need be asked about."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn

from dpo_ray.config import OptimizerConfig
from dpo_ray.errors import ConfigError
from dpo_ray.training.optimizer import (
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_STEPS,
    block_matrices,
    build_optimizer,
    check_optimizer,
    compact_weights,
    learning_rate_at,
    orthogonalized,
)


def test_weights_with_moments_in_8_bits() -> None:
    """Rows of 64 or 48 numbers are no blocks of 256; of 512 they are, but in an embedding, and where frozen."""
    model = tiny("llama")
    assert not compact_weights(model)
    model.wide, model.frozen, model.embedding = nn.Linear(512, 3), nn.Linear(512, 3), nn.Embedding(3, 512)
    model.frozen.requires_grad_(False)
    assert compact_weights(model) == {model.wide.weight}


def test_a_warm_up_in_steps_or_as_a_share_of_them() -> None:
    """Of 55 steps a tenth is 5.5, rounded up 6: the fourth update has 3 sixths of the peak, the seventh all of it."""
    for warmup in (6, 0.1):
        rate = learning_rate_at(OptimizerConfig(learning_rate=1e-3, warmup_steps=warmup), 55)
        assert [rate(step) for step in (0, 3, 6)] == pytest.approx([0, 0.5e-3, 1e-3])
    without = learning_rate_at(OptimizerConfig(learning_rate=1e-3), 55)
    assert without(0) == 1e-3


def test_matrices_of_muon() -> None:
    """Seven in each of two blocks; not the norms, the embedding or the output layer, tied or not."""
    for kind in ("llama", "qwen2"):
        model = tiny(kind)
        names = {name for name, parameter in model.named_parameters() if parameter in block_matrices(model)}
        assert len(names) == 2 * 7
        assert all("_proj.weight" in name for name in names)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_singular_values_come_near_1(shape: tuple[int, int]) -> None:
    """From between 0.05 and 1 to where the quintic iteration leaves them; the vectors stay, whatever the scale."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(1.0, 0.05, min(shape))
    found = left.T @ orthogonalized(7.0 * left * values @ right) @ right.T
    torch.testing.assert_close(found, found.diagonal().diag(), rtol=0, atol=1e-4)
    assert 0.65 < found.diagonal().min() < found.diagonal().max() < 1.25


def test_products_in_bfloat16_are_torchs() -> None:
    theirs = pytest.importorskip("torch.optim._muon", reason="needs torch 2.9")
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    expected = theirs._zeropower_via_newtonschulz(matrix, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, 1e-7)
    assert torch.equal(orthogonalized(matrix.bfloat16()), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adamw_8bit",
            "no trained weight of LlamaForCausalLM has rows of a multiple of 256 numbers: it would be adamw",
        ),
        ("muon", "no trained weight of LlamaForCausalLM is a block's matrix: it would be adamw; use that"),
    ],
)
def test_what_would_be_adamw_is_refused(name: Any, message: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    model = tiny("llama")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("layers" not in key)
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model, OptimizerConfig(name=name))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"name is adamw_8bit, .* pip install 'dpo_ray\[bitsandbytes\]', or"):
        check_optimizer(OptimizerConfig(name="adamw_8bit"))
    check_optimizer(OptimizerConfig(name="adamw"))
