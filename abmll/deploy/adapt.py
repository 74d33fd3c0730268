"""The command `launch/adapt.py`: adapters for a user's own tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from abmll.config import Refused
from abmll.config.settings import is_folder_name
from abmll.deploy.adapter import AdapterCard
from abmll.deploy.folder import CARD, check_free
from abmll.deploy.meta_model import Diverged, MetaModel
from abmll.deploy.truncation import told_truncated
from abmll.evaluation.temperature import RANGE
from abmll.tasks.labelled import Columns, by_question, contradictions, draw, read_labelled, task_files
from abmll.tasks.task import Example


def adapt(
    run: str,
    files: dict[str, Path],
    into: dict[str, Path],
    columns: Columns,
    examples: int | None,
    folds: int,
    steps: int | None,
    overrides: Sequence[str],
    device: str | None,
) -> None:
    """An adapter for each of the named files, into the folder of that name. ValueErrors for a user's mistakes.

    `examples`: at most so many of a file's, drawn by the run's seed. The rest as `MetaModel.adapt_all`.
    """
    for folder in into.values():  # mistakes cost less before a model is loaded
        check_free(folder, CARD)
    read = {task: read_labelled(path, columns) for task, path in files.items()}
    model = MetaModel.load(run, overrides, device)
    seed = model.base.config.seed
    tasks = {task: draw(rows, examples, seed, str(files[task])) for task, rows in read.items()}
    print(
        f"theta           {model.run.name}, after step {model.run.step}\n"
        f"model           {model.base.config.model.name} on {model.base.device}",
        flush=True,
    )
    with tqdm(unit="step", file=sys.stderr, leave=False, disable=None) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        problem = None
        try:
            found = model.adapt_all(tasks, folds, steps, tell)
        except Diverged as error:
            found, problem = error.models, error
    for task, own in found.items():
        folder = own.save(into[task])
        print(describe(own.card, tasks[task], folds))
        print(f"adapter         {folder}", flush=True)
    if problem is not None:
        raise problem


def name_files(
    data: str | None, tasks: str | None, out: str, name: str | None
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Each task's file, and the folder that its adapter goes to: `out` itself for one file, `out`/NAME for a folder's.

    Refused for a name that is no folder's.
    """
    if data is not None:
        path = Path(data)
        task = name or (path.parent.name if path.stem in ("train", "support") and path.parent.name else path.stem)
        files, into = {task: path}, {task: Path(out)}
    else:
        files = task_files(str(tasks))
        into = {task: Path(out) / task for task in files}
        for task in files:
            if not is_folder_name(task):
                raise Refused(f"{files[task]}: {task!r}: does not serve as a folder's name; rename the file")
    return files, into


def describe(card: AdapterCard, given: Sequence[Example], folds: int) -> str:
    """What an adaptation did with the examples that it was given, and what to expect of it."""
    adaptation, loss = card.adaptation, card.adaptation.loss
    options = ", ".join(card.options) if card.options else "each question's own"
    left_out, twofold = len(given) - adaptation.examples, contradictions(given)
    repeated = len(given) - len(by_question(given))
    rows = {
        "task": f"{card.task}: {adaptation.examples} examples; options: {options}"
        + (f"; {left_out} more did not fit in a prompt" if left_out else ""),
        "adaptation": f"{adaptation.steps} steps of {adaptation.batch_size} examples; NLL in the whole vocabulary, by "
        "step: " + " > ".join(f"{value:.2f}" for value in _thinned(loss)),
    }
    if adaptation.truncated:
        rows["cut"] = told_truncated(adaptation.truncated, adaptation.examples, card.config["tasks"]["max_tokens"])
    notes = []
    if repeated:
        once = ": the interval counts a question once" if card.scores else ""
        notes.append(f"{repeated} of {len(given)} rows repeat another{once}")
    if twofold:
        notes.append(f"{twofold} text{'s' if twofold > 1 else ''} with more than one label: correct the wrong ones")
    if notes:
        rows["note"] = f"\n{'note':<15} ".join(notes)
    found, before = card.scores.get("cross_validation"), card.scores.get("before_adaptation")
    if found and before:
        rows["expect"] = (
            f"accuracy {_percent(found['accuracy'])} (95 % interval {_percent(found['accuracy_low'])} to "
            f"{_percent(found['accuracy_high'])}), NLL among the options {_number(found['nll_options'])}, ECE "
            f"{_number(found['ece'])}: "
            f"cross-validation, {found['folds']:.0f} folds"
        )
        rows["without"] = (
            f"adaptation: accuracy {_percent(before['accuracy'])}, NLL {_number(before['nll_options'])}; always the "
            f"commonest {'label' if card.options else 'letter'}: {_percent(found['majority'])}"
        )
        rows["temperature"] = (
            f"none from {RANGE[0]:g} to {RANGE[1]:g} fits what was held out, as where predictions are like guesses"
        )
        if found["temperature"] is not None:
            rows["temperature"] = f"{_number(found['temperature'])} would calibrate what was held out (--calibrated)"
    else:
        why = "--folds 0" if not folds else "all examples ask one question, and none is left to adapt to"
        rows["expect"] = f"unknown: no cross-validation ({why})"
    return "\n" + "\n".join(f"{name:<15} {value}" for name, value in rows.items())


def _thinned(values: Sequence[float], most: int = 8) -> list[float]:
    """First, last and some between."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
