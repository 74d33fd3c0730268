"""A whole run: build, score the pretrained model, meta-train, score, and say where everything is."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abmll.build import Parts, build
from abmll.checkpoint import Checkpoint, CheckpointStore, load_summary, save_summary
from abmll.config import Config, load_config, resolve_path, save_config
from abmll.config.deepspeed import load_deepspeed
from abmll.distributed import Ranks, start_ranks, stop_ranks
from abmll.engine import ThetaEngine
from abmll.evaluation import Evaluation, Evaluator
from abmll.methods import Pretrained
from abmll.progress import Progress
from abmll.report import derived_numbers, score_table
from abmll.trainer import Position, Trainer

# What a checkpoint's training depends on: a resumed run must agree. The rest (length, logging, scoring) may change.
FIXED_BY_CHECKPOINT = ("seed", "model", "adapters", "method", "tasks")


@dataclass
class Session:
    """One run's parts and its folder; methods are its stages."""

    config: Config
    folder: Path
    ranks: Ranks
    parts: Parts
    engine: ThetaEngine
    evaluator: Evaluator
    trainer: Trainer
    progress: Progress

    def score_pretrained(self) -> Evaluation | None:
        """Before training: the base model at 0 and K steps (theta is at its start, where the adapters are zero)."""
        if not self.config.eval.pretrained or self.config.method.name == "pretrained":
            return None
        self.progress.say("scoring the pretrained model on the unseen tasks")
        found = self.evaluator.evaluate(Pretrained(self.config.method), self.parts.tasks.test, "test")
        self._write_scores([found])
        return found

    def validate(self, position: Position) -> None:
        """Score the validation split; keep theta if it is the best so far."""
        found = self.evaluator.evaluate(self.parts.method, self.parts.tasks.validation, "validation")
        select_by = self.config.eval.select_by
        value = found.overall[found.steps[-1]][select_by]
        record = {f"validation_{k}_steps": found.overall[k] for k in found.steps}
        self.progress.write({"step": position.step, **record})
        events = {f"validation/{k}_steps/{name}": v for k in found.steps for name, v in found.overall[k].items()}
        self.engine.write_events(events, position.step)
        lower_is_better = select_by in ("nll", "ece")
        best = position.best
        better = best is None or (value < best["value"] if lower_is_better else value > best["value"])
        self.progress.say(
            f"validation after step {position.step}: {select_by} {value:.4f}" + (" (best so far)" if better else "")
        )
        if better:
            position.best = {"step": position.step, "value": value}
            if self.ranks.is_main:
                save_summary(self._best(position.step), self.parts.learner.adapters.theta, self._facts(position))
            self.ranks.barrier()

    def finish(self, pretrained: Evaluation | None) -> list[Evaluation]:
        """After training: take the best theta if it was tracked, score it, write the summary and the tables."""
        position = self.trainer.position
        if position.best is not None:
            theta, _ = load_summary(self._best(position.best["step"]))
            self.parts.learner.adapters.load_theta(theta)
        self.progress.say("scoring the unseen tasks")
        found = self.evaluator.evaluate(self.parts.method, self.parts.tasks.test, "test")
        evaluations = [found] if pretrained is None else [pretrained, found]
        self._write_scores(evaluations)
        if self.ranks.is_main:
            facts = {**self._facts(position), "scores": [evaluation.to_json() for evaluation in evaluations]}
            save_summary(self.folder / "final", self.parts.learner.adapters.theta, facts)
        self.ranks.barrier()
        return evaluations

    def prune_best(self) -> None:
        """Remove the summaries of steps that a later validation beat, once a checkpoint has recorded the better one."""
        best = self.trainer.position.best
        if self.ranks.is_main and best is not None:
            for folder in (self.folder / "best").glob("step-*"):
                if folder != self._best(best["step"]):
                    shutil.rmtree(folder)

    def _best(self, step: int) -> Path:
        return self.folder / "best" / f"step-{step:08d}"

    def _facts(self, position: Position) -> dict[str, Any]:
        return {"config": self.config.model_dump(mode="json"), "step": position.step, "best": position.best}

    def _write_scores(self, evaluations: list[Evaluation]) -> None:
        if self.ranks.is_main:
            text = json.dumps([evaluation.to_json() for evaluation in evaluations], indent=1)
            (self.folder / "scores.json").write_text(text)


