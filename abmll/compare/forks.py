"""Commands of Python, forked from a process that has made their imports once, which is most of what a small run takes.

    client                    server (imports, then waits)     supervisor             the command
    Forks.start(...)  ------> forks the supervisor    ------>  forks the command ---> runs the script
    Fork.wait()       <-------------------------------------  tells pid and status

The supervisor makes a command independent of the others: should the server be killed, or the client, what runs goes on.
Server and supervisors have sessions of their own, a command has a process group: a signal to the client's group reaches
none, and whoever starts them stops them. For Linux, and where no GPU is: an import may have woken a GPU's driver, which
does not survive a fork.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import IO

IMPORTED = ("abmll.run", "abmll.rescore", "torchmetrics.functional.classification")  # the last when a run is scored
LONGEST = 1 << 20  # bytes of a message: an environment, mostly
SERVER = "import sys; sys.path[:] = {path!r}; from abmll.compare.forks import serve; serve({descriptor}, {modules!r})"


class Forks:
    """The client's side: a server, which ends with `close`, or with the client."""

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str] = IMPORTED):
        """`environment`: what the imports see, such as OMP_NUM_THREADS, which libraries read when they are loaded."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._given = set(environment)
        # the path as it is here: an interpreter that is told its code would look in the working directory first
        code = SERVER.format(path=sys.path, descriptor=theirs.fileno(), modules=tuple(modules))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env=dict(environment), pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: IO, held: IO) -> Fork | None:
        """`script arguments...` with its output in a file, and the file `held` open as long as it runs.

        None where the server is not there any more. Waits for the imports, if they are still being made.
        """
        request = {
            "command": list(command),
            "environment": dict(environment),
            "unset": sorted(self._given - set(environment)),
            "folder": os.getcwd(),
        }
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, suppress(OSError):
            descriptors = [output.fileno(), held.fileno(), theirs.fileno()]
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        told = _receive(report)
        if not told:
            report.close()
            return None
        return Fork(int(told), report)

    def close(self) -> None:
        """The server ends; what it has started does not."""
        self.process.kill()
        self.process.wait()
        self._control.close()


class Fork:
    """A command that runs, as subprocess.Popen has it."""

    def __init__(self, pid: int, report: socket.socket):
        self.pid, self._report = pid, report

    def wait(self) -> int:
        """Its exit status; minus a signal's number if it ended by that."""
        with self._report:
            told = _receive(self._report)
        return int(told) if told else -signal.SIGKILL  # somebody killed the supervisor


def _receive(report: socket.socket) -> bytes:
    try:
        return report.recv(64)
    except ConnectionError:
        return b""


def serve(control: int, modules: Sequence[str]) -> None:
    """The server's side, until the client has gone. In a command's process this ends as its script does."""
    for module in modules:
        import_module(module)
    if provenance := sys.modules.get("abmll.provenance"):
        provenance.commit()  # of the code that was imported, whatever is checked out while commands are forked
    sys.stdout.flush()  # what they have said is no command's
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    with socket.socket(fileno=control) as requests:
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 3)
            if not message:
                return
            if os.fork() == 0:
                break
            for descriptor in descriptors:
                os.close(descriptor)
    _supervise(json.loads(message), *descriptors)


def _supervise(request: dict, output: int, held: int, report: int) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    with suppress(PermissionError, ProcessLookupError):  # on both sides: it is there for both
        os.setpgid(pid, pid)
    if pid == 0:
        os.close(report)
        _run(request, output)
        return
    for descriptor in (output, held):
        os.close(descriptor)
    with suppress(OSError), socket.socket(fileno=report) as told:  # the client may have gone
        told.send(str(pid).encode())
        told.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _run(request: dict, output: int) -> None:
    """The script, as an interpreter of its own would have it."""
    for name in request["unset"]:
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")
