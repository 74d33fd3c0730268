"""The episodic meta-training loop, read from top to bottom.

Each outer step visits `tasks_per_step` tasks, dealt to the ranks. A rank adapts phi to its tasks, `parallel_episodes`
of them side by side, without communication; then the engine averages the theta gradients of all tasks and takes one
step, and phi is reset from theta.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from abmll.checkpoint import Checkpoint, CheckpointStore
from abmll.config.schema import Config
from abmll.dealing import deal, tasks_per_step
from abmll.distributed import Ranks
from abmll.engine import ThetaEngine
from abmll.interrupt import Interrupted
from abmll.kernels import NoiseKey, fold_seed
from abmll.learner import Learner, StepTerms
from abmll.methods import Method, Update, Visit
from abmll.methods.advice import lower_after_nan
from abmll.models.answers import rows_of_groups
from abmll.profiling import phase
from abmll.progress import Progress, StepReport
from abmll.resident import release_freed
from abmll.tasks.episodes import EpisodeSampler
from abmll.tasks.task import Episode

# One row an episode, behind these the KL of each layer where the method has one; the rows of all ranks are summed into
# one table, the only exchange besides theta's gradient.
COLUMNS = (
    "visited",
    "finite",
    "nll_first",
    "nll_last",
    "kl",
    "nll_outer",
    "kl_outer",
    "prior",
    "gradient_norm_phi",
    "gradient_norm_theta",
    "real_tokens",
    "padded_tokens",
)


class TrainingDiverged(RuntimeError):
    """Too many episodes in a row gave NaN or Inf, or theta holds them."""


@dataclass
class Position:
    """All that decides how training goes on, besides theta, the optimizers and the generators."""

    step: int = 0
    nonfinite_in_a_row: int = 0
    skipped_episodes: int = 0
    best: dict[str, Any] | None = None
    unvalidated: bool = False  # the step's validation was due, and an interrupt came first


@dataclass
class Trainer:
    """Runs episodes `step * tasks_per_step + slot`; where they are drawn from does not depend on the ranks."""

    config: Config
    learner: Learner
    method: Method
    sampler: EpisodeSampler
    engine: ThetaEngine
    store: CheckpointStore
    ranks: Ranks
    progress: Progress
    validate: Callable[[Position], None] | None = None
    after_step: Callable[[], None] | None = None
    after_save: Callable[[], None] | None = None
    stopping: Callable[[], bool] = lambda: False  # whether this rank was asked to stop
    made_with: dict[str, Any] = field(default_factory=dict)  # beside the configuration, for a checkpoint to tell
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        config = self.config
        self.tasks_per_step = tasks_per_step(config.trainer, self.ranks.world_size)
        self.num_episodes = config.trainer.episodes or config.trainer.epochs * self.sampler.episodes_per_epoch
        self.num_steps = -(-self.num_episodes // self.tasks_per_step) if self.method.updates_per_episode else 0
        self.inner_optimizer = self.learner.optimizer(config.method.inner_lr)
        self.noise_seed = fold_seed(config.seed, "training")
        self.layers_with_kl = len(self.learner.adapters.layers) if self.method.sampled else 0
        self._stop = False  # any rank was asked to stop: the same on all of them

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue exactly where the checkpoint was written. ValueError where its files hold something else, and where
        the episodes that were left out of its last, shorter step would be passed over.
        """
        before, reached = checkpoint.state.get("num_episodes"), checkpoint.state["step"] * self.tasks_per_step
        if before is not None and before < min(reached, self.num_episodes):
            raise ValueError(
                f"--resume auto: {checkpoint.folder} is of the end of {before} episodes, whose last step had fewer "
                f"than {self.tasks_per_step}: going on would pass over {min(reached, self.num_episodes) - before}; "
                "remove it to go on from an older one, or start another run with output=FOLDER"
            )
        self.position = TypeAdapter(Position).validate_json(json.dumps(checkpoint.state["position"]), strict=True)
        rank_state = self.store.load(checkpoint, self.engine)
        if rank_state is not None:
            try:
                self.inner_optimizer.load_state_dict(rank_state["inner_optimizer"])
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"checkpoint {checkpoint.folder}: holds no inner optimizer's state ({error})"
                ) from error
        self.learner.adapters.reset_phi()
        self.progress.rewind(self.position.step, self.position.unvalidated)

    def run(self) -> None:
        """Train to the last step. TrainingDiverged after `max_nonfinite` NaN or Inf episodes in a row.

        Interrupted, behind a checkpoint of the step that was reached, where a rank was asked to stop.
        """
        self.progress.start(self.position.step, self.num_steps)
        try:
            self._run()
        finally:
            self.progress.close()

    def _run(self) -> None:
        trainer, evaluation, position = self.config.trainer, self.config.eval, self.position
        if position.unvalidated:
            self._validate()
            if not self._stop:
                self._save()
            self._end_if_asked()
        while position.step < self.num_steps:
            started = time.perf_counter()
            table = self._outer_step(position.step)
            position.step += 1
            release_freed(self.ranks.device)
            self._count_nonfinite(table)
            self.progress.report(self._report(table, time.perf_counter() - started))
            self.progress.write_episodes(self._episode_records(table))
            if self.after_step:
                self.after_step()
            self._stop_if_diverged()
            last = position.step == self.num_steps
            if self.validate and evaluation.every and (position.step % evaluation.every == 0 or last):
                position.unvalidated = True
                if not self._stop:
                    self._validate()
            if self._stop or last or (trainer.checkpoint_every and position.step % trainer.checkpoint_every == 0):
                self._save()
            self._end_if_asked()

    def _validate(self) -> None:
        """Not at all where a rank is asked to stop meanwhile: it is made up for when the run goes on."""
        try:
            self.validate(self.position)
            self.position.unvalidated = False
        except Interrupted:
            self._stop = True

    def _end_if_asked(self) -> None:
        if self._stop:
            raise Interrupted(
                f"stopped after outer step {self.position.step} of {self.num_steps}, with a checkpoint in "
                f"{self.store.folder}"
            )

    @phase("outer step")
    def _outer_step(self, step: int) -> Tensor:
        """Visit this step's tasks and move theta; returns the table [tasks_per_step, columns and layers]."""
        episodes = self._own_episodes(step)
        side_by_side = [list(slots) for slots in _parts(sorted(episodes), self.config.trainer.parallel_episodes)]
        visits = [self._visit([episodes[slot] for slot in slots], step) for slots in side_by_side]
        tables = []
        for index in range(self.method.updates_per_episode):
            table = torch.zeros(self.tasks_per_step, len(COLUMNS) + self.layers_with_kl, dtype=torch.float64)
            gradient: dict[str, Tensor] = {}  # nothing is held for theta while phi is adapted
            for slots, visit in zip(side_by_side, visits, strict=True):
                update = self._update(replace(visit, index=index))
                table[slots] = self._rows(update)
                finite = table[slots, COLUMNS.index("finite")].bool().tolist()
                gradient = _sum(gradient, update.total(finite))
                if not all(finite):
                    self.inner_optimizer.state.clear()  # its moments are poisoned
                del update  # its gradients [G, ...], while the next episodes adapt
            table, self._stop = self._exchanged(table)
            tables.append(table)
            finite = int(table[:, COLUMNS.index("finite")].sum())
            if finite:  # the engine averages over ranks; theta's gradient is the mean over finite episodes
                scale = self.ranks.world_size / finite
                self.engine.step(self._scaled(gradient, scale))
            self.learner.adapters.reset_phi()
        return _merge(tables)

    def _exchanged(self, table: Tensor) -> tuple[Tensor, bool]:
        """The table of all ranks, and whether any of them was asked to stop: one row more, in the same exchange."""
        asked = table.new_full((1, table.shape[1]), float(self._stop or self.stopping()))
        found = self.ranks.sum_table(torch.cat([table, asked]))
        return found[:-1], bool(found[-1, 0])

    def _own_episodes(self, step: int) -> dict[int, Episode]:
        """This rank's episodes of a step, by their slots: as many as the others have, and as many tokens."""
        first = step * self.tasks_per_step
        slots = range(min(self.tasks_per_step, self.num_episodes - first))
        if self.ranks.world_size == 1 or len(slots) <= self.ranks.world_size:  # there is nothing to balance
            own = [slot for slot in slots if self.ranks.owns(slot)]
        else:  # every rank tokenises all, which spares an exchange, and makes batches of its own alone
            work = [self.sampler.num_tokens(first + slot) for slot in slots]
            own = deal(work, self.ranks.world_size)[self.ranks.rank]
        return {slot: self.sampler.episode(first + slot) for slot in own}

    def _visit(self, episodes: list[Episode], step: int) -> Visit:
        passes = self.config.method.inner_steps + 1
        keys = [[NoiseKey(self.noise_seed, episode.index * passes + k) for k in range(passes)] for episode in episodes]
        progress = step / self.num_steps
        return Visit.of(episodes, 0, keys, self.inner_optimizer, progress, self.ranks.device)

    @phase("episode")
    def _update(self, visit: Visit) -> Update:
        self.learner.adapters.reset_phi(len(visit.episodes))
        update = self.method.update(self.learner, visit)
        if self.config.method.reset_inner_optimizer:  # now: phi's moments need not be there in scoring
            self.inner_optimizer.state.clear()
        return update

    def _rows(self, update: Update) -> Tensor:
        """The episodes' rows of the table, [G, columns and layers], with one synchronisation for all their numbers."""
        inner = update.inner or (update.outer,)
        scalars = [value for terms in (*inner, update.outer) for value in terms[:-1]]
        by_layer = inner[-1].kl_by_layer.T
        numbers = torch.cat([torch.stack(scalars), by_layer]).double().cpu()
        steps, by_layer = numbers[: len(scalars)].unflatten(0, (len(inner) + 1, -1)), numbers[len(scalars) :].T
        *inner, outer = (StepTerms(*terms, by_layer) for terms in steps)
        real = [batch.groups.sizes for batch in update.batches]
        padded = [rows_of_groups(self.learner.model, batch) for batch in update.batches]
        finite = steps.isfinite().flatten(0, 1).all(dim=0)
        columns = [torch.ones_like(outer.nll), finite, inner[0].nll, inner[-1].nll, inner[-1].kl]
        columns += [outer.nll, outer.kl, outer.prior, inner[-1].gradient_norm, outer.gradient_norm]
        columns += [torch.tensor(sizes).sum(dim=0) for sizes in (real, padded)]
        return torch.cat([torch.stack([column.double() for column in columns], dim=1), by_layer], dim=1)

    def _scaled(self, gradient: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Theta's gradient times `scale`, in place; zeros of a rank that has no finite episode."""
        if not gradient:
            return {name: torch.zeros_like(theta) for name, theta in self.learner.adapters.theta.items()}
        torch._foreach_mul_(list(gradient.values()), scale)
        return gradient

    def _count_nonfinite(self, table: Tensor) -> None:
        position = self.position
        for visited, finite in table[:, :2].tolist():
            if visited:
                position.nonfinite_in_a_row = 0 if finite else position.nonfinite_in_a_row + 1
                position.skipped_episodes += finite < 1

    def _stop_if_diverged(self) -> None:
        position = self.position
        if position.nonfinite_in_a_row >= self.config.trainer.max_nonfinite:
            raise TrainingDiverged(
                f"{position.nonfinite_in_a_row} episodes in a row gave NaN or Inf; start another run (output=FOLDER) "
                f"with a lower {lower_after_nan(self.config)}, or raise trainer.max_nonfinite and go on with "
                "--resume auto: the last checkpoint is unharmed"
            )

    def _report(self, table: Tensor, seconds: float) -> StepReport:
        """Means over the step's episodes with a finite update, sums of tokens."""
        finite = table[table[:, COLUMNS.index("finite")].bool()]
        columns, by_layer = finite.mean(dim=0).split([len(COLUMNS), table.shape[1] - len(COLUMNS)])
        means = dict(zip(COLUMNS, columns.tolist(), strict=True)) if len(finite) else {}
        episodes = self.position.step * self.tasks_per_step
        return StepReport(
            step=self.position.step,
            episode=min(episodes, self.num_episodes),
            num_episodes=self.num_episodes,
            epoch=(min(episodes, self.num_episodes) - 1) // self.sampler.episodes_per_epoch,
            terms={name: means[name] for name in COLUMNS[2:-2]} if means else {},
            weighted_kl=self.config.method.beta * means["kl_outer"] if means else None,
            kl_by_layer=by_layer.tolist() if means else [],
            real_tokens=int(table[:, COLUMNS.index("real_tokens")].sum()),
            padded_tokens=int(table[:, COLUMNS.index("padded_tokens")].sum()),
            seconds=seconds,
            skipped=self.position.skipped_episodes,
        )

    def _episode_records(self, table: Tensor) -> list[dict[str, Any]]:
        """Each episode's own terms; of one with nothing but NaN or Inf the fact alone, as JSON has neither."""
        first, records = (self.position.step - 1) * self.tasks_per_step, []
        for slot, (visited, finite, *values) in enumerate(table[:, : len(COLUMNS)].tolist()):
            if visited:
                place = {"step": self.position.step, "episode": first + slot, "task": self.sampler.task(first + slot)}
                terms = {name: float(f"{v:.6g}") for name, v in zip(COLUMNS[2:], values, strict=True)} if finite else {}
                records.append({**place, "finite": finite == 1, **terms})
        return records

    @phase("checkpoint")
    def _save(self) -> None:
        """TrainingDiverged instead where theta is not finite: the last good checkpoints must not make room for it."""
        if not torch.stack([value.isfinite().all() for value in self.learner.adapters.theta.values()]).all():
            raise TrainingDiverged(
                f"theta holds NaN or Inf after outer step {self.position.step}; start another run (output=FOLDER) "
                f"with a lower {self.method.rate_of_theta}; the last checkpoint of this one is unharmed"
            )
        self.progress.sync()
        state = {"position": vars(self.position), "config": self.config.model_dump(mode="json")}
        state["tasks_per_step"] = self.tasks_per_step  # where the configuration leaves it to the ranks
        state |= {"num_episodes": self.num_episodes, "made_with": self.made_with}
        rank_state = {"inner_optimizer": self.inner_optimizer.state_dict()}
        self.store.save(self.position.step, self.engine, state, rank_state)
        if self.after_save:
            self.after_save()


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _sum(total: dict[str, Tensor], gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """The running sum, in the first gradient's own tensors."""
    if not (total and gradient):
        return total or gradient
    torch._foreach_add_([total[name] for name in gradient], list(gradient.values()))
    return total


def _merge(tables: list[Tensor]) -> Tensor:
    """One table for the updates of a step's episodes: the share of them that were finite, tokens of all, the terms of
    the last finite one, and the first NLL of the first.
    """
    if len(tables) == 1:
        return tables[0]
    every = torch.stack(tables)
    first, finite, tokens = COLUMNS.index("nll_first"), COLUMNS.index("finite"), COLUMNS.index("real_tokens")
    good, episodes = every[:, :, finite].bool(), torch.arange(every.shape[1])
    number = torch.arange(len(tables))[:, None]
    merged = every[torch.where(good, number, 0).amax(dim=0), episodes]
    merged[:, first] = every[torch.where(good, number, len(tables) - 1).amin(dim=0), episodes, first]
    merged[:, finite] = every[:, :, finite].mean(dim=0)
    merged[:, tokens : len(COLUMNS)] = every[:, :, tokens : len(COLUMNS)].sum(dim=0)
    return merged
