"""What a model's files say before it is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.model import files
from dpo_ray.model.files import check_quantize, check_trainable


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8, "router_aux_loss_coef": 0.02},
            r"mixtral is a mixture of 8 experts .* \(router_aux_loss_coef: 0.02\), which dpo_ray does not compute",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 128, "router_aux_loss_coef": 0.001},
            "qwen3_moe is a mixture of 128",
        ),
        ({"model_type": "mixtral", "num_local_experts": 8, "router_aux_loss_coef": 0.0}, None),
        ({"model_type": "llama"}, None),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, None),
        ({"model_type": "t5"}, "t5 is no causal language model; model.path wants one"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is no causal language model"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "is no causal language model"),
    ],
)
def test_what_would_not_be_trained_as_it_is_meant_to(
    tmp_path: Path, about: dict[str, Any], message: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(about))
    if message is None:
        check_trainable(str(tmp_path))
    else:
        with pytest.raises(ConfigError, match=message):
            check_trainable(str(tmp_path))


def test_who_writes_a_name_of_the_hub_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="`hf download Org/Model-1.5B --local-dir models/Org/Model-1.5B`"):
        check_trainable(str(tmp_path / "Org" / "Model-1.5B"))
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match=r"local or s3://\)$"):
        check_trainable(str(tmp_path / "models" / "mine"))


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"quantize is nf4, but the package bitsandbytes .*pip install 'dpo_ray\[bitsandbytes"
    ):
        check_quantize("nf4", str(tmp_path))
    monkeypatch.setattr(files, "check_installed", lambda *_: None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    check_quantize("nf4", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 128}')
    with pytest.raises(ConfigError, match="qwen3_moe is a mixture of 128 experts, whose weights bitsandbytes leaves"):
        check_quantize("nf4", str(tmp_path))
