"""Addresses of the nodes: the interface that the user names, IPv4 and IPv6, and slow starts."""

from __future__ import annotations

import socket
import sys
import threading
from collections import namedtuple

import psutil
import pytest
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from dtrain.core.errors import UserError
from dtrain.launching import node_probe, preflight
from dtrain.launching.network import (
    address_of,
    own_address,
    rendezvous_endpoint,
    with_port,
)
from dtrain.launching.node_probe import LinkServer, measure

Address = namedtuple("Address", "family address")
INTERFACES = {
    "eth0": [Address(socket.AF_INET, "10.0.0.5"), Address(socket.AF_INET6, "fe80::1%eth0")],
    "ib0": [Address(socket.AF_INET6, "fe80::2%ib0"), Address(socket.AF_INET6, "fd00::5")],
    "ib1": [Address(socket.AF_INET6, "fe80::3%ib1")],
}


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, one of them with IPv6 alone, one with nothing that another node could reach."""
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: INTERFACES)


@pytest.mark.usefixtures("interfaces")
def test_address_belongs_to_the_named_interface() -> None:
    assert own_address({}) is None
    assert own_address({"DTRAIN_INTERFACE": "eth0"}) == "10.0.0.5"
    assert own_address({"DTRAIN_INTERFACE": "ib0"}) == "fd00::5"
    for name in ("ib1", "ib7"):
        with pytest.raises(UserError, match="take one of eth0, ib0, ib1"):
            own_address({"DTRAIN_INTERFACE": name})


@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize(
    ("interface", "host"), [("", "node7"), ("eth0", "10.0.0.5"), ("ib0", "fd00::5")]
)
def test_torchrun_parses_the_rendezvous_endpoint(interface: str, host: str) -> None:
    endpoint = rendezvous_endpoint({"DTRAIN_INTERFACE": interface}, "node7")
    address, port = parse_rendezvous_endpoint(endpoint, default_port=0)
    assert address == host and port > 0


def test_address_and_port() -> None:
    assert with_port("::1", 5) == "[::1]:5" and with_port("n0", 5) == "n0:5"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (["fe80::1%eth0", "fd00::5", "10.0.0.5"], "10.0.0.5"),
        (["fe80::1%eth0", "fd00::5"], "fd00::5"),
    ],
)
def test_hostname_resolves_to_a_reachable_address(monkeypatch, known, expected) -> None:
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in known]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
    assert address_of("n0") == expected


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_bandwidth_is_measured_over_ipv4_and_ipv6(address: str) -> None:
    if address == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    link = measure(address, LinkServer(address).port)
    assert "problem" not in link and link["megabytes_per_second"] > 0


@pytest.mark.parametrize("pings", [2, node_probe.PINGS])
def test_node_that_closes_the_connection_is_a_problem_of_that_link(pings: int) -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            for _ in range(pings):
                connection.recv(1)
                connection.sendall(bytes(8))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

    thread = threading.Thread(target=answer)
    thread.start()
    link = measure("127.0.0.1", server.getsockname()[1])
    thread.join()
    assert link == {"problem": "the other node closed the connection"}


def test_one_stall_does_not_make_a_link_slow(monkeypatch) -> None:
    speeds = iter([1e6, 5e8])
    monkeypatch.setattr(node_probe, "_send", lambda link: next(speeds))
    link = measure("127.0.0.1", LinkServer("127.0.0.1").port)
    assert link["megabytes_per_second"] == 500


def has_ipv6() -> bool:
    """Whether there is an IPv6 loopback."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


SLOW_START = """
import sys, time
time.sleep(1)
print("up 1", flush=True)
time.sleep(float(sys.argv[1]))
print("done", flush=True)
time.sleep(float(sys.argv[2]))
"""


def output(up_seconds: float, after_up: str, after_done: str = "0") -> str:
    command = [sys.executable, "-c", SLOW_START, after_up, after_done]
    return preflight.output_of(command, 60, up="up", up_seconds=up_seconds)


def test_measurement_starts_once_all_ranks_are_up() -> None:
    assert output(60, "0") == "up 1\ndone\n"
    assert output(0.5, "60") == "up 1\n"
    assert output(2, "0", "60") == "up 1\ndone\n"


def test_command_whose_child_lives_on_is_not_waited_for(monkeypatch) -> None:
    """Where srun is a script, SIGTERM ends the script alone, and its child holds the pipe."""
    monkeypatch.setattr(preflight, "END_SECONDS", 0.1)
    child = psutil.Process(int(preflight.output_of(["sh", "-c", "sleep 30 & echo $!"], 1.0)))
    assert child.status() != psutil.STATUS_ZOMBIE
    child.kill()
