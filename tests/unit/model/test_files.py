"""What a model's files say before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.model.files import refuse_auxiliary_loss


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
    ],
)
def test_a_router_s_own_loss_is_not_left_out_in_silence(
    tmp_path: Path, about: dict[str, Any], message: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(about))
    if message is None:
        refuse_auxiliary_loss(str(tmp_path))
    else:
        with pytest.raises(ConfigError, match=message):
            refuse_auxiliary_loss(str(tmp_path))
