"""Claims: of the runs that fill one reference store at the same time, each chunk is scored by one.

A filler that wants a chunk creates `<store>/claims/<chunk>` with its name in it. While it lives it counts in
`<store>/fillers/<name>`; when its count stands still it is dead, and the right to replace it is itself a claim,
`<chunk>~<dead filler>`, so that of many that see the death one succeeds. Nothing here needs a clock that others share.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time

from dpo_ray import storage
from dpo_ray.errors import StorageError

BEAT_S = 5.0
LOOK_S = 1.0
# Twenty seconds without a beat; looks are counted, not seconds: while this process stands still it learns nothing.
LOOKS = 20
SEPARATOR = "~"


def living_fillers(store_uri: str) -> list[str]:
    """The fillers that count, watched for two beats where there are any."""
    before = _beats(store_uri)
    if not before:
        return []
    time.sleep(2 * BEAT_S + LOOK_S)
    return [filler for filler, beat in _beats(store_uri).items() if beat != before.get(filler)]


def _beats(store_uri: str) -> dict[str, str]:
    found, folder = {}, storage.join(store_uri, "fillers")
    for filler in storage.list_names(folder):
        with contextlib.suppress(FileNotFoundError):
            found[filler] = storage.read_bytes(storage.join(folder, filler)).decode()
    return found


class Claims:
    """One filler's claims on the chunks of a store."""

    def __init__(self, store_uri: str, family: str, generation: int = 0) -> None:
        """Shows from now on that the filler lives.

        Args:
            store_uri: The reference store.
            family: What only one filler at a time can be of, such as a run with its lease.
            generation: Higher than that of all fillers of the family before this one, which are dead.
        """
        self.filler = f"{family}.{generation:08d}"
        self._store_uri, self._family = store_uri, family
        self._held: dict[str, list[str]] = {}
        self._seen: dict[str, tuple[str | None, int, float]] = {}
        for filler in storage.list_names(storage.join(store_uri, "fillers")):
            if self._is_predecessor(filler):
                storage.remove_file(self._heartbeat(filler))
        storage.write_bytes(self._heartbeat(self.filler), b"0")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="reference-claims", daemon=True)
        self._thread.start()

    def take(self, key: str) -> bool:
        """Whether the chunk is ours to score; if not, somebody who lives has it.

        It may have been scored, and given back, since the caller looked.
        """
        if key in self._held:
            return True
        chain = [key]
        while True:
            content = json.dumps({"filler": self.filler}).encode()
            if storage.create(self._place(chain[-1]), content):
                self._held[key] = chain
                return True
            try:
                owner = str(storage.read_json(self._place(chain[-1]))["filler"])
            except FileNotFoundError:
                return False  # Given back just now: the next look will tell.
            if not self._dead(owner):
                return False
            chain.append(key + SEPARATOR + owner)

    def release(self, key: str) -> None:
        """Gives a chunk back, scored or not; nothing happens when it is not ours."""
        # The first claim goes last: who finds it gone finds none that it led to.
        for name in reversed(self._held.get(key, [])):
            storage.remove_file(self._place(name))
        self._held.pop(key, None)

    def close(self) -> None:
        """Gives all chunks back, and is dead from now on."""
        self._closed.set()
        self._thread.join()
        for key in list(self._held):
            self.release(key)
        storage.remove_file(self._heartbeat(self.filler))

    def _beat(self) -> None:
        count = 0
        while not self._closed.wait(BEAT_S):
            count += 1
            # In an outage nobody else can take anything either.
            with contextlib.suppress(StorageError):
                storage.write_bytes(self._heartbeat(self.filler), str(count).encode())

    def _dead(self, filler: str) -> bool:
        if self._is_predecessor(filler):
            return True
        before, looks, at = self._seen.get(filler, (None, 0, -LOOK_S))
        now = time.monotonic()
        if now - at < LOOK_S:
            return looks >= LOOKS
        beat = None
        with contextlib.suppress(FileNotFoundError):
            beat = storage.read_bytes(self._heartbeat(filler)).decode()
        if beat is None:
            return True
        looks = looks + 1 if beat == before else 0
        self._seen[filler] = beat, looks, now
        return looks >= LOOKS

    def _is_predecessor(self, filler: str) -> bool:
        family, _, generation = filler.rpartition(".")
        return family == self._family and generation < self.filler.rpartition(".")[2]

    def _place(self, name: str) -> str:
        return storage.join(self._store_uri, "claims", name)

    def _heartbeat(self, filler: str) -> str:
        return storage.join(self._store_uri, "fillers", filler)
