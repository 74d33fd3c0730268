"""A command that is forked does what it does in an interpreter of its own, whatever becomes of those who started it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abmll.compare.forks import Forks
from abmll.compare.launcher import Launcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")

# says what a script can see of how it was started, and ends as it is told
SCRIPT = """
import atexit, json, os, signal, sys, time
import abmll.provenance, abmll.run, torch
print("read by people")
print("and so is this", file=sys.stderr)
atexit.register(print, "at the end")
seen = {"argv": sys.argv, "environment": dict(os.environ), "threads": torch.get_num_threads(), "cwd": os.getcwd(),
        "leads": os.getpgid(0) == os.getpid(), "abmll": abmll.__file__, "path": sys.path, "main": __name__,
        "commit": abmll.provenance.commit.cache_info().currsize,
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "descriptors": len(os.listdir("/proc/self/fd"))}
with open(sys.argv[1], "w") as file:
    json.dump(seen, file)
sys.exit(int(sys.argv[2]))
"""
END = """
import os, signal, sys, time
from pathlib import Path
place, end = sys.argv[1:]
Path(place).write_text(str(os.getpid()))
if end == "raises":
    raise RuntimeError("it is broken")
if end == "waits":
    time.sleep(60)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "interrupted":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
sys.exit(int(end))
"""


def until(there: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Bench:
    """A script with an end of its own, and a server that imports nothing to speak of."""

    def __init__(self, folder: Path, script: str):
        self.folder, self.script = folder, folder / "train.py"
        self.script.write_text(script)
        self.forks = Forks(os.environ, ["fcntl"])

    def start(self, end: str, name: str = "pid"):
        with (self.folder / "log").open("a") as log, (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self.forks.start([str(self.script), str(self.folder / name), end], os.environ, log, lock)

    def held(self, name: str = "pid") -> bool:
        with (self.folder / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


@pytest.fixture(autouse=True)
def own_servers(monkeypatch):
    """None that an earlier test of this process has started, which knows that test's paths and variables."""
    monkeypatch.setattr("abmll.compare.launcher._forks", {})


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    bench = Bench(tmp_path, END)
    yield bench
    bench.forks.close()


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("0", 0, ""),
        ("4", 4, ""),
        ("raises", 1, "RuntimeError: it is broken"),
        ("killed", -signal.SIGKILL, ""),
        ("interrupted", -signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_it_ends_as_in_an_interpreter_of_its_own(end, status, said, bench, tmp_path):
    own = subprocess.run(
        [sys.executable, str(bench.script), str(tmp_path / "own"), end], capture_output=True, text=True
    )
    assert own.returncode == status and said in own.stderr
    fork = bench.start(end)
    assert fork.wait() == status and int((tmp_path / "pid").read_text()) == fork.pid
    assert said in (tmp_path / "log").read_text() and not bench.held()


def test_what_runs_outlives_its_server(bench, tmp_path):
    """And nothing more is started by it."""
    fork = bench.start("waits")
    until((tmp_path / "pid").exists)
    assert os.getpgid(fork.pid) == fork.pid != os.getpgid(bench.forks.process.pid)
    bench.forks.process.kill()
    bench.forks.process.wait()
    assert bench.start("0", "other") is None
    assert alive(fork.pid) and bench.held()
    os.killpg(fork.pid, signal.SIGTERM)
    assert fork.wait() == -signal.SIGTERM and not bench.held()


def test_a_server_that_cannot_import_starts_nothing(tmp_path):
    forks = Forks(os.environ, ["no_such_module"])
    with (tmp_path / "log").open("a") as log, (tmp_path / "lock").open("w") as lock:
        assert forks.start(["x"], os.environ, log, lock) is None
    assert forks.process.wait(60) == 1
    forks.close()


def test_who_waits_for_the_imports_is_let_go_by_the_close(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    forks, found = Forks(os.environ, ["slow_to_import"]), []
    with (tmp_path / "log").open("a") as log, (tmp_path / "lock").open("w") as lock:
        waiting = threading.Thread(target=lambda: found.append(forks.start(["x"], os.environ, log, lock)))
        waiting.start()
        time.sleep(0.5)
        assert not found
        forks.close()
        waiting.join(30)
    assert found == [None]


def test_the_server_goes_with_its_client_and_the_commands_stay(tmp_path):
    (tmp_path / "train.py").write_text(END)
    code = f"""
import os, signal
from abmll.compare.forks import Forks
forks = Forks(os.environ, ["fcntl"])
with open({str(tmp_path / "log")!r}, "a") as log, open({str(tmp_path / "lock")!r}, "w") as lock:
    fork = forks.start([{str(tmp_path / "train.py")!r}, {str(tmp_path / "pid")!r}, "waits"], os.environ, log, lock)
print(forks.process.pid, fork.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    client = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert client.returncode == -signal.SIGKILL, client.stderr
    server, command = map(int, client.stdout.split())
    until(lambda: not alive(server))
    assert alive(command)
    os.killpg(command, signal.SIGTERM)
    until(lambda: not alive(command))


def test_many_threads_may_start_and_wait(bench):
    found = {}

    def go(number: int) -> None:
        found[number] = bench.start(str(number), f"pid-{number}").wait()

    threads = [threading.Thread(target=go, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(12)}


def test_a_fork_sees_what_an_interpreter_of_its_own_sees(tmp_path, monkeypatch):
    """From a folder in which another `abmll` lies; with variables that came and went behind the server's start."""
    (tmp_path / "here/abmll").mkdir(parents=True)
    (tmp_path / "here/abmll/__init__.py").write_text("raise ImportError('the wrong one')")
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)  # as the folder of the script that the client is
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GONE", "1")
    launchers = {"own": Launcher(tmp_path, 1, 1, ["0"]), "fork": Launcher(tmp_path, 1, 1, [])}
    seen, logs = {}, {}
    for name, own in launchers.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        for turn in ("first", "second"):  # the second one starts when the imports are there
            with (tmp_path / "lock").open("w") as lock:
                log = tmp_path / f"{name}-{turn}.log"
                problem = own.run("train.py", [f"{tmp_path}/{name}.json", "0"], log, 0, lock)
            assert problem is None, problem
            monkeypatch.delenv("GONE", raising=False)
            monkeypatch.setenv("CAME", turn)
        seen[name] = json.loads((tmp_path / f"{name}.json").read_text())
        logs[name] = log.read_text().splitlines()
        monkeypatch.setenv("GONE", "1")
        monkeypatch.delenv("CAME")
    launchers["fork"].stop()
    own, fork = seen["own"], seen["fork"]
    assert own["argv"].pop(1).endswith("own.json") and fork["argv"].pop(1).endswith("fork.json")
    assert own["environment"].pop("CUDA_VISIBLE_DEVICES") == "0" and not fork["environment"].pop("CUDA_VISIBLE_DEVICES")
    assert own["environment"]["CAME"] == "first" and "GONE" not in own["environment"]
    assert own["path"].pop(0) == fork["path"].pop(0) == str(tmp_path)
    assert fork["path"] == [entry for entry in sys.path if entry != str(tmp_path)]
    assert (own.pop("commit"), fork.pop("commit")) == (0, 1)  # the server's, of the code that it imported
    for side in (own, fork):
        side.pop("path")
    assert fork == own and own["leads"] and own["cwd"] == str(tmp_path / "here") and own["main"] == "__main__"
    for lines in logs.values():
        assert lines[0].startswith("$ ") and {"and so is this", "at the end", "read by people"} <= set(lines)


def test_a_command_whose_server_is_gone_gets_an_interpreter_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(END)
    monkeypatch.setattr("abmll.compare.launcher.Forks", lambda environment: Forks(environment, ["no_such_module"]))
    launcher = Launcher(tmp_path, 1, 1, [])
    for turn in ("0", "4"):
        with (tmp_path / "lock").open("w") as lock:
            problem = launcher.run("train.py", [str(tmp_path / "pid"), turn], tmp_path / "log", 0, lock)
        assert (problem is None) == (turn == "0")


def test_the_stop_ends_what_runs_and_starts_no_more(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(END)
    monkeypatch.setattr("abmll.compare.launcher.Forks", lambda environment: Forks(environment, ["fcntl"]))
    launcher, ended = Launcher(tmp_path, 1, 1, []), []

    def go() -> None:
        with (tmp_path / "lock").open("w") as lock:
            ended.append(launcher.run("train.py", [str(tmp_path / "pid"), "waits"], tmp_path / "log", 0, lock))

    waiting = threading.Thread(target=go)
    waiting.start()
    until((tmp_path / "pid").exists)
    launcher.stop()
    waiting.join(30)
    assert ended[0].startswith(f"exit status {-signal.SIGTERM}: ")
    go()
    assert ended[1] == "stopped"
