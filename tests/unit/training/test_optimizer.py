"""What decides an update that no rank need be asked about."""

from __future__ import annotations

import sys

import pytest
from tiny_models import tiny
from torch import nn

from dpo_ray.config import OptimizerConfig
from dpo_ray.errors import ConfigError
from dpo_ray.training.optimizer import build_optimizer, check_optimizer, compact_weights


def test_weights_with_moments_in_8_bits() -> None:
    """Rows of 64 or 48 numbers are no blocks of 256; of 512 they are, but in an embedding, and where frozen."""
    model = tiny("llama")
    assert not compact_weights(model)
    model.wide, model.frozen, model.embedding = nn.Linear(512, 3), nn.Linear(512, 3), nn.Embedding(3, 512)
    model.frozen.requires_grad_(False)
    assert compact_weights(model) == {model.wide.weight}


def test_what_would_be_adamw_is_refused() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    with pytest.raises(
        ConfigError, match="no trained weight of LlamaForCausalLM has rows of a multiple of 256 numbers"
    ):
        build_optimizer(tiny("llama"), OptimizerConfig(name="adamw_8bit"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"name is adamw_8bit, .* pip install 'dpo_ray\[bitsandbytes\]', or"):
        check_optimizer(OptimizerConfig(name="adamw_8bit"))
    check_optimizer(OptimizerConfig(name="adamw"))
