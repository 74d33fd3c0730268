"""A port for ranks to meet at."""

from __future__ import annotations

import random
import socket
from itertools import chain
from pathlib import Path

LOWEST = 10_000
FEWEST = 1_000  # ports to choose from
GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")  # "first last", of the ports that connections are given


def free_port() -> int:
    """A TCP port that nobody has on this machine, and that nobody is given by chance before the ranks listen there.

    Port 0 asks for one of the range that all connections, Gloo's among them, take theirs from: until the ranks have
    started, seconds later, it may be another's. From a random one on, so that two who ask at a time do not get the
    same. OSError where all are taken.
    """
    ports = candidates()
    first = random.SystemRandom().randrange(len(ports))
    for port in chain(ports[first:], ports[:first]):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise OSError(f"no port from {ports[0]} to {ports[-1]} is free")


def candidates(given: Path = GIVEN) -> range:
    """Below the range that connections are given, where a port is taken only by who asks for it by number; all from
    LOWEST on where that range leaves few, as on servers that were set to take nearly every port.
    """
    first = int(given.read_text().split()[0]) if given.exists() else 32_768
    return range(LOWEST, first if first - LOWEST >= FEWEST else 65_536)
