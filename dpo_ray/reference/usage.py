"""Who uses which scores, so that those of nobody can be removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dpo_ray import storage
from dpo_ray.pairs.store import open_store
from dpo_ray.reference.claims import living_fillers
from dpo_ray.reference.store import ReferenceStore


@dataclass(frozen=True, slots=True)
class Unused:
    """What nothing uses in a reference store.

    Attributes:
        store_uri: The store.
        keys: Chunks whose scores can go.
        kept: Chunks whose scores stay.
        whole: Whether nothing uses the store at all.
    """

    store_uri: str
    keys: tuple[str, ...]
    kept: int
    whole: bool


def note_use(store: ReferenceStore, run_uri: str, pairs_uri: str) -> None:
    """Writes down that a run reads scores of a store for a pair store."""
    use = {"run_uri": run_uri, "pairs_uri": pairs_uri}
    storage.write_json(storage.join(store.uri, "uses", f"{storage.fingerprint(use)}.json"), use)


def unused(store_uri: str, alive: Callable[[str], bool]) -> Unused:
    """What can be removed from a store.

    Args:
        store_uri: The store.
        alive: Whether a run, given by its folder, may still read scores.
    """
    store = ReferenceStore(store_uri)
    scored, needed = store.scored(), set[str]()
    folder = storage.join(store_uri, "uses")
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    uses = [storage.read_json(storage.join(folder, name)) for name in names]
    living = [use for use in uses if alive(use["run_uri"])]
    for pairs_uri in {use["pairs_uri"] for use in living}:
        pairs = open_store(pairs_uri)
        if pairs is not None:
            needed |= {chunk.key for chunk in (*pairs.train, *pairs.eval)}
    busy = living_fillers(store_uri)
    # Of a store without a note nobody knows whose it is.
    keys = () if busy or not uses else tuple(sorted(scored - needed))
    return Unused(store_uri, keys, len(scored) - len(keys), bool(uses) and not living and not busy)


def remove_unused(found: Unused) -> None:
    """Removes it."""
    if found.whole:
        storage.remove(found.store_uri)
        return
    store = ReferenceStore(found.store_uri)
    for key in found.keys:
        storage.remove(store.place(key))
