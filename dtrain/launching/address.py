"""This machine's addresses and free ports."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import psutil

from dtrain.core.errors import UserError


def own_address(environ: Mapping[str, str]) -> str | None:
    """This node's address on DTRAIN_INTERFACE; None if that is not set.

    Raises:
        UserError: there is no such interface, or it has no address.
    """
    name = environ.get("DTRAIN_INTERFACE")
    if not name:
        return None
    known = psutil.net_if_addrs()
    found = [a.address for a in known.get(name, []) if a.family == socket.AF_INET]
    if not found:
        fix = f"take one of {', '.join(sorted(known))}"
        raise UserError("no such interface, or no address on it", where=name, fix=fix)
    return found[0]


def free_port() -> int:
    """A port that nobody uses here now; another one for each attempt."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
