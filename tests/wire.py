"""What crosses a network in the clear: run in the bridge's namespace, it keeps what is sent over TCP.

    python tests/wire.py FILE

writes, when it is asked to end, the bytes of each direction of each connection to the file, as a pickle.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple

ALL_PROTOCOLS, IP, TCP = 3, 0x0800, 6
OUTGOING = 4
LARGEST = 1 << 18
SO_RCVBUFFORCE = 33


class Flow(NamedTuple):
    """One direction of a connection."""

    source: str
    source_port: int
    target: str
    target_port: int


def parsed(frame: bytes) -> tuple[Flow, bytes] | None:
    """A frame's flow and payload; None where it is not of TCP."""
    if len(frame) < 34 or struct.unpack_from("!H", frame, 12)[0] != IP or frame[23] != TCP:
        return None
    packet = frame[14 : 14 + struct.unpack_from("!H", frame, 16)[0]]
    segment = packet[(packet[0] & 15) * 4 :]
    source_port, target_port = struct.unpack_from("!HH", segment)
    flow = Flow(socket.inet_ntoa(packet[12:16]), source_port, socket.inet_ntoa(packet[16:20]), target_port)
    return flow, segment[(segment[12] >> 4) * 4 :]


def main(place: str) -> None:
    found = dict[Flow, bytearray]()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ALL_PROTOCOLS)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        Path(place).touch()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                frame, address = wire.recvfrom(LARGEST)
                # A frame is seen where it comes in, and again where it goes out.
                if address[2] != OUTGOING and (seen := parsed(frame)):
                    found.setdefault(seen[0], bytearray()).extend(seen[1])
    Path(place).write_bytes(pickle.dumps({tuple(flow): bytes(content) for flow, content in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
