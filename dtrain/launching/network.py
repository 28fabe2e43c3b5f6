"""This machine's addresses and free ports, and where the ranks of several machines meet."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import psutil

from dtrain.core.errors import UserError


def own_address(environ: Mapping[str, str]) -> str | None:
    """This node's address on DTRAIN_INTERFACE, IPv4 if it has one; None if that is not set.

    Raises:
        UserError: there is no such interface, or it has no address.
    """
    name = environ.get("DTRAIN_INTERFACE")
    if not name:
        return None
    known = psutil.net_if_addrs()
    addresses = known.get(name, [])
    candidates = [a.address for a in addresses if a.family == socket.AF_INET]
    candidates += [
        a.address for a in addresses if a.family == socket.AF_INET6 and _is_routed(a.address)
    ]
    if not candidates:
        fix = f"take one of {', '.join(sorted(known))}"
        raise UserError("no such interface, or no address on it", where=name, fix=fix)
    return candidates[0]


def address_of(name: str) -> str:
    """A node's address: IPv4 if it has one, else an IPv6 address that other nodes can use.

    Raises:
        OSError: the name does not resolve.
    """
    candidates = [
        str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    ]
    return min(candidates, key=lambda address: (":" in address, not _is_routed(address)))


def _is_routed(address: str) -> bool:
    """Whether an IPv6 address means the same on every machine; a link-local one does not."""
    return not ipaddress.ip_address(address.partition("%")[0]).is_link_local


def rendezvous_endpoint(environ: Mapping[str, str], first_node: str) -> str:
    """Host and port at which the ranks of several nodes meet.

    Called on the first of them; by a person inside `salloc` on another machine.

    Raises:
        UserError: DTRAIN_INTERFACE names no interface of this machine.
    """
    return with_port(own_address(environ) or first_node, free_port())


def with_port(host: str, port: int) -> str:
    """`host:port`; an IPv6 address goes into brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port() -> int:
    """A free port of this machine; a different one for each attempt."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
