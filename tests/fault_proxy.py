"""A proxy before an HTTP server that does to its clients what networks and overloaded servers do, when told to.

It passes bytes on unchanged, so that signatures over the `Host` header that the client sent stay valid.

    with FaultProxy("127.0.0.1:8333") as proxy:  # or FaultProxy(target, port=9000)
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        proxy.inject("status", 503, where="^PUT ", probability=0.5)
        ...
        proxy.clear()

On its own, as `python tests/fault_proxy.py 127.0.0.1:8333 9000`, it passes everything on until it is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["status", "reset", "hang", "late", "slow", "cut_answer", "cut_request", "lose_answer"]
_PIECE_BYTES = 1 << 16
_HEAD_BYTES = 1 << 20
_Write = Callable[[bytes], Awaitable[None]]


@dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        kind: `status`: answered with a status, and not passed on. `reset`: the connection is reset, nothing is passed
            on. `hang`: the request is taken and never answered. `late`: passed on after a while. `slow`: both bodies
            pass at a speed. `cut_answer`, `cut_request`: the connection is reset after so many bytes of the body;
            shorter ones pass. `lose_answer`: passed on, and reset instead of answered.
        value: The status, seconds, bytes per second, or bytes.
        where: A regular expression that is searched in "METHOD /path?query".
        probability: Of each request that fits.
        times: How many requests it happens to; None for all.
        count: How many it has happened to.
    """

    kind: Kind
    value: float = 0
    where: str = ""
    probability: float = 1.0
    times: int | None = None
    count: int = 0


class _CutError(Exception):
    """The connection is to be reset."""