def train(config_path: str, overrides: list[str], resume: bool, overwrite: bool) -> None:
    """The command `launch/train.py`. ValueError for a mistake of the user's, RuntimeError where training diverges."""
    config = load_config(config_path, overrides)
    ranks = start_ranks()
    try:
        session, checkpoint = _open(config, config_path, ranks, resume, overwrite)
        if checkpoint is None:
            pretrained = session.score_pretrained()
        else:
            pretrained = _saved_pretrained(session.folder)
        session.trainer.run()
        evaluations = session.finish(pretrained)
        if ranks.is_main:
            table = score_table(evaluations)
            (session.folder / "scores.md").write_text(table)
            session.progress.say(f"\n{table}\n{_where(session.folder)}")
    finally:
        stop_ranks()


def _open(
    config: Config, config_path: str, ranks: Ranks, resume: bool, overwrite: bool
) -> tuple[Session, Checkpoint | None]:
    folder = Path(config.output)
    deepspeed_config = load_deepspeed(resolve_path(config.trainer.deepspeed, config_path))
    _prepare_folder(folder, ranks, resume, overwrite)
    parts = build(config, config_path, ranks.device)
    learner, method = parts.learner, parts.method
    theta = learner.adapters.theta
    optimizer = method.outer_optimizer(theta.values())
    engine = ThetaEngine(theta, optimizer, deepspeed_config, config.logging, folder)
    store = CheckpointStore(folder / "checkpoints", config.trainer.keep_checkpoints, ranks)
    progress = Progress(folder, config.logging, ranks.is_main, engine)
    sampler = parts.tasks.sampler(config, method)
    trainer = Trainer(config, learner, method, sampler, engine, store, ranks, progress)
    evaluator = Evaluator(learner, parts.tasks.letter_ids, config.eval, config.seed, ranks)
    session = Session(config, folder, ranks, parts, engine, evaluator, trainer, progress)
    trainer.validate, trainer.after_save = session.validate, session.prune_best
    if ranks.is_main:
        save_config(config, folder / "config.yaml")
    checkpoint = store.newest_whole() if resume else None
    progress.say(derived_numbers(config, parts, trainer, ranks, deepspeed_config))
    if checkpoint is not None:
        _check_same_run(config, checkpoint)
        trainer.resume(checkpoint)
        progress.say(f"resumed from {checkpoint.folder}, after step {trainer.position.step} of {trainer.num_steps}")
    elif resume:
        progress.say(f"--resume auto: no checkpoint in {store.folder}, starting from the beginning")
        progress.rewind(0)
    return session, checkpoint


def _prepare_folder(folder: Path, ranks: Ranks, resume: bool, overwrite: bool) -> None:
    """An output folder that holds a run is neither mixed with another nor lost by accident."""
    holds_run = (folder / "config.yaml").exists()
    ranks.barrier()
    if holds_run and not resume:
        if not overwrite:
            raise ValueError(
                f"output: {folder}: already holds a run; continue it with --resume auto, start another with "
                "output=FOLDER, or replace it with --overwrite"
            )
        if ranks.is_main:
            shutil.rmtree(folder)
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()


def _check_same_run(config: Config, checkpoint: Checkpoint) -> None:
    saved, now = checkpoint.state["config"], config.model_dump(mode="json")
    different = [
        f"{section}: {saved[section]!r} in the checkpoint, {now[section]!r} now"
        if not isinstance(now[section], dict)
        else f"{section}.{key}: {saved[section].get(key)!r} in the checkpoint, {value!r} now"
        for section in FIXED_BY_CHECKPOINT
        for key, value in (now[section].items() if isinstance(now[section], dict) else [("", now[section])])
        if (saved[section].get(key) if isinstance(now[section], dict) else saved[section]) != value
    ]
    if different:
        raise ValueError(
            "--resume auto: the configuration differs from the checkpoint's:\n  "
            + "\n  ".join(different)
            + "\nset these back, or start another run with output=FOLDER"
        )


def _saved_pretrained(folder: Path) -> Evaluation | None:
    """The pretrained model's scores as the interrupted run wrote them."""
    try:
        saved = json.loads((folder / "scores.json").read_text())
    except (OSError, ValueError):
        warnings.warn(f"{folder / 'scores.json'}: not readable; the pretrained model's scores are left out", stacklevel=2)
        return None
    return next((Evaluation.from_json(item) for item in saved if item["method"] == "pretrained"), None)


def _where(folder: Path) -> str:
    return (
        f"adapter and scores   {folder / 'final'}\n"
        f"table                {folder / 'scores.md'}\n"
        f"step lines           {folder / 'metrics.jsonl'}\n"
        f"checkpoints          {folder / 'checkpoints'}"
    )
