"""How benchmarks/throughput.py measures: contenders in turn, their times, their memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from abmll.models.packing import TOLERANCE
from abmll.resident import release_freed
from throughput_rows.contenders import FROZEN, RESET, Clock, Notes, Round, Work, make

Contender = tuple[str, int]  # name, G


def measure(work: Work, chosen: list[Contender], rounds: int, real_tokens: int) -> list[dict[str, Any]]:
    """A row for each contender. RuntimeError where one does not compute what the frozen model does."""
    memory = _Memory(work.device)
    runs: dict[Contender, Round] = {}
    with torch.no_grad():
        right = _nll_of(make(FROZEN, 1, work), work)
    for contender in chosen:
        memory.building(contender)
        runs[contender] = make(*contender, work)
        nll = _nll_of(runs[contender], work)
        memory.built(contender)
        if not (nll - right).abs().max() <= TOLERANCE * right.abs().max():  # NaN fails as well
            raise RuntimeError(f"{contender}: NLLs before the first step are {nll.tolist()}, not {right.tolist()}")
    times: dict[Contender, list[tuple[float, Notes]]] = {contender: [] for contender in chosen}
    for _ in range(rounds):
        for contender, run in runs.items():
            memory.starting(contender)
            work.clock.wait()
            began = work.clock.now()
            notes = run()
            ended = work.clock.now()
            work.clock.wait()
            times[contender].append((work.clock.seconds(began, ended), notes))
            memory.ended(contender)
    return [_row(contender, times, memory, work, real_tokens) for contender in chosen]


def _nll_of(run: Round, work: Work) -> torch.Tensor:
    with torch.enable_grad():
        notes = run(learning=False)
    work.clock.wait()
    return torch.cat(notes.nll).float().cpu()


def _row(
    contender: Contender,
    times: dict[Contender, list[tuple[float, Notes]]],
    memory: _Memory,
    work: Work,
    real_tokens: int,
) -> dict[str, Any]:
    name, groups = contender
    seconds, episodes = [taken for taken, _ in times[contender]], len(work.episodes)
    steps = [_total(notes.steps, work.clock) for _, notes in times[contender]]
    swaps = [_total(notes.swaps, work.clock) for _, notes in times[contender]]

    def ratio(other: Contender, of: Callable[[tuple[float, Notes]], float]) -> float | None:
        """This one over another, median over rounds."""
        if other not in times:
            return None
        return statistics.median(of(a) / of(b) for a, b in zip(times[contender], times[other], strict=True))

    def whole(taken: tuple[float, Notes]) -> float:
        return taken[0]

    def inner(taken: tuple[float, Notes]) -> float:
        return _total(taken[1].steps, work.clock)

    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    floor = ratio((FROZEN, groups), whole)
    found = {
        "median_s": statistics.median(seconds),
        "p20_s": deciles[1],
        "p80_s": deciles[7],
        "episodes_per_s": episodes / statistics.median(seconds),
        "real_tokens_per_s": real_tokens / statistics.median(seconds),
        "padded_tokens_per_s": times[contender][-1][1].rows / statistics.median(seconds),
        "padding": 1 - real_tokens / times[contender][-1][1].rows,
        "step_ms": 1e3 * statistics.median(steps) / (episodes * work.config.method.inner_steps),
        "between_ms": 1e3 * statistics.median(swaps) / episodes,
        "share_of_floor": None if floor is None else 1 / floor,
        "episode_x_peft": ratio((RESET, 1), whole),
        "step_x_peft": ratio((RESET, 1), inner),
        "episode_x_one": ratio((name, 1), whole),
        "episode_x_plain": ratio((f"{name}, plain", 1), whole),
        "peak_gb": memory.peak(contender),
    }
    return {"contender": name, "groups": groups} | {
        key: None if value is None else float(f"{value:.4g}") for key, value in found.items()
    }


def _total(parts: list[tuple[Any, Any]], clock: Clock) -> float:
    return math.fsum(clock.seconds(*part) for part in parts)


class _Memory:
    """Peaks by contender, though all are there at once."""

    def __init__(self, device: torch.device):
        self.gpu, self.device = device.type == "cuda", device
        self.model = torch.cuda.memory_allocated() if self.gpu else 0
        self.own: dict[Contender, int] = {}
        self.peaks: dict[Contender, int] = {}

    def building(self, contender: Contender) -> None:
        self.before = torch.cuda.memory_allocated() if self.gpu else 0

    def built(self, contender: Contender) -> None:
        """Behind its first round: what it keeps between rounds."""
        self.own[contender] = torch.cuda.memory_allocated() - self.before if self.gpu else 0

    def starting(self, contender: Contender) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        release_freed(self.device)
        with suppress(OSError):  # not Linux
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def ended(self, contender: Contender) -> None:
        if self.gpu:
            peak = self.model + self.own[contender] + torch.cuda.max_memory_allocated() - self.before
        else:
            peak = _peak_resident()
        self.peaks[contender] = max(peak, self.peaks.get(contender, 0))

    def peak(self, contender: Contender) -> float | None:
        """GB of 1e9 bytes; None where the system does not tell."""
        return self.peaks[contender] / 1e9 or None


def _peak_resident() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def measure_evaluation(
    evaluate: Callable[[int], dict[str, float]], groups: list[int], rounds: int, clock: Clock
) -> list[dict[str, Any]]:
    """A row for each G: adaptation and scores of all unseen tasks. RuntimeError where scores depend on G."""
    times: dict[int, list[float]] = {beside: [] for beside in groups}
    nll = {beside: evaluate(beside)["nll"] for beside in groups}  # makes the prompts too
    wrong = {beside: value for beside, value in nll.items() if not abs(value / nll[groups[0]] - 1) <= TOLERANCE}
    if wrong:
        raise RuntimeError(f"evaluation: the NLL depends on the tasks side by side: {nll}")
    for _ in range(rounds):
        for beside in groups:
            clock.wait()
            began = clock.now()
            evaluate(beside)
            ended = clock.now()
            clock.wait()
            times[beside].append(clock.seconds(began, ended))
    rows = []
    for beside in groups:
        ratio = statistics.median(a / b for a, b in zip(times[beside], times[groups[0]], strict=True))
        numbers = {"median_s": statistics.median(times[beside]), "x_first": ratio, "nll": nll[beside]}
        rows.append({"groups": beside} | {key: float(f"{value:.4g}") for key, value in numbers.items()})
    return rows