class FaultProxy:
    """Runs in a thread of its own while a `with` block runs.

    Attributes:
        host: Where it listens.
        port: Its port.
        requests: What came, as "METHOD /path?query".
        injected: How often each kind of fault happened; refused connections do not show.
    """

    def __init__(self, target: str, port: int = 0, host: str = "127.0.0.1", seed: int = 0) -> None:
        """Args: target: `host:port` of the server, or its http:// address; port: where to listen, 0 for any."""
        address = target.removeprefix("http://").rstrip("/").rpartition(":")
        self.target = (address[0], int(address[2]))
        self.host, self.port = host, port
        self.requests: list[str] = []
        self.injected: Counter[str] = Counter()
        self._faults: list[Fault] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._held: socket.socket | None = None
        self._clients: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *details: object) -> None:
        self.refuse()
        if self._held is not None:
            self._held.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def inject(
        self, kind: Kind, value: float = 0, where: str = "", probability: float = 1.0, times: int | None = None
    ) -> Fault:
        """From now on, requests suffer this; of faults that fit the same request, the first one that strikes counts."""
        fault = Fault(kind, value, where, probability, times)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Ends all faults, also a refusal. What hangs keeps hanging, as in a network that lost the connection."""
        with self._lock:
            self._faults.clear()
        self.listen()

    def refuse(self) -> None:
        """Closes the port and resets all connections, until `listen` or `clear`."""
        asyncio.run_coroutine_threadsafe(self._refuse(), self._loop).result()

    def listen(self) -> None:
        """Takes connections again, on the same port."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def _listen(self) -> None:
        if self._server is None:
            if self._held is not None:
                self._held.close()
            self._server = await asyncio.start_server(
                self._serve, self.host, self.port, limit=_HEAD_BYTES, reuse_address=True
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            # Bound, and not listening: nobody else takes the port meanwhile, and answers in our place.
            self._held = socket.socket()
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held.bind((self.host, self.port))
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    def _fault_of(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                fits = re.search(fault.where, request) and (fault.times is None or fault.count < fault.times)
                if fits and self._random.random() < fault.probability:
                    fault.count += 1
                    self.injected[fault.kind] += 1
                    return fault
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        server: list[asyncio.StreamWriter] = []
        try:
            await self._exchange_all(reader, writer, server)
            writer.close()
        except (_CutError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            _reset(writer)
        finally:
            for each in server:
                each.transport.abort()
            self._clients.discard(task)

    async def _exchange_all(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: list[asyncio.StreamWriter]
    ) -> None:
        """Serves one request after the other on a connection; `server` receives the connection to the server."""
        answers: asyncio.StreamReader | None = None
        while head := await _read_head(reader):
            method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
            fault = self._fault_of(f"{method} {path}")
            kind, value = (fault.kind, fault.value) if fault else ("", 0.0)
            if kind == "reset":
                raise _CutError
            if kind == "hang":
                await asyncio.Event().wait()
            if kind == "status":
                await _answer(reader, writer, head, int(value))
                continue
            if kind == "late":
                await asyncio.sleep(value)
            if answers is None or answers.at_eof():
                answers, requests = await asyncio.open_connection(*self.target, limit=_HEAD_BYTES)
                server.append(requests)
            requests = server[-1]
            requests.write(head)
            send = _limited(requests, kind, value, "cut_request")
            body = asyncio.create_task(_pass_body(reader, head, send))
            try:
                open_still = await _pass_answer(answers, writer, method, kind, value, body)
            finally:
                body.cancel()
                await asyncio.gather(body, return_exceptions=True)
            if not open_still:
                return


async def _pass_answer(
    answers: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    kind: str,
    value: float,
    body: asyncio.Task[None],
) -> bool:
    """Passes on the answer to one request whose body is on its way. Returns whether the connection can go on."""
    while True:
        reading = asyncio.create_task(_read_head(answers))
        waited: set[asyncio.Task[Any]] = {reading, body}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if body.done():
                body.result()
            head = await reading
        finally:
            reading.cancel()
        if not head:
            raise _CutError
        status = int(head.split(b" ", 2)[1])
        if status >= 200:
            break
        writer.write(head)
    if kind == "lose_answer":
        await body
        raise _CutError
    writer.write(head)
    empty = method == "HEAD" or status in (204, 304)
    if not empty:
        await _pass_body(answers, head, _limited(writer, kind, value, "cut_answer"), until_end=True)
    await writer.drain()
    ends = b"close" in _header(head, b"connection").lower() or not (empty or _framed(head))
    # A server may answer before it has the whole request; then neither side can know where the next one begins.
    return body.done() and not ends


def _limited(writer: asyncio.StreamWriter, kind: str, value: float, cut: str) -> _Write:
    """Writes the pieces of a body, under a fault."""
    left = value

    async def write(data: bytes) -> None:
        nonlocal left
        if kind == cut:
            writer.write(data[: int(left)])
            left -= len(data)
            await writer.drain()
            if left < 0:
                await asyncio.sleep(0.05)  # What was written so far is to arrive.
                raise _CutError
        elif kind == "slow":
            step = max(1, int(value / 10))
            for start in range(0, len(data), step):
                writer.write(data[start : start + step])
                await writer.drain()
                await asyncio.sleep(len(data[start : start + step]) / value)
        else:
            writer.write(data)
            await writer.drain()

    return write


async def _pass_body(reader: asyncio.StreamReader, head: bytes, write: _Write, until_end: bool = False) -> None:
    """Passes a body on as it is framed: by its length, in chunks, or, of an answer, by the end of the connection."""
    if b"chunked" in _header(head, b"transfer-encoding").lower():
        while True:
            line = await reader.readuntil(b"\r\n")
            num_bytes = int(line.split(b";")[0], 16)
            await write(line)
            if num_bytes:
                await _pass_bytes(reader, num_bytes + 2, write)
                continue
            while True:  # Trailers, up to an empty line.
                line = await reader.readuntil(b"\r\n")
                await write(line)
                if line == b"\r\n":
                    return
    elif length := _header(head, b"content-length"):
        await _pass_bytes(reader, int(length), write)
    elif until_end:
        while data := await reader.read(_PIECE_BYTES):
            await write(data)


async def _pass_bytes(reader: asyncio.StreamReader, num_bytes: int, write: _Write) -> None:
    while num_bytes:
        data = await reader.read(min(num_bytes, _PIECE_BYTES))
        if not data:
            raise _CutError
        num_bytes -= len(data)
        await write(data)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, status: int) -> None:
    """Takes a request and answers it with a status, as S3 does."""
    if _header(head, b"expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def drop(data: bytes) -> None:
        pass

    await _pass_body(reader, head, drop)
    codes = {429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}
    code = codes.get(status, "Injected")
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    lines = [f"HTTP/1.1 {status} {code}", "Content-Type: application/xml", f"Content-Length: {len(text)}", "", ""]
    writer.write("\r\n".join(lines).encode() + (b"" if head.startswith(b"HEAD ") else text))
    await writer.drain()


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """First line and headers; empty at the end of the connection."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""


def _header(head: bytes, name: bytes) -> bytes:
    found = re.search(rb"\r\n" + name + rb":[ \t]*([^\r\n]*)", head, re.IGNORECASE)
    return found[1].strip() if found else b""


def _framed(head: bytes) -> bool:
    return bool(_header(head, b"content-length") or _header(head, b"transfer-encoding"))


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes a connection so that the other side sees a reset."""
    with contextlib.suppress(OSError, AttributeError):
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


def main() -> None:
    """Passes everything on: `fault_proxy.py TARGET PORT`."""
    with FaultProxy(sys.argv[1], port=int(sys.argv[2])) as proxy, contextlib.suppress(KeyboardInterrupt):
        print(f"{proxy.endpoint} -> {sys.argv[1]}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
