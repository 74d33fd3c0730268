"""Ports that ranks can still listen on when they have started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from abmll.ports import LOWEST, free_port

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def told(tmp_path: Path, first: int) -> Path:
    path = tmp_path / "ip_local_port_range"
    path.write_text(f"{first}\t60999\n")
    return path


@pytest.mark.skipif(not RANGE.exists(), reason="only Linux tells the range")
def test_it_is_none_that_a_connection_is_given():
    assert LOWEST <= free_port() < int(RANGE.read_text().split()[0])


def test_two_who_ask_get_two():
    assert len({free_port() for _ in range(8)}) > 1


def test_one_that_is_taken_is_not_given(tmp_path):
    """Of the three that this range leaves."""
    with socket.socket() as other:
        other.bind(("", LOWEST + 1))
        other.listen()
        assert {free_port(told(tmp_path, LOWEST + 3)) for _ in range(40)} == {LOWEST, LOWEST + 2}
        with pytest.raises(OSError, match="no port from 10000 to 10000 is free"), socket.socket() as last:
            last.bind(("", LOWEST))
            free_port(told(tmp_path, 1024))
