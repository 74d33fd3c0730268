"""Score what a run learned again: on other tasks, with posterior samples, on more examples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from abmll.build import build, rebuild_for_scoring
from abmll.config import Config, ConfigError, Refused, load_config, override_texts, read_settings
from abmll.config.native import in_software
from abmll.config.settings import flat
from abmll.distributed import Ranks, joined_ranks
from abmll.evaluation import AdaptedTasks, Evaluation, Evaluator
from abmll.exhausted import told_as_settings
from abmll.files import file_digest, unwritable, write_whole
from abmll.lockstep import in_step
from abmll.memory.on_ranks import plan_on
from abmll.methods import Pretrained
from abmll.models.checkpointing import checkpoint_layers
from abmll.printed import score_table
from abmll.resuming import scoring
from abmll.run_folder import WRITTEN
from abmll.score_files import save_scores, scored_under
from abmll.summary import FINAL, THETA, find_summary, load_summary
from abmll.trained_with import refuse_other, refuse_other_base, refuse_other_training, refuse_unread


class FinishedRun:
    """A run's model and adapters, loaded once, to be scored in as many ways as wanted.

    The configuration is the run's own, with `overrides` (of tasks, method and eval; the adapters must fit the model's).
    Only the test tasks are read: the run's training and validation tasks may be gone. ConfigError or Refused where the
    folder holds no finished run, or its configuration cannot be had.
    """

    def __init__(self, run: str | Path, ranks: Ranks, overrides: Sequence[str] = ()):
        self.folder, self.overrides, self.ranks = Path(run), list(overrides), ranks
        self.config_path = self.folder / "config.yaml"
        try:
            summary = find_summary(self.folder)
            if summary == self.folder or not self.config_path.is_file():
                raise Refused(f"--run: {run}: holds no config.yaml; name the output folder of a run")
            refuse_unread(overrides)
            self.config = load_config(self.config_path, overrides, scoring=True)
            self.theta, self.facts = load_summary(summary)
        except ConfigError:
            raise
        except ValueError as error:
            raise Refused(str(error)) from error
        refuse_other_training(self.config, self.facts)
        try:
            self.parts = build(self.config, self.config_path, ranks.device, scoring=True)
            refuse_other_base(self.config, self.parts.fingerprint, self.facts)
            self.ranks = in_step(ranks, self.config.model, self.parts.learner)
            self.parts.learner.adapters.load_theta(self.theta)
        except ValueError as error:
            raise Refused(str(error)) from error

    @property
    def made_with(self) -> dict[str, Any]:
        """What all of its scores depend on: theta, the overrides that are not a name's own, how the run scores, and the
        rows of its test tasks.
        """
        theta, tasks = file_digest(self.folder / FINAL / THETA), self.parts.tasks.test_digests
        return {"theta": theta, "overrides": self.overrides, "scoring": scoring(self.config), "tasks": tasks}

    def configured(self, overrides: Sequence[str]) -> Config:
        """ConfigError for overrides that are wrong or do nothing, or of the model or the adapters, which are loaded."""
        refuse_unread(overrides)
        config = load_config(self.config_path, [*self.overrides, *overrides], scoring=True)
        loaded = flat(self.config.model_dump(mode="json"))
        refuse_other(config, loaded, "what was loaded depends on it; set it for all, or score another run")
        return config

    def score(
        self, overrides: Sequence[str] = (), adapted: AdaptedTasks | None = None
    ) -> tuple[list[Evaluation], list[str]]:
        """The run's scores, behind the pretrained model's where the configuration asks for them, and notes.

        With `adapted`, tasks that a call before has adapted alike are not adapted again. All ranks call this.
        ConfigError as `configured`.
        """
        config = self.configured(overrides)
        try:
            parts = self.parts if config == self.config else rebuild_for_scoring(self.parts, config, self.config_path)
            plan = plan_on(self.ranks, config, {})  # no engine runs here
        except ValueError as error:
            raise Refused(str(error)) from error
        checkpoint_layers(parts.model, plan.checkpointing)
        letters, beside = parts.tasks.letter_ids, config.trainer.parallel_episodes
        evaluator = Evaluator(
            parts.learner, letters, config.eval, plan.eval_batch_size, config.seed, self.ranks, beside
        )
        adapters = parts.learner.adapters
        adapters.load_theta(self.theta)
        evaluations = [evaluator.evaluate(parts.method, parts.tasks.test, "test", adapted)]
        if config.eval.pretrained and not isinstance(parts.method, Pretrained):
            adapters.initialise(config.seed)  # back to the start, where the adapters are zero
            evaluations.insert(0, evaluator.evaluate(Pretrained(config.method), parts.tasks.test, "test"))
        return evaluations, [*parts.tasks.notes, *self._notes(config, [task.name for task in parts.tasks.test])]

    def _notes(self, config: Config, scored: Sequence[str]) -> Iterator[str]:
        if slow := in_software(config.model.dtype, self.ranks.device.type):
            yield slow
        if config.eval.samples and not self.parts.method.sampled:
            name, samples = config.method.name, config.eval.samples
            yield f"eval.samples: {samples}: {name} has no posterior: its scores are the mean's"
        trained = flat(self.facts["config"])
        if config.tasks.source == trained["tasks.source"] == "builtin" and config.seed != trained["seed"]:
            yield (
                f"seed: {config.seed}: with its own, {trained['seed']}, the run was trained on kinds and words that "
                "these tasks are made of, so that they are not unseen"
            )
        if seen := [name for name in scored if name in self.facts.get("trained_on", ())]:
            yield f"{', '.join(seen)}: this run was trained on them; their scores are not those of unseen tasks"


def evaluate(run: str, overrides: list[str], output: str | None, settings: str | None = None) -> None:
    """The command `launch/evaluate.py`: print a run's table of scores, and write them as JSON where asked to.

    `settings`: a YAML file of named overrides; each one's scores go to RUN/scores/NAME, and those that are there, of
    the same theta, are not made again. ConfigError or Refused as `FinishedRun`, and Refused before anything is loaded
    where `output` cannot be written.
    """
    named = read_settings(settings) if settings else {}
    if settings and not named:
        raise ConfigError([f"--settings: {settings}: names no settings; write `name: {{section.key: value}}` lines"])
    with joined_ranks() as ranks:
        its_own = [Path(run) / name for name in WRITTEN]
        if problem := ranks.from_main(unwritable(Path(output), its_own) if output else None):
            raise Refused(f"--output: {output}: {problem}")
        finished = FinishedRun(run, ranks, overrides)
        with told_as_settings(finished.config, finished.folder):
            if settings:
                score_settings(finished, named)
                return
            evaluations, notes = finished.score()
            if ranks.is_main:
                if output:  # before they are printed: who reads that may have enough of it
                    told = json.dumps([evaluation.to_json() for evaluation in evaluations], indent=1)
                    write_whole(Path(output), told)
                for note in notes:
                    print(f"note: {note}")
                step = finished.facts["step"]
                print(f"{finished.folder / 'final'}, after step {step}\n\n{score_table(evaluations)}")


def score_settings(finished: FinishedRun, named: Mapping[str, Mapping[str, Any]]) -> None:
    """The run's scores under each of the named overrides, into its folder scores/NAME. All ranks call this.

    ConfigError and Refused before the first of them is made.
    """
    problems: list[str] = []
    for name, values in named.items():
        try:
            finished.configured(override_texts(values))
        except ConfigError as error:
            problems += (f"{name}: {problem}" for problem in error.problems)
    if problems:
        raise ConfigError(problems)
    folders, made_with, ranks = finished.folder / "scores", finished.made_with, finished.ranks
    # read once by all: a rank should not find what another has written since
    there = ranks.from_main({name: scored_under(folders / name, named[name], made_with) for name in named})
    adapted = AdaptedTasks()
    for name, values in named.items():
        if there[name]:
            if ranks.is_main:
                print(f"{name}: is there already")
            continue
        evaluations, notes = finished.score(override_texts(values), adapted)
        if ranks.is_main:
            for note in notes:
                print(f"note: {note}")
            save_scores(folders / name, evaluations, values, made_with)
            print(f"{name}\n{score_table(evaluations)}")
