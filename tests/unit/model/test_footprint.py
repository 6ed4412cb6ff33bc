"""What a model's passes keep, counted without memory, against sums over its code by hand."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.model.footprint import Footprint, policy_footprint, reference_footprint

D, HEADS, KEY_HEADS, HEAD, INNER, VOCAB = 64, 4, 2, 16, 96, 500
PAIR = [20, 30, 14]


def folder(path: Path, kind: str, layers: int, **more: Any) -> Path:
    AutoConfig.for_model(
        kind,
        **{"hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": HEAD},
        **{"intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": layers, **more},
    ).save_pretrained(path / f"{kind}-{layers}")
    return path / f"{kind}-{layers}"


def a_run(path: Path, **sections: Any) -> Config:
    return parse_config(
        {
            "name": "run",
            "storage_path": "runs",
            "model": {"path": str(path), **sections.pop("model", {})},
            "data": {"train": ["pairs.jsonl"]},
            "scaling": {"gpus_per_worker": sections.pop("gpus", 1)},
            "reference": {"gpus_per_replica": 0},
            **sections,
        }
    )


def kept_of_a_block(path: Path, **sections: Any) -> float:
    """Bytes for each token: what a third block adds."""
    two, three = (policy_footprint(a_run(folder(path, "llama", n), **sections), PAIR) for n in (2, 3))
    assert two.kept.fixed == pytest.approx(0, abs=1)
    return three.kept.per_token - two.kept.per_token


def test_what_a_block_of_llama_keeps(tmp_path: Path) -> None:
    """In bfloat16 each norm keeps its input in float32, one number for its root, what is scaled, and its result, which
    the products after it keep: 8 D + 4 twice. Attention: query and result, key and value, and its normalizers. The
    feed-forward part: gate, its activation, the other factor and the product. In float32 the input is no copy but the
    sum that the block before has left, and each norm keeps 12 D + 4."""
    q, k = HEADS * HEAD, KEY_HEADS * HEAD
    found = kept_of_a_block(tmp_path)
    assert found == pytest.approx(2 * (8 * D + 4) + 2 * (2 * q + 2 * k) + 4 * HEADS + 2 * 4 * INNER, abs=0.1)
    found = kept_of_a_block(tmp_path, model={"compute_dtype": "float32"})
    assert found == pytest.approx(2 * (12 * D + 4) + 4 * (2 * q + 2 * k) + 4 * HEADS + 4 * 4 * INNER, abs=0.1)


def test_what_checkpoints_keep(tmp_path: Path) -> None:
    """A block's input, or, where that waits on the host, nothing."""
    assert kept_of_a_block(tmp_path, model={"gradient_checkpointing": True}) == pytest.approx(2 * D, abs=0.1)
    assert kept_of_a_block(tmp_path, model={"gradient_checkpointing": "offload"}) == pytest.approx(0, abs=0.1)


def test_frozen_weights_keep_no_input(tmp_path: Path) -> None:
    """Beside an adapter the norms' results are kept by the adapter's matrices alone; nothing needs what was scaled."""
    adapted = kept_of_a_block(tmp_path, adapter={"rank": 4, "target_modules": ["q_proj"]})
    assert adapted < kept_of_a_block(tmp_path) - 2 * 2 * D


@pytest.fixture
def llama(tmp_path: Path) -> Footprint:
    return policy_footprint(a_run(folder(tmp_path, "llama", 2, tie_word_embeddings=False)), PAIR)


def test_weights_by_what_is_gathered_together(llama: Footprint) -> None:
    q, k = HEADS * HEAD, KEY_HEADS * HEAD
    assert [sum(weight.numel for weight in block) for block in llama.blocks] == [
        2 * D * q + 2 * D * k + 3 * D * INNER + 2 * D
    ] * 2
    assert sorted(weight.numel for weight in llama.rest) == [D, VOCAB * D, VOCAB * D]
    assert llama.head_weight == VOCAB * D


def test_linear_layers_below_an_adapter_in_4_bits(tmp_path: Path) -> None:
    adapter = {"rank": 4, "target_modules": ["q_proj"], "quantize": "nf4"}
    run = a_run(folder(tmp_path, "llama", 2), adapter=adapter, reference={"place": "adapter_off"})
    found = policy_footprint(run, PAIR)
    q, k = HEADS * HEAD, KEY_HEADS * HEAD
    for block in found.blocks:
        assert sum(weight.numel for weight in block if weight.quantized) == 2 * D * q + 2 * D * k + 3 * D * INNER
        assert sum(weight.numel for weight in block if weight.trained) == 4 * (D + q)
    assert not any(weight.quantized for weight in found.rest)


def test_the_output_layer(llama: Footprint) -> None:
    """512 tokens: logits and their gradient in bfloat16, besides a softmax in float32, its exponentials, and what is
    less than a tenth of these; a gradient of the weight."""
    logits = 512 * VOCAB
    assert llama.head(512) == pytest.approx((2 + 2 + 4 + 4) * logits, rel=0.2)
    assert llama.head(100) == llama.head(512)


def test_a_reference_keeps_nothing(tmp_path: Path) -> None:
    """Hidden states of the completion tokens, and places, alone."""
    run = a_run(folder(tmp_path, "llama", 2), reference={"gpus_per_replica": 1})
    found = reference_footprint(run, PAIR)
    assert not any(weight.trained for weight in found.weights)
    assert found.kept.per_token < 2 * D + 8 * 6
    assert found.working.per_token < kept_of_a_block(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("gpus", [0, 1])
def test_other_families(kind: str, gpus: int, tmp_path: Path) -> None:
    model = folder(tmp_path, kind, 2)
    found = policy_footprint(a_run(model, gpus=gpus), PAIR)
    assert len(found.blocks) == 2
    assert 2 * 14 * D < found.kept.per_token / 2 < 2 * 80 * D
    assert found.head(64) > 0


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.json there"):
        policy_footprint(a_run(tmp_path), PAIR)
