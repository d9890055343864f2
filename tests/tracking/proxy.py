"""A TCP relay in front of a server, which a test makes slow, deaf, unreachable or particular about credentials."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Literal

Mode = Literal["open", "down", "deaf", "locked"]


class Proxy:
    """Relays HTTP to 127.0.0.1:`port`; each request has a connection of its own.

    open: as it comes. down: connections are closed at once. deaf: requests arrive, answers are lost.
    locked: who brings no credentials gets a 401. delay: seconds before an answer goes back.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.mode: Mode = "open"
        self.delay = 0.0
        self.lost = 0
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def address(self) -> str:
        """Without the scheme: user and password may come before it."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.mode == "down":
                return
            request = _read(client)
            if self.mode == "locked" and b"authorization:" not in request.lower():
                client.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
            time.sleep(self.delay)
            if self.mode == "deaf":
                self.lost += 1
            else:
                client.sendall(answer)


def _read(client: socket.socket) -> bytes:
    """One request: its head without a wish to keep the connection, and its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (part := client.recv(1 << 16)):
            raise ConnectionError("no request")
        received += part
    head, body = received.split(b"\r\n\r\n", 1)
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    lengths = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")]
    while lengths and len(body) < lengths[0]:
        body += client.recv(1 << 16)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@contextlib.contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    """A proxy that is closed at the end."""
    relay = Proxy(port)
    try:
        yield relay
    finally:
        relay.close()
