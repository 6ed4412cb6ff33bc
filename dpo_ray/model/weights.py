"""A model's weights where they lie: which tensors there are, and any rows of one, without the rest of its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes

from dpo_ray import storage
from dpo_ray.errors import ConfigError, first_line
from dpo_ray.model.files import weight_files

# Requests at the same time, and the most bytes of one.
READERS = 8
READ_BYTES = 16 << 20
# A file begins with the length of its header, in so many bytes.
LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: Its name there.
        uri: The file.
        dtype: As the file has it, such as "BF16".
        shape: Of all of it.
        start: Where its first byte is.
        stop: And behind its last one.
    """

    name: str
    uri: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Its rows from `first` up to `last`; all of it if left out.

        Raises:
            ConfigError: The file is damaged.
            StorageError: It cannot be read.
        """
        row = (self.stop - self.start) // max(1, self.shape[0]) if self.shape else self.stop - self.start
        last = (self.shape[0] if self.shape else 1) if last is None else last
        data = storage.read_bytes(self.uri, self.start + first * row, self.start + last * row)
        storage.part_went()
        shape = [last - first, *self.shape[1:]] if self.shape else []
        about = {self.name: {"dtype": self.dtype, "shape": shape, "data_offsets": [0, (last - first) * row]}}
        header = json.dumps(about).encode()
        try:
            return load_bytes(len(header).to_bytes(LENGTH_BYTES, "little") + header + data)[self.name]
        except SafetensorError as error:
            raise _damaged(self.uri, f"{self.name}: {first_line(error)}") from None


def stored_tensors(uri: str) -> list[StoredTensor]:
    """All tensors of a model's files; a name may come twice.

    Args:
        uri: transformers directory.

    Raises:
        ConfigError: A file is damaged.
        StorageError: One cannot be read.
    """
    return [tensor for name in weight_files(uri) for tensor in _tensors(storage.join(uri, name))]


def _tensors(uri: str) -> list[StoredTensor]:
    size = storage.size(uri)
    length = int.from_bytes(storage.read_bytes(uri, 0, min(LENGTH_BYTES, size)), "little")
    begin = LENGTH_BYTES + length
    if size < begin:
        raise _damaged(uri, f"it has {size:,} bytes, and says that its header alone has {length:,}")
    try:
        header = json.loads(storage.read_bytes(uri, LENGTH_BYTES, begin))
        found = [
            StoredTensor(
                name, uri, about["dtype"], tuple(about["shape"]), *(begin + at for at in about["data_offsets"])
            )
            for name, about in header.items()
            if name != "__metadata__"
            for start, stop in [about["data_offsets"]]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(uri, "its header cannot be read") from None
    if size < (stop := max((tensor.stop for tensor in found), default=begin)):
        raise _damaged(uri, f"it has {size:,} bytes of {stop:,}")
    return found


def _damaged(uri: str, why: str) -> ConfigError:
    return ConfigError(f"{uri} is damaged: {why}; put it there again")


def as_named(
    uri: str, stored: Iterable[StoredTensor], shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]
) -> dict[str, StoredTensor] | None:
    """What a model's files hold under these names; None where names or shapes differ, or one comes twice.

    Args:
        uri: transformers directory.
        stored: What `stored_tensors` finds there.
        shapes: By name.
        aliases: Further names of them, where weights are tied, each with the name in `shapes`.

    Raises:
        ConfigError: A file holds something else under a further name.
    """
    tensors = list(stored)
    by_name = {tensor.name: tensor for tensor in tensors}
    for alias, name in aliases.items():
        if alias in by_name and name in by_name and not by_name[alias].read().equal(by_name[name].read()):
            raise ConfigError(
                f"{uri}: config.json ties {alias} to {name}, but the files hold different values for them; set "
                "tie_word_embeddings: false in it"
            )
    if len(by_name) < len(tensors):
        return None
    found = {name: by_name[name] for name, shape in shapes.items() if name in by_name and by_name[name].shape == shape}
    return found if len(found) == len(shapes) else None


def fill(wanted: Iterable[tuple[StoredTensor, torch.Tensor, int]]) -> None:
    """Copies rows of stored tensors into tensors, several at a time, in pieces of at most about `READ_BYTES`.

    Args:
        wanted: What is stored, where rows of it go, and the first of these rows.

    Raises:
        ConfigError: A file is damaged.
        StorageError: One cannot be read.
    """

    def piece(stored: StoredTensor, target: torch.Tensor, row: int) -> None:
        target.copy_(stored.read(row, row + target.shape[0]) if stored.shape else stored.read())

    def pieces() -> Iterator[tuple[StoredTensor, torch.Tensor, int]]:
        for stored, target, first in wanted:
            if not stored.shape:
                yield stored, target, first
                continue
            row_bytes = max(1, (stored.stop - stored.start) // max(1, stored.shape[0]))
            step = max(1, READ_BYTES // row_bytes)
            for begin in range(0, target.shape[0], step):
                yield stored, target[begin : begin + step], first + begin

    with ThreadPoolExecutor(READERS) as pool:
        for done in [pool.submit(piece, *each) for each in pieces()]:
            done.result()


def weights_digest(uri: str, cache_uri: str) -> str:
    """Digest of a model's content: its configuration and weights, wherever they lie; read, not copied.

    Args:
        uri: transformers directory.
        cache_uri: Folder that remembers digests by what changes when the files do.

    Raises:
        ConfigError: There are no weights.
        StorageError: A file cannot be read.
    """
    files = sorted(["config.json", *weight_files(uri)])
    identities = [(name, storage.identity(storage.join(uri, name))) for name in files]
    known = storage.join(cache_uri, storage.fingerprint([uri, identities]))
    if storage.exists(known):
        return str(storage.read_json(known)["digest"])
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda name: f"{name}:{_sha256(storage.join(uri, name))}", files)
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    storage.write_json(known, {"uri": uri, "digest": digest})
    return digest


def _sha256(uri: str) -> str:
    digest, size = hashlib.sha256(), storage.size(uri)
    for start in range(0, size, READ_BYTES):
        digest.update(storage.read_bytes(uri, start, min(size, start + READ_BYTES)))
        storage.part_went()
    return digest.hexdigest()
