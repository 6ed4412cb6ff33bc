"""Knocks at a port of a Ray cluster as a stranger would: not by Ray's clients, which might refuse by themselves."""

from __future__ import annotations

import http.client
from typing import Literal

import grpc

# `metrics` are read by anybody, token or not; `other` speaks neither HTTP nor gRPC.
Answer = Literal["lets in", "refuses", "metrics", "other", "gone"]
ANSWER_S = 5.0
# A harmless call of each of Ray's services: without arguments, or for an object that nobody has.
CALLS = {
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo": b"",
    "/ray.rpc.NodeManagerService/GetSystemConfig": b"",
    "/ray.rpc.ObjectManagerService/Pull": b"\x0a\x1c" + bytes(28) + b"\x12\x1c" + bytes(28),
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats": b"",
    "/ray.rpc.ReporterService/ReportOCMetrics": b"",
    "/ray.rpc.RayletDriver/ClusterInfo": b"",
}

_NO_ANSWER = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


def knock(address: str, port: int, token: str | None) -> Answer:
    """How a port answers to somebody with this token, or with none."""
    try:
        return _http(address, port, token) or _grpc(address, port, token)
    except ConnectionRefusedError:
        return "gone"


def _http(address: str, port: int, token: str | None) -> Answer | None:
    """The answer of a server of HTTP; None of another one."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    found = []
    for path in ("/metrics", "/api/knock"):
        connection = http.client.HTTPConnection(address, port, timeout=ANSWER_S)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            found.append((answer.status, answer.read()))
        except (http.client.HTTPException, TimeoutError, ConnectionResetError, BrokenPipeError):
            return None
        finally:
            connection.close()
    (metrics, text), (status, _) = found
    if metrics == 200 and b"# HELP" in text:
        return "metrics"
    return "refuses" if status in (401, 403) else "lets in"


def _grpc(address: str, port: int, token: str | None) -> Answer:
    codes = set()
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        for method, request in CALLS.items():
            try:
                channel.unary_unary(method)(request, timeout=ANSWER_S, metadata=metadata)
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.add(error.code())
                if error.code() in _NO_ANSWER:
                    break
    if grpc.StatusCode.UNAUTHENTICATED in codes:
        # One service of a port may ask, and another not.
        return "lets in" if grpc.StatusCode.OK in codes else "refuses"
    return "lets in" if codes - _NO_ANSWER else "other"
