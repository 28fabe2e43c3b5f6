"""A node's links to others: how far, how fast, and what time it is there."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress

TIMEOUT_SECONDS = 5.0
SEND_SECONDS = 1.0
SEND_BYTES = 64 << 20
CHUNK = bytes(256 << 10)
PINGS = 5
TIME = struct.Struct("!d")


class LinkServer:
    """Answers the others' pings with the time, and takes in what they send."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=128)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    """Each single byte is a ping; the first longer message begins what is only taken in."""
    with connection, suppress(OSError):
        connection.settimeout(TIMEOUT_SECONDS * 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            if not connection.recv(1):
                return
            connection.sendall(TIME.pack(time.time()))
        while connection.recv(len(CHUNK)):
            pass
        connection.sendall(b"!")


def measure(address: str, port: int) -> dict[str, float | str]:
    """One link.

    Returns:
        milliseconds (round trip), megabytes_per_second, clock_seconds (the other's clock minus
        ours); or `problem`.
    """
    try:
        with socket.create_connection((address, port), timeout=TIMEOUT_SECONDS) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trip, clock = min(_ping(link) for _ in range(PINGS))
            speed = _send(link)
    except OSError as error:
        return {"problem": str(error) or type(error).__name__}
    return {
        "milliseconds": round(trip * 1e3, 3),
        "megabytes_per_second": round(speed / 1e6, 1),
        "clock_seconds": round(clock, 3),
    }


def _ping(link: socket.socket) -> tuple[float, float]:
    wall, started = time.time(), time.perf_counter()
    link.sendall(b"?")
    there = TIME.unpack(link.recv(TIME.size, socket.MSG_WAITALL))[0]
    trip = time.perf_counter() - started
    return trip, there - (wall + trip / 2)


def _send(link: socket.socket) -> float:
    """Bytes a second that arrive, over a second at most."""
    link.settimeout(TIMEOUT_SECONDS * 3)  # what lies in the buffers of a slow link
    sent, started = 0, time.perf_counter()
    while sent < SEND_BYTES and time.perf_counter() - started < SEND_SECONDS:
        sent += link.send(CHUNK)
    link.shutdown(socket.SHUT_WR)
    link.recv(1)
    return sent / (time.perf_counter() - started)
