"""Where ranks meet: in a file on one node, in torch's TCPStore on several.

torchrun's c10d rendezvous keeps its state as a pickle in a TCPStore, which has no authentication:
whoever reaches its port can replace the pickle and run code as the user who trains. It is refused
here. What takes its place stores no pickle, and no rank unpickles what it receives.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import secrets
import socket
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import FileStore, HashStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    c10d_rendezvous_backend,
    rendezvous_handler_registry,
    static_tcp_rendezvous,
)

from dtrain.core.errors import UserError
from dtrain.core.locks import lock_file

LOOPBACK = "127.0.0.1"
STORE_FILE = "DTRAIN_STORE"  # variable: where the ranks of one node meet
SINGLE_NODE = "single-node"  # name of the rendezvous, for --rdzv-backend


class SingleNodeRendezvous(RendezvousHandler):
    """The rendezvous of a torchrun that is alone: no port, and a file for its ranks.

    Args:
        run_id: torchrun's.
        folder: that only this user can open; each start of the ranks gets a new file in it.
    """

    def __init__(self, run_id: str, folder: Path) -> None:
        self._run_id, self._folder, self._starts = run_id, folder, 0

    def get_backend(self) -> str:
        """Name of the rendezvous."""
        return SINGLE_NODE

    def next_rendezvous(self) -> RendezvousInfo:
        """Be the only node, and name the file of the ranks."""
        self._starts += 1
        os.environ[STORE_FILE] = str(self._folder / f"store-{self._starts}")
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, 0))

    def is_closed(self) -> bool:
        """It never closes."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """No other node can join."""
        return 0

    def get_run_id(self) -> str:
        """torchrun's id of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """There is nothing to close."""
        return True


def create_single_node(parameters: RendezvousParameters) -> RendezvousHandler:
    """The single-node rendezvous whose folder stands in the place of torchrun's endpoint."""
    return SingleNodeRendezvous(parameters.run_id, Path(parameters.endpoint))


def choose_rendezvous(arguments: Namespace, folder: Path, environ: Mapping[str, str]) -> None:
    """Set the rendezvous in torchrun's arguments.

    Args:
        arguments: of torchrun's command line.
        folder: that only this user can open.
        environ: Slurm's variables name the rank of a node that `--node-rank` does not.

    Raises:
        UserError: the arguments ask for a rendezvous that other users could use to run code, or for
            a number of nodes that changes; or files in the folder cannot be locked.
    """
    if arguments.rdzv_backend not in ("static", SINGLE_NODE):
        message = f"whoever reaches the port of {arguments.rdzv_backend} can run code as you"
        fix = "leave it out; several nodes need --node-rank and --rdzv-endpoint=FIRST_NODE:PORT"
        raise UserError(message, where="--rdzv-backend", fix=fix)
    least, _, most = str(arguments.nnodes).partition(":")
    if (most or least) != least:
        raise UserError("a range of nodes is not supported", where="--nnodes", fix="give a number")
    if least == "1":
        with open(folder / "lock", "wb") as file:  # FileStore has a worse message
            lock_file(file, folder, wait=True)
        rendezvous_handler_registry.register(SINGLE_NODE, create_single_node)
        arguments.rdzv_backend, arguments.rdzv_endpoint = SINGLE_NODE, str(folder)
        arguments.standalone = False
        if arguments.rdzv_id == "none":
            arguments.rdzv_id = secrets.token_hex(8)  # the ranks know this start by it
    elif not (arguments.rdzv_endpoint or arguments.master_port):
        fix = "--rdzv-endpoint=FIRST_NODE:PORT, the same on every node"
        raise UserError("the nodes have nowhere to meet", where="--rdzv-endpoint", fix=fix)
    else:
        arguments.node_rank = arguments.node_rank or int(environ.get("SLURM_NODEID") or 0)


def rank_store(rank: int, size: int, environ: Mapping[str, str]) -> Store | None:
    """The store that this rank shares with the others; None lets torch open the launcher's.

    Args:
        rank: of this process.
        size: number of ranks.
        environ: variables of the launcher.
    """
    if size == 1:
        return HashStore()
    path = environ.get(STORE_FILE)
    return FileStore(path, size) if path else None


def refuse_pickles() -> None:
    """Let no collective unpickle: gloo does not know who connects to it either."""
    dist.distributed_c10d._tensor_to_object = _refuse_pickle


def _refuse_pickle(*_: object) -> NoReturn:
    raise RuntimeError("dtrain does not unpickle what another process sends")


def bound_store(
    host_name: str,
    port: int,
    world_size: int | None = None,
    is_master: bool = False,
    *args: Any,
    **settings: Any,
) -> TCPStore:
    """A TCPStore whose server listens on `host_name` only; port 0 chooses a free port.

    torch's own listens on all addresses of the machine. Takes the arguments of `TCPStore`.
    """
    if is_master and not _is_only_known_here(host_name):
        family, _, _, _, address = _resolved(host_name, port)
        server = socket.create_server(address[:2], family=family, backlog=2048)
        port = server.getsockname()[1]
        settings["master_listen_fd"] = server.detach()  # the store closes it
    return TCPStore(host_name, port, world_size, is_master, *args, **settings)


def _is_only_known_here(host_name: str) -> bool:
    """Whether a name means the loopback on this machine only, as Debian's /etc/hosts sets it.

    Other machines use another address, so the store must listen on all of them.
    """
    return not is_loopback(host_name) and is_loopback(str(_resolved(host_name, 0)[4][0]))


def _resolved(host_name: str, port: int) -> Any:
    """A name's TCP address as `getaddrinfo` returns it: IPv4 if there is one.

    A machine's name may resolve to a link-local IPv6 address, which others cannot use.
    """
    addresses = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)
    return min(addresses, key=lambda info: info[0] != socket.AF_INET)


def restrict_stores() -> None:
    """Make torchrun, and torch in this rank, create their stores with `bound_store`.

    A launcher that falls back to the c10d rendezvous ends instead, as accelerate's otherwise does
    where its port is taken.
    """
    static_tcp_rendezvous.TCPStore = bound_store  # type: ignore[assignment,misc]
    # `torch.distributed.rendezvous` by attribute is a function of the same name.
    importlib.import_module("torch.distributed.rendezvous").TCPStore = bound_store  # type: ignore
    c10d_rendezvous_backend.create_backend = _refuse_c10d  # type: ignore[assignment]


def _refuse_c10d(*_: object) -> NoReturn:
    message = "the c10d rendezvous is refused: whoever reaches its port can run code as you"
    raise UserError(message, where="launcher", fix="choose a port that is free, or use dtrain run")


def is_loopback(address: str) -> bool:
    """Whether an address, or the name localhost, is this machine's loopback."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
