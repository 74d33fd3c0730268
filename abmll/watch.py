"""A watch over the ranks: one that dies ends the others, which would wait for it in a collective for hours.

Every rank keeps a TCP connection to rank 0. Whatever ends a process, its kernel closes the connection; a machine that
is gone no longer answers the kernel's keepalive probes. A rank does nothing to be seen alive, so a slow one is left
alone. A rank that leaves says so first, with its error if it has one: the others may have it too, and get some time to
stop by themselves.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

STARTING, HELLO = 60.0, 5.0  # seconds for all ranks to connect, and for one that has to say who it is
PROBE, INTERVAL, COUNT = 10, 5, 4  # seconds of silence, between probes, and probes: a machine is gone after 30 s
TICK = 0.2
DEATH, FAILURE = 1.0, 30.0  # from the news of a rank that died, or failed, to the end of this one


class Farewell(NamedTuple):
    """The last that is heard of a rank. Without a failure its work was done."""

    rank: int
    failure: str | None
    died: bool = False


class Watch:
    """This rank's end of the watch: a thread that reads its connections and ends the process if it must."""

    def __init__(self, rank: int, hosts: list[str], links: dict[int, socket.socket]):
        """`hosts` by rank; `links` by the rank at their other end: all the others on rank 0, rank 0 elsewhere."""
        self.rank, self.hosts = rank, hosts
        self._links, self._unread = links, dict.fromkeys(links, b"")
        self._left: set[int] = set()
        self._news: Farewell | None = None  # the first failure heard of
        self._heard, self._closing = threading.Event(), threading.Event()
        self._end_at = math.inf
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="watch over the ranks", daemon=True)
        self._thread.start()

    def leave(self, error: BaseException | None) -> None:
        """Tell the others that this rank stops, and why; say what is known of another rank that failed before."""
        failure = None if error is None else f"{type(error).__name__}: {error}"[:300]
        self._error = error
        self._tell(Farewell(self.rank, failure))
        if error is not None and self._heard.wait(DEATH) and self._news.failure != failure:
            print(self._message(), file=sys.stderr, flush=True)  # a lost peer shows as some error of a collective

    def close(self) -> None:
        """After `leave`, and after all that waits for other ranks: the watch is over."""
        self._closing.set()
        self._thread.join()
        for link in self._links.values():
            link.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while not self._closing.is_set():
                for key, _ in selector.select(TICK):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                if time.monotonic() > self._end_at:
                    self._end()

    def _read(self, rank: int) -> bool:
        """What there is to read of a rank; False when its connection is closed."""
        try:
            data = self._links[rank].recv(4096)
        except OSError:
            data = b""
        if not data:
            if rank not in self._left:
                self._hear(Farewell(rank, "died (it was killed, it crashed, or its machine is gone)", died=True))
            return False
        *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
        for line in lines:
            self._hear(Farewell(*json.loads(line)))
        return True

    def _hear(self, farewell: Farewell) -> None:
        self._left.add(farewell.rank)
        if farewell.failure is None:
            return
        self._end_at = min(self._end_at, time.monotonic() + (DEATH if farewell.died else FAILURE))
        self._news = self._news or farewell
        self._heard.set()
        if self.rank == 0:  # the others hear of each other through rank 0
            self._tell(farewell)

    def _tell(self, farewell: Farewell) -> None:
        for rank, link in self._links.items():
            if rank != farewell.rank:
                try:
                    link.sendall(json.dumps(farewell).encode() + b"\n")
                except OSError:
                    continue  # it left before, or the thread will find it dead

    def _message(self) -> str:
        rank, failure, died = self._news
        how = failure if died else f"failed: {failure}"
        remedy = "this rank ends too, as it would wait for it; --resume auto goes on from the newest checkpoint"
        return f"error (rank {self.rank}): rank {rank} on {self.hosts[rank]} {how}; {remedy}"

    def _end(self) -> None:
        """End this process, whatever its other threads wait for."""
        if self._error is not None:  # it failed by itself, and hangs on its way out
            traceback.print_exception(self._error)
        else:
            print(self._message(), file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)


def start_watch(rank: int, gather: Callable[[Any], list[Any]]) -> Watch:
    """All ranks of a process group: connect to rank 0, which listens on a free port of MASTER_ADDR's machine.

    `gather`: every rank's item, in the order of ranks. ConnectionError where the ranks do not find each other.
    """
    listener = _listen() if rank == 0 else None
    port = listener.getsockname()[1] if listener else 0
    everyone = gather((socket.gethostname(), port, secrets.token_hex(16)))
    hosts, (_, port, token) = [host for host, *_ in everyone], everyone[0]
    address = (os.environ["MASTER_ADDR"], port)
    try:
        if listener:
            with listener:
                links = _accept(listener, len(hosts), token)
        else:
            link = socket.create_connection(address, timeout=STARTING)
            link.sendall(json.dumps([token, rank]).encode() + b"\n")
            links = {0: link}
    except OSError as error:
        raise ConnectionError(
            f"rank {rank} on {hosts[rank]}: the ranks do not reach each other at {address[0]}:{port} ({error}); "
            "open the machines' TCP ports to each other, as the collectives need them too"
        ) from error
    for link in links.values():
        _keep_alive(link)
    return Watch(rank, hosts, links)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _accept(listener: socket.socket, world_size: int, token: str) -> dict[int, socket.socket]:
    """The connections of ranks 1 to world_size - 1. Whoever does not know the token is sent away."""
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + STARTING
    while len(links) < world_size - 1:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        link, _ = listener.accept()
        link.settimeout(HELLO)
        try:  # unbuffered: what comes behind the line is for the watch
            found, rank = json.loads(link.makefile("rb", buffering=0).readline(1000))
        except (OSError, ValueError, TypeError):
            found = None
        if found == token:
            links[rank] = link
        else:
            link.close()
    return links


def _keep_alive(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {
        "TCP_KEEPIDLE": PROBE,
        "TCP_KEEPINTVL": INTERVAL,
        "TCP_KEEPCNT": COUNT,
        "TCP_USER_TIMEOUT": 1000 * (PROBE + INTERVAL * COUNT),  # and what was sent is not confirmed for so long
    }.items():
        if hasattr(socket, name):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
