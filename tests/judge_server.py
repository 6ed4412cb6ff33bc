"""A server that speaks OpenAI's chat completions and judges by counting the word "good"; faults when told to.

    python tests/judge_server.py PORT_FILE

writes its port to the file. `POST /faults` with `[{"kind": "status", "status": 503, "times": 2}, ...]` replaces what
happens to the next requests: `status`, `drop` (the connection is closed), `hang` (nothing for `seconds`), `nonsense`
(no JSON), `mute` (a reply without a verdict). `GET /seen` lists the requests: their path, key and body.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

faults: list[dict[str, Any]] = []
seen: list[dict[str, Any]] = []
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(200, json.dumps(seen))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/faults":
            faults[:] = body
            seen.clear()
            self._send(200, "[]")
            return
        with lock:
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
            fault = next((each for each in faults if each["times"]), None)
            if fault is not None:
                fault["times"] -= 1
        kind = fault["kind"] if fault else ""
        if kind == "status":
            self._send(fault["status"], f"no: {self.headers.get('Authorization')}", fault.get("after"))
        elif kind == "drop":
            self.connection.close()
        elif kind == "nonsense":
            self._send(200, "<html>oops</html>")
        else:
            if kind == "hang":
                time.sleep(fault["seconds"])
            said = "I like both." if kind == "mute" else f"[[A]] or [[B]]? My verdict:\n[[{verdict(body)}]]"
            reply = {"choices": [{"message": {"role": "assistant", "content": said}}], "usage": {"total_tokens": 10}}
            self._send(200, json.dumps(reply))

    def _send(self, status: int, text: str, after_s: int | None = None) -> None:
        data = text.encode()
        try:
            self.send_response(status)
            if after_s is not None:
                self.send_header("Retry-After", str(after_s))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # Who asked has gone.

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def verdict(body: dict[str, Any]) -> str:
    shown = body["messages"][-1]["content"]
    if "biased" in shown:
        return "A"
    prompt, _, rest = shown.partition("[Answer A]")
    first, second = (text.count("good") for text in rest.split("[Answer B]"))
    return "C" if first == second else "A" if first > second else "B"


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    written = Path(sys.argv[1] + ".part")
    written.write_text(str(server.server_port))
    written.rename(sys.argv[1])
    server.serve_forever()
