"""A port for ranks to meet at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST, HIGHEST = 10_000, 32_767  # the latter where the machine does not tell


def free_port(told: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")) -> int:
    """A TCP port that nobody has on this machine, and that nobody is given by chance before the ranks listen there.

    Port 0 asks for one of the range that all connections, Gloo's among them, take theirs from: until the ranks have
    started, seconds later, it may be another's. `told` holds that range, "first last": ports below it are taken only by
    who asks for them by number. Random, so that two who ask at a time do not get the same. OSError where all are taken.
    """
    highest = int(told.read_text().split()[0]) - 1 if told.exists() else HIGHEST
    ports = range(LOWEST, max(highest, LOWEST) + 1)
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise OSError(f"no port from {ports[0]} to {ports[-1]} is free")
