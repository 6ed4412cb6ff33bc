"""The parts of checkpoints that need no ranks."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpo_ray.config import parse_config
from dpo_ray.errors import CheckpointError, ConfigError
from dpo_ray.training.checkpoint_files import write_safetensors
from dpo_ray.training.checkpoint_tensors import tensors_of


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    """Odd sizes of all dtypes, more than one piece, an empty tensor and a scalar."""
    torch.manual_seed(0)
    tensors = {
        "large": torch.randn(700, 1001),
        "half": torch.randn(3, 5).bfloat16(),
        "count": torch.tensor(7, dtype=torch.int32),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(3, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).t(),
    }
    path = tmp_path / "new" / "x.safetensors"
    record = write_safetensors(str(path), tensors)
    assert record.size == path.stat().st_size
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_state_that_is_no_tensor_is_refused() -> None:
    """A checkpoint would lose it."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names = {"weight", "bias"}
    expected = {f"model.{name}" for name in names}
    expected |= {f"optimizer.{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(tensors_of(model, optimizer)) == expected
    optimizer.state[model.bias]["history"] = [1, 2]
    with pytest.raises(CheckpointError, match="optimizer.bias.history"):
        tensors_of(model, optimizer)
    del optimizer.state[model.bias]["history"]
    optimizer.param_groups[0]["warm"] = 3
    with pytest.raises(CheckpointError, match="optimizer.group-0.warm is no tensor but 3"):
        tensors_of(model, optimizer)


def test_tied_weights_are_saved_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert set(tensors_of(model, torch.optim.SGD(model.parameters()))) == {"model.embed.weight"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"keep_best": "eval_loss"}}, "set train.eval_every_steps"),
        ({"train": {"keep_best": "eval_acc", "eval_every_steps": 5}}, "train.keep_best is 'eval_acc'"),
        (
            {
                "train": {"keep_best": "eval_rewards/margins", "eval_every_steps": 5},
                "objective": {"loss": "sft"},
            },
            "use keep_best: eval_loss",
        ),
    ],
)
def test_what_is_best_must_be_measured(sections: dict[str, dict[str, object]], message: str) -> None:
    raw = {"name": "x", "storage_path": "/x", "model": {"path": "/m"}, "data": {"train": ["/p"], "eval_fraction": 0.1}}
    with pytest.raises(ConfigError, match=message):
        parse_config({**raw, **sections})
