"""A whole run: build, score the pretrained model, meta-train, score, and say where everything is."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abmll.build import Parts, build
from abmll.checkpoint import Checkpoint, CheckpointStore
from abmll.config import Config, Refused, load_config, save_config, with_absolute_paths
from abmll.config.deepspeed import engine_settings
from abmll.config.paths import with_absolute_model
from abmll.dealing import tasks_per_step
from abmll.distributed import Ranks, check_shared, joined_ranks
from abmll.engine import ThetaEngine, check_monitors, check_settings
from abmll.evaluation import Evaluation, Evaluator
from abmll.exhausted import told_as_settings
from abmll.files import damage, remove_whole, sweep, write_whole
from abmll.interrupt import Interrupt
from abmll.lockstep import in_step
from abmll.memory import Plan
from abmll.memory.on_ranks import plan_on
from abmll.methods import Pretrained
from abmll.metrics import HIGHER_IS_BETTER
from abmll.models.checkpointing import checkpoint_layers
from abmll.printed import derived_numbers, score_table
from abmll.profiling import EPISODES_ON_CPU, EPISODES_ON_GPU, Profiler, steps_to_record
from abmll.progress import Progress
from abmll.provenance import PROVENANCE, provenance
from abmll.resuming import (
    OF_PREDICTIONS,
    as_checkpointed,
    check_finished_run,
    check_made_with,
    checkpointed_scoring,
    scored_otherwise,
    scoring,
)
from abmll.run_folder import CONFIG, check_folder, make_folder
from abmll.score_files import load_made_with, load_scores, save_scores
from abmll.summary import load_summary, save_summary
from abmll.trainer import Position, Trainer


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
    plan: Plan

    def pretrained(self, checkpoint: Checkpoint | None) -> Evaluation | None:
        """The base model's scores at 0 and K steps, where they are asked for; a resumed run's are those that it has
        written, if they are there and were made as its own are going to be. The main rank alone needs them.
        """
        if not self.config.eval.pretrained or self.config.method.name == "pretrained":
            return None
        if checkpoint is None:
            return self._score_pretrained()
        saved, problem = self._saved_pretrained(checkpoint) if self.ranks.is_main else (None, None)
        problem = self.ranks.from_main(problem)
        if problem is None:
            return saved
        self.progress.say(f"the pretrained model is scored again: {problem}")
        adapters = self.parts.learner.adapters
        theta = {name: parameter.detach().clone() for name, parameter in adapters.theta.items()}
        adapters.initialise(self.config.seed)
        try:
            return self._score_pretrained()
        finally:
            adapters.load_theta(theta)

    def _score_pretrained(self) -> Evaluation:
        """Theta is at its start, where the adapters are zero."""
        self.progress.say("scoring the pretrained model on the unseen tasks")
        found = self.evaluator.evaluate(Pretrained(self.config.method), self.parts.tasks.test, "test")
        self._write_scores([found])
        return found

    def _saved_pretrained(self, checkpoint: Checkpoint) -> tuple[Evaluation | None, str | None]:
        """As the interrupted run wrote them, or why they do not serve."""
        before = load_made_with(self.folder).get("scoring") or checkpointed_scoring(checkpoint)  # an older version's
        if different := scored_otherwise(before, self.config):
            return None, f"they were made otherwise, and are to be made with {', '.join(different)}"
        try:
            saved = load_scores(self.folder)
        except (OSError, ValueError) as error:
            return None, str(error)
        found = next((evaluation for evaluation in saved if evaluation.method == "pretrained"), None)
        if found is None:
            return None, f"{self.folder}: holds none of its scores"
        if list(found.tasks[0]) != [task.name for task in self.parts.tasks.test]:
            return None, "they are of other tasks"
        return found, None

    def validate(self, position: Position) -> None:
        """Score the validation split; keep theta if it is the best so far by `eval.select_by`."""
        found = self.evaluator.evaluate(self.parts.method, self.parts.tasks.validation, "validation")
        select_by = self.config.eval.select_by
        told = select_by or "accuracy"
        value = found.overall[found.steps[-1]][told]
        record = {f"validation_{k}_steps": found.overall[k] for k in found.steps}
        self.progress.write({"step": position.step, **record})
        events = {f"validation/{k}_steps/{name}": v for k in found.steps for name, v in found.overall[k].items()}
        self.engine.write_events(events, position.step)
        best = position.best
        better = best is None or (value > best["value"] if told in HIGHER_IS_BETTER else value < best["value"])
        better &= select_by is not None and not math.isnan(value)  # an adaptation that diverged is nobody's best
        self.progress.say(
            f"validation after step {position.step}: {told} {value:.4f}" + (" (best so far)" if better else "")
        )
        if better:
            position.best = {"step": position.step, "value": value}
            if self.ranks.is_main:
                save_summary(self._best(position.step), self.parts.learner.adapters.theta, self._facts(position))
            self.ranks.barrier()

    def profiler(self) -> Profiler:
        """Of the first outer steps that the trainer is going to make."""
        trainer, ranks, step = self.trainer, self.ranks, self.trainer.position.step
        episodes = -(-trainer.tasks_per_step // ranks.world_size)
        wanted = EPISODES_ON_GPU if ranks.device.type == "cuda" else EPISODES_ON_CPU
        if episodes > wanted:
            self.progress.say(
                f"note: --profile: an outer step has {episodes} episodes on each rank; with fewer "
                f"(trainer.tasks_per_step: {trainer.tasks_per_step}) the profile is smaller"
            )
        steps = steps_to_record(step, trainer.num_steps, max(1, wanted // episodes), self.config.eval.every)
        folder = self.folder / "profile" / f"rank-{ranks.rank:05d}"
        profiler = Profiler(folder, ranks.device, step, steps, self.progress.say)
        trainer.after_step = profiler.step
        return profiler

    def finish(self, pretrained: Evaluation | None) -> list[Evaluation]:
        """After training: take the best theta if it was tracked, score it, write the summary and the tables."""
        position = self.trainer.position
        if position.best is not None:
            theta, _ = load_summary(self._best(position.best["step"]))
            self.parts.learner.adapters.load_theta(theta)
            tasks = self.parts.tasks
            if {task.name for task in tasks.validation} & {task.name for task in tasks.test}:
                self.progress.say(
                    f"note: theta is that of step {position.best['step']}, the best by labels of test tasks (their "
                    "validation rows), which methods without training cannot choose by; for scores to be compared name "
                    "other tasks in tasks.validation, or set eval.select_by=null"
                )
        facts = self._facts(position)
        if self.ranks.is_main:  # before the scoring too: what was learned should not wait for it
            save_summary(self.folder / "final", self.parts.learner.adapters.theta, facts)
        self.progress.say("scoring the unseen tasks")
        found = self.evaluator.evaluate(self.parts.method, self.parts.tasks.test, "test")
        evaluations = [found] if pretrained is None else [pretrained, found]
        self._write_scores(evaluations)
        if self.ranks.is_main:
            facts["scores"] = [evaluation.to_json() for evaluation in evaluations]
            save_summary(self.folder / "final", self.parts.learner.adapters.theta, facts)
        self.ranks.barrier()
        for evaluation in evaluations:
            for steps, task in evaluation.diverged:
                self.progress.say(
                    f"warning: {evaluation.method}: {task}: not finite after {steps} steps; lower test_lr"
                )
        return evaluations

    def prune_best(self) -> None:
        """Keep the best summary, and those that kept checkpoints name: a run may have to go back to one of them."""
        if self.ranks.is_main:
            states = [vars(self.trainer.position), *(state["position"] for state in self.trainer.store.states())]
            named = {self._best(state["best"]["step"]) for state in states if state["best"] is not None}
            for folder in (self.folder / "best").glob("step-*"):
                if folder not in named:
                    remove_whole(folder)
            sweep(self.folder / "best")

    def check_best(self, checkpoint: Checkpoint) -> None:
        """After a resume: forget a best step whose summary is gone, rather than fail when training is over, and one
        that was found by another way to score.
        """
        best = self.trainer.position.best
        before = checkpointed_scoring(checkpoint)
        if best and (changed := scored_otherwise(before, self.config, OF_PREDICTIONS)):
            self.progress.say(
                f"note: validations are made with {', '.join(changed)} now; the best step is tracked from here on"
            )
            self.trainer.position.best = best = None
        problem = self.ranks.from_main(best and self.ranks.is_main and damage(self._best(best["step"])))
        if problem:
            self.progress.say(f"warning: {self._best(best['step'])}: {problem}; the best step is tracked from here on")
            self.trainer.position.best = None

    def _best(self, step: int) -> Path:
        return self.folder / "best" / f"step-{step:08d}"

    def _facts(self, position: Position) -> dict[str, Any]:
        """Of theta as it stands: `step` is the one it comes from, `trained_steps` all that were made.

        `layers`: the adapted layers' names, in the order of `kl_by_layer` in metrics.jsonl. `fingerprint`: the base's
        (`abmll.models.fingerprint`), or None. `trained_on`: the training tasks' names.
        """
        step = position.best["step"] if position.best else position.step
        config = self.config.model_dump(mode="json")
        adapters = self.parts.learner.adapters
        parameters = sum(value.numel() for value in adapters.theta.values())
        steps = {"step": step, "trained_steps": position.step, "best": position.best}
        trained_on = [task.name for task in self.parts.tasks.train] if self.trainer.num_steps else []
        base = {"fingerprint": self.parts.fingerprint, "trained_on": trained_on}
        return {"config": config, **base, "parameters": parameters, "layers": list(adapters.layers), **steps}

    def _write_scores(self, evaluations: list[Evaluation]) -> None:
        if self.ranks.is_main:
            save_scores(self.folder, evaluations, made_with={"scoring": scoring(self.config)})


def train(config_path: str, overrides: list[str], resume: bool, overwrite: bool, profile: bool = False) -> None:
    """The command `launch/train.py`. ConfigError or Refused for a mistake of the user's, TrainingDiverged for NaNs,
    Exhausted where memory or disk ran out, and Interrupted after SIGTERM.
    """
    config = load_config(config_path, overrides)
    with joined_ranks() as ranks, told_as_settings(config, Path(config.output)):
        try:
            session, checkpoint = open_session(config, config_path, ranks, resume, overwrite)
        except ValueError as error:  # later ones are no mistakes of the user's, and keep their traceback
            raise Refused(str(error)) from error
        with Interrupt() as asked:  # not before: there was nothing to save
            session.trainer.stopping = session.evaluator.stopping = asked
            pretrained = session.pretrained(checkpoint)
            with session.profiler() if profile else nullcontext():
                session.trainer.run()
            evaluations = session.finish(pretrained)
        if ranks.is_main:
            table = score_table(evaluations)
            write_whole(session.folder / "scores.md", table)
            session.progress.say(f"\n{table}\n{_where(session.folder)}")


def open_session(
    config: Config, config_path: str, ranks: Ranks, resume: bool, overwrite: bool
) -> tuple[Session, Checkpoint | None]:
    """All parts of a run, its folder ready. ValueError for whatever the configuration names and cannot be had."""
    folder, config = Path(config.output), with_absolute_model(config)
    deepspeed_config = engine_settings(config, config_path)
    check_folder(folder, resume, overwrite)
    check_settings(deepspeed_config, config.trainer.deepspeed)
    check_monitors(config.logging)
    store = CheckpointStore(folder / "checkpoints", config.trainer.keep_checkpoints, ranks)
    checkpoint = store.newest_whole() if resume else None
    as_given = with_absolute_paths(config, config_path)
    if checkpoint is not None:
        config = as_checkpointed(config, checkpoint, ranks.world_size)
    elif resume:
        check_finished_run(config, folder, ranks)
    tasks_per_step(config.trainer, ranks.world_size)
    parts = build(config, config_path, ranks.device)
    ranks = in_step(ranks, config.model, parts.learner)
    plan = plan_on(ranks, config, deepspeed_config)
    checkpoint_layers(parts.model, plan.checkpointing)
    trained_with = {
        "gradient_clipping": deepspeed_config["gradient_clipping"],
        "fingerprint": parts.fingerprint,
        "tasks": parts.tasks.digests,
    }
    if checkpoint is not None:
        check_made_with(trained_with, checkpoint)
    _prepare_folder(folder, ranks, overwrite)  # behind all that can find a mistake
    learner, method = parts.learner, parts.method
    theta = learner.adapters.theta
    optimizer = method.outer_optimizer(theta.values())
    engine = ThetaEngine(theta, optimizer, deepspeed_config, config.logging, folder)
    progress = Progress(folder, config.logging, ranks.is_main, engine, method.pulled_to_theta)
    sampler = parts.tasks.sampler(config, method)
    trainer = Trainer(config, learner, method, sampler, engine, store, ranks, progress, made_with=trained_with)
    beside = config.trainer.parallel_episodes
    evaluator = Evaluator(
        learner, parts.tasks.letter_ids, config.eval, plan.eval_batch_size, config.seed, ranks, beside
    )
    session = Session(config, folder, ranks, parts, engine, evaluator, trainer, progress, plan)
    trainer.validate, trainer.after_save = session.validate, session.prune_best
    progress.say(derived_numbers(config, parts, trainer, ranks, plan))
    if checkpoint is not None:
        trainer.resume(checkpoint)
        session.check_best(checkpoint)
        progress.say(f"resumed from {checkpoint.folder}, after step {trainer.position.step} of {trainer.num_steps}")
        written_by, number = checkpoint.state["world_size"], trainer.tasks_per_step
        if written_by != ranks.world_size or number != tasks_per_step(as_given.trainer, ranks.world_size):
            progress.say(
                f"{written_by} ranks wrote it, {ranks.world_size} go on: an outer step has {number} episodes as before"
            )
    elif resume:
        progress.say(f"--resume auto: no checkpoint in {store.folder}, starting from the beginning")
        progress.rewind(0)
    if ranks.is_main:
        save_config(as_given, folder / CONFIG)
    return session, checkpoint


def _prepare_folder(folder: Path, ranks: Ranks, overwrite: bool) -> None:
    """The run's folder, which from here on says whose it is."""
    ranks.barrier()
    if ranks.is_main:
        make_folder(folder, overwrite)
        write_whole(folder / PROVENANCE, json.dumps(provenance()))
    ranks.barrier()
    check_shared(folder, ranks)


def _where(folder: Path) -> str:
    return (
        f"adapter and scores   {folder / 'final'}\n"
        f"table                {folder / 'scores.md'}\n"
        f"step lines           {folder / 'metrics.jsonl'}\n"
        f"checkpoints          {folder / 'checkpoints'}"
    )
