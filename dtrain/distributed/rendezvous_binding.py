"""Rendezvous stores that listen on the address they are known by, not on every interface.

torch's TCPStore listens on all addresses of a machine. On a shared login node or an open network
that lets anybody write into a run. A store that gets its listening socket from outside does not.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
from typing import Any

import psutil
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend


def bound_store(host_name: str, port: int, *args: Any, **settings: Any) -> TCPStore:
    """A TCPStore that, if it is the server, listens on `host_name` alone; port 0 is a free one.

    Takes what `TCPStore` takes, `is_master` by name, as torch's two callers do.
    """
    if settings.get("is_master") and not _is_only_known_here(host_name):
        family, _, _, _, address = _resolved(host_name, port)
        server = socket.create_server(address[:2], family=family, backlog=2048)
        port = server.getsockname()[1]
        settings["master_listen_fd"] = server.detach()  # the store closes it
    return TCPStore(host_name, port, *args, **settings)


def _is_only_known_here(host_name: str) -> bool:
    """Whether a name stands for the loopback on this machine, as Debian writes its own name.

    Others know it by another address, so the store has to listen everywhere.
    """
    return not _is_loopback(host_name) and _is_loopback(str(_resolved(host_name, 0)[4][0]))


def _resolved(host_name: str, port: int) -> Any:
    """A name's TCP address as `getaddrinfo` gives it: IPv4 if there is one.

    A machine's own name may stand for a link-local IPv6 address, which others cannot use.
    """
    addresses = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)
    return min(addresses, key=lambda info: info[0] != socket.AF_INET)


def listen_narrowly() -> None:
    """Let torchrun, or the rank that this process is, make such stores."""
    c10d_rendezvous_backend.TCPStore = bound_store  # type: ignore[assignment,misc]
    # `torch.distributed.rendezvous` by attribute is a function of the same name.
    importlib.import_module("torch.distributed.rendezvous").TCPStore = bound_store  # type: ignore


def choose_interface() -> None:
    """Let gloo and NCCL use the interface that the ranks meet on, unless the user chose others.

    On a single node, where that is the loopback, nothing else is listened on.
    """
    is_local = _is_loopback(os.environ.get("MASTER_ADDR", ""))
    if name := loopback_interface() if is_local else os.environ.get("DTRAIN_INTERFACE"):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)


def loopback_interface() -> str | None:
    """`lo`, or what this system calls it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and _is_loopback(a.address) for a in addresses):
            return name
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
