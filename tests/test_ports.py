"""Ports that ranks can still listen on when they have started."""

from __future__ import annotations

import socket

import pytest

from abmll import ports
from abmll.ports import GIVEN, LOWEST, candidates, free_port


@pytest.mark.skipif(not GIVEN.exists(), reason="only Linux tells the range")
def test_it_is_none_that_a_connection_is_given():
    assert LOWEST <= free_port() < int(GIVEN.read_text().split()[0])


@pytest.mark.parametrize(("first", "stop"), [(32_768, 32_768), (11_000, 11_000), (10_999, 65_536), (1024, 65_536)])
def test_a_machine_that_gives_nearly_all_ports_leaves_all_to_choose_from(tmp_path, first, stop):
    given = tmp_path / "ip_local_port_range"
    given.write_text(f"{first}\t60999\n")
    assert candidates(given) == range(LOWEST, stop)
    assert candidates(tmp_path / "none").stop == 32_768


def test_two_who_ask_get_two():
    assert len({free_port() for _ in range(8)}) > 1


def test_one_that_is_taken_is_not_given(monkeypatch):
    """Three to choose from: one with a listener, then two, then all."""
    monkeypatch.setattr(ports, "candidates", lambda: range(LOWEST, LOWEST + 3))
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        first.bind(("", LOWEST + 1))
        first.listen()
        assert {free_port() for _ in range(40)} == {LOWEST, LOWEST + 2}
        second.bind(("", LOWEST))
        third.bind(("", LOWEST + 2))
        with pytest.raises(OSError, match="no port from 10000 to 10002 is free"):
            free_port()
