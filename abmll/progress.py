"""What a run shows and writes while it goes: a bar with time left, a step line, the monitors; metrics.jsonl, a line an
outer step, and episodes.jsonl, a line an episode.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from abmll.config.schema import LoggingConfig
from abmll.engine import ThetaEngine
from abmll.files import sync, write_whole
from abmll.objective import kl_dominates


@dataclass(frozen=True)
class StepReport:
    """One outer step: means over its finite episodes (terms in nats), tokens of its forward passes, wall time.

    kl_by_layer: of the last inner step, in the layers' order; empty without a KL.
    """

    step: int
    episode: int
    num_episodes: int
    epoch: int
    terms: dict[str, float]
    weighted_kl: float | None
    kl_by_layer: list[float]
    real_tokens: int
    padded_tokens: int
    seconds: float
    skipped: int

    def record(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "episode": self.episode,
            "epoch": self.epoch,
            **self.terms,
            **({} if self.weighted_kl is None else {"weighted_kl": self.weighted_kl}),
            "real_tokens_per_second": self.real_tokens / self.seconds,
            "padded_tokens_per_second": self.padded_tokens / self.seconds,
            "seconds": self.seconds,
            "skipped_episodes": self.skipped,
            "peak_memory_bytes": peak_memory(),
            **({"kl_by_layer": [float(f"{kl:.6g}") for kl in self.kl_by_layer]} if self.kl_by_layer else {}),
        }


def peak_memory() -> int:
    """Most bytes in use so far: of the GPU's allocator, or (without a GPU) of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress:
    """Writes on the main rank only; on the others every call returns at once."""

    def __init__(
        self, folder: Path, config: LoggingConfig, is_main: bool, engine: ThetaEngine, pulled_to_theta: bool = True
    ):
        """`pulled_to_theta`: whether a KL that dwarfs the NLL is one of phi's steps, which is warned of. BLoB's, to a
        fixed prior, is at its largest at the start, and is meant to be.
        """
        self.path, self.config, self.is_main, self.engine = folder / "metrics.jsonl", config, is_main, engine
        self.episodes_path = folder / "episodes.jsonl"
        self.bar: tqdm | None = None
        self.watches_kl = pulled_to_theta

    def rewind(self, step: int, unvalidated: bool = False) -> None:
        """Drop the lines behind the checkpoint that a run resumes from: they will be written again, and so will be the
        step's validation where it is `unvalidated`.
        """
        for path in (self.path, self.episodes_path) if self.is_main else ():
            if path.exists():
                lines = path.read_bytes().splitlines()
                kept = [line for line in lines if _step_of(line) <= step - (unvalidated and b'"episode"' not in line)]
                write_whole(path, b"".join(line + b"\n" for line in kept))

    def start(self, step: int, total: int) -> None:
        if self.is_main:
            self.total, self.first, self.started = total, step, time.monotonic()
            disable = None if self.config.progress_bar else True  # None: no bar in a log file
            self.bar = tqdm(total=total, initial=step, unit="step", desc="meta-training", disable=disable)

    def report(self, report: StepReport) -> None:
        if not self.is_main:
            return
        record = report.record()
        self.write(record)
        events = {f"train/{k}": v for k, v in record.items() if k not in ("step", "kl_by_layer")}  # scalars alone
        self.engine.write_events(events, report.step)
        if report.step % self.config.every == 0:
            self.say(_step_line(report, self.total, self._time_left(report.step)))
        if self.watches_kl and report.terms and kl_dominates(report.terms["nll_outer"], report.weighted_kl):
            self.watches_kl = False  # once
            self.say(
                f"warning: beta * KL = {report.weighted_kl:.3g} dwarfs the NLL {report.terms['nll_outer']:.3g}: the KL "
                "grows with the square of phi's steps; lower method.beta as you raise the learning rates"
            )
        if self.bar is not None:
            self.bar.update()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_main:
            with self.path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def write_episodes(self, records: Sequence[dict[str, Any]]) -> None:
        """Append lines to episodes.jsonl."""
        if self.is_main:
            with self.episodes_path.open("a") as stream:
                stream.writelines(json.dumps(record) + "\n" for record in records)

    def sync(self) -> None:
        """The lines so far to the disk: behind a checkpoint that outlives a power cut, none of them may be missing."""
        for path in (self.path, self.episodes_path) if self.is_main else ():
            if path.exists():
                sync(path)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def _time_left(self, step: int) -> str:
        """Of training, at the pace since this process started, validations included."""
        seconds = (time.monotonic() - self.started) / (step - self.first) * (self.total - step)
        return str(timedelta(seconds=round(seconds)))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _step_of(line: bytes) -> int:
    """The step of a line; a line cut off by a kill belongs to no step that was reached."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 2**62


def _step_line(report: StepReport, total: int, left: str) -> str:
    place = f"step {report.step}/{total} · episode {report.episode}/{report.num_episodes} · epoch {report.epoch}"
    head = f"{place} · {left} left"
    if not report.terms:
        return f"{head} · skipped: NaN or Inf in every episode ({report.skipped} skipped so far)"
    terms = report.terms
    parts = [head, f"NLL {terms['nll_first']:.3f} > {terms['nll_last']:.3f} (outer {terms['nll_outer']:.3f})"]
    if terms["kl_outer"] or terms["prior"]:  # a Gaussian method
        parts += [
            f"beta*KL {report.weighted_kl:.3g}",
            f"KL {terms['kl_outer']:.3g}",
            f"-log prior {terms['prior']:.3g}",
        ]
    parts += [
        f"|g phi| {terms['gradient_norm_phi']:.3g}",
        f"|g theta| {terms['gradient_norm_theta']:.3g}",
        f"{report.real_tokens / report.seconds:,.0f} tokens/s ({report.padded_tokens / report.seconds:,.0f} padded)",
        f"{peak_memory() / 2**30:.2f} GiB peak",
    ]
    return " · ".join([*parts, f"skipped {report.skipped}"] if report.skipped else parts)
