"""Weights read by rows from the files that hold them."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpo_ray import storage
from dpo_ray.errors import ConfigError
from dpo_ray.model import weights
from dpo_ray.model.weights import as_named, fill, stored_tensors, weights_digest

TENSORS = {
    "matrix": torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5),
    "cube": torch.arange(4 * 3 * 2).reshape(4, 3, 2).to(torch.bfloat16),
    "one": torch.tensor(3.0, dtype=torch.float64),
    "none": torch.empty(0, 3),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"matrix": TENSORS["matrix"]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({name: TENSORS[name] for name in ("cube", "one", "none")}, folder / "model-00002-of-00002.safetensors")
    return folder


def test_rows_and_no_byte_more(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2 to 5 of 7, in pieces of at most two rows of 20 bytes; the other file's header alone."""
    monkeypatch.setattr(weights, "READ_BYTES", 45)
    stored = {tensor.name: tensor for tensor in stored_tensors(str(model))}
    read, plain = list[int](), storage.read_bytes

    def counted(uri: str, *about: Any) -> bytes:
        data = plain(uri, *about)
        read.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    target = torch.zeros(3, 5, dtype=torch.bfloat16)
    fill([(stored["matrix"], target, 2)])
    assert target.equal(TENSORS["matrix"][2:5].to(torch.bfloat16))
    assert sorted(read) == [20, 40]


def test_whole_tensors(model: Path) -> None:
    found = {tensor.name: tensor.read() for tensor in stored_tensors(str(model))}
    assert found.keys() == TENSORS.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    into = {name: torch.full_like(tensor, 9) for name, tensor in TENSORS.items()}
    fill((stored, into[stored.name], 0) for stored in stored_tensors(str(model)))
    assert all(into[name].equal(tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], r"it has [\d,]+ bytes of [\d,]+"),
        (lambda data: data[:30], "says that its header alone has"),
        (lambda data: b"", "says that its header alone has"),
        (lambda data: data[:8] + b"x" + data[9:], "its header cannot be read"),
        (lambda data: data.replace(b'"shape":[7,5]', b'"shape":[7,4]'), "matrix"),
    ],
)
def test_a_damaged_file(model: Path, damage: Any, said: str) -> None:
    file = model / "model-00001-of-00002.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=said) as refused:
        [tensor.read() for tensor in stored_tensors(str(model))]
    assert str(file) in str(refused.value)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.safetensors file there"):
        stored_tensors(str(tmp_path))


def test_names_and_shapes(model: Path) -> None:
    stored = stored_tensors(str(model))
    found = as_named("m", stored, {"matrix": (7, 5)}, {})
    assert found is not None
    assert found["matrix"].read().equal(TENSORS["matrix"])
    assert as_named("m", stored, {"matrix": (5, 7)}, {}) is None
    assert as_named("m", stored, {"Matrix": (7, 5)}, {}) is None
    assert as_named("m", [*stored, stored[0]], {"matrix": (7, 5)}, {}) is None
    assert as_named("m", stored, {"matrix": (7, 5)}, {"head": "matrix"}) is not None
    with pytest.raises(ConfigError, match="ties cube to matrix, but the files hold different values"):
        as_named("m", stored, {"matrix": (7, 5)}, {"cube": "matrix"})


def test_the_digest_is_that_of_the_files(model: Path, tmp_path: Path) -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [f"{name}:{hashlib.sha256((model / name).read_bytes()).hexdigest()}" for name in names]
    expected = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    assert weights_digest(str(model), str(tmp_path / "cache")) == expected
    (model / names[1]).write_bytes((model / names[2]).read_bytes())
    assert weights_digest(str(model), str(tmp_path / "cache")) != expected
