"""The commands `launch/predict.py`, `launch/suggest.py` and `launch/evaluate.py --adapter`: adapters in use."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, TextIO, TypeVar

import pandas as pd
from tqdm import tqdm

from abmll.deploy.meta_model import MetaModel
from abmll.deploy.task_model import Prediction, TaskModel, TooLong, load_task_models, of_base
from abmll.deploy.truncation import told_too_long, told_truncated
from abmll.files import is_read, unwritable, write_whole
from abmll.metrics import Predictions, score
from abmll.tasks.labelled import Columns, Row, check_alike, read_labelled, read_rows
from abmll.tasks.task import Example
from abmll.uncertainty import uncertainty

CHUNK = 256  # rows read, predicted and written at a time: their prompts go by length through one batch after another
Found = TypeVar("Found")


def predict(
    adapters: Sequence[str],
    source: str,
    output: str | None,
    columns: Columns,
    samples: int = 0,
    calibrated: bool = False,
    abstain: float | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """A JSONL line for every row and adapter, written as they come. ValueErrors for a user's mistakes.

    `abstain`: of a prediction that is less sure than this the label is left out.
    """
    if output is not None and (problem := _cannot_write_into(Path(output), (source, *adapters))):
        raise ValueError(f"--output: {output}: {problem}")
    models = load_task_models(adapters, of_base(model, dtype), device)
    names = [own.name for own in models]
    if len(set(names)) < len(names):
        names = list(adapters)
    rows = (checked(row, columns) for row in read_rows(source))
    chunks = as_they_come(rows) if source == "-" else in_chunks(rows)
    lines = predicted_lines(models, names, chunks, columns, samples, calibrated, abstain)
    first = next(lines, None)  # what cannot be read or predicted costs no output
    written = abstained = 0
    told: Counter[str] = Counter()
    last: dict[str, int] = {}
    with _output(output) as file, tqdm(unit="line", file=sys.stderr, leave=False, disable=None) as bar:
        for line in lines if first is None else chain([first], lines):
            file.write(_as_json(line) + "\n")
            written, abstained = written + 1, abstained + line.get("abstained", False)
            for what in ("truncated", "too_long", "empty"):
                if line.get(what) and line["row"] != last.get(what):  # by several adapters it is one text
                    told[what], last[what] = told[what] + 1, line["row"]
            bar.update()
            if written % CHUNK == 0 or source == "-":
                file.flush()
    left_out = f", the label left out of {abstained:,}" if abstain is not None else ""
    print(f"{written:,} predictions{left_out}", file=sys.stderr)
    _tell_left_out(models[0], written // len(models), told["truncated"], told["too_long"], told["empty"])


def predicted_lines(
    models: Sequence[TaskModel],
    names: Sequence[str],
    chunks: Iterable[Sequence[Row]],
    columns: Columns,
    samples: int = 0,
    calibrated: bool = False,
    abstain: float | None = None,
) -> Iterator[dict[str, Any]]:
    """What `predict` writes, chunk by chunk of the rows; `names` tell the models apart.

    A text that fits in no prompt, or is empty, has a line without a prediction: one of them does not stop the others.
    """
    number = 0
    for chunk in chunks:
        asked = _with_text(chunk, columns)
        by_model: list[dict[int, Prediction]] = []
        for own in models:
            ask = partial(own.predict, samples=samples, calibrated=calibrated)
            found, fitting = _of_fitting(ask, _questions(own, [chunk[place] for place in asked], columns))
            by_model.append(dict(zip((asked[at] for at in fitting), found or (), strict=True)))
        for place in range(len(chunk)):
            text = chunk[place].text(columns)
            for name, predicted in zip(names, by_model, strict=True):
                yield _line(number, name if len(names) > 1 else None, text, predicted.get(place), abstain)
            number += 1


def checked(row: Row, columns: Columns) -> Row:
    """The row. ValueError where it holds no text, or options that cannot serve: there, and not in its chunk."""
    row.text(columns)
    row.options()
    return row


def in_chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """CHUNK rows at a time: the same batches, and so the same samples, every time. An error comes behind its rows."""
    chunk: list[Row] = []
    problem = None
    while problem is None:
        try:
            chunk.append(next(rows))
        except StopIteration:
            break
        except ValueError as error:
            problem = error
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
    if problem is not None:
        raise problem


def as_they_come(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """What is there, up to CHUNK rows, without waiting for more: an answer to one line, full batches under pressure."""
    waiting: Queue[Row | Exception | None] = Queue(CHUNK)

    def read() -> None:
        try:
            for row in rows:
                waiting.put(row)
            waiting.put(None)
        except Exception as error:  # belongs to whoever asks for the rows
            waiting.put(error)

    Thread(target=read, daemon=True).start()
    chunk: list[Row] = []
    while True:
        item = waiting.get()
        if isinstance(item, Row):
            chunk.append(item)
        if chunk and (not isinstance(item, Row) or waiting.empty() or len(chunk) == CHUNK):
            yield chunk
            chunk = []
        if item is None:
            return
        if isinstance(item, Exception):
            raise item


def suggest(
    run: str | None,
    adapter: str | None,
    source: str,
    columns: Columns,
    count: int,
    samples: int,
    options: Sequence[str] | None,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Prints the rows most worth a label, the most uncertain first, as JSONL: by an adapter, or by theta itself.

    Of rows that ask the same the first; those that fit in no prompt, or have no text, are left out, and told. `row` is
    the place in this file, whatever a column of that name says.
    """
    rows = [checked(row, columns) for row in read_rows(source)]
    if not rows:
        raise ValueError(f"{source}: holds no rows; write one example a line")
    if run is not None:
        own = MetaModel.load(run, of_base(model, dtype), device).unadapted(options or ())
    else:
        own = load_task_models([str(adapter)], of_base(model, dtype), device)[0]
    asked = _with_text(rows, columns)
    questions = _questions(own, [rows[place] for place in asked], columns)
    chosen, fitting = _of_fitting(partial(own.suggest, count=count, samples=samples), questions)
    for place in (asked[fitting[at]] for at in chosen or ()):
        own_fields = {name: value for name, value in rows[place].fields.items() if name != "row"}
        print(_as_json({"row": place, **_no_nan(own_fields)}))
    _tell_left_out(own, len(rows), 0, len(asked) - len(fitting), len(rows) - len(asked))


def evaluate_adapter(
    adapter: str,
    source: str,
    output: str | None,
    columns: Columns,
    samples: int,
    calibrated: bool,
    diagram: str | None,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Prints all scores of a labelled file; writes them as JSON and draws a reliability diagram where asked to.

    In the JSON a score that is not a number is null. Rows that fit in no prompt are left out, and told.
    """
    for option, path in (("--output", output), ("--diagram", diagram)):
        if path and (problem := unwritable(Path(path), (source, adapter))):
            raise ValueError(f"{option}: {path}: {problem}")
    if diagram:
        _check_picture(diagram)
        if output and Path(output).resolve() == Path(diagram).resolve():
            raise ValueError(f"--diagram: {diagram}: is the --output, too; name another file")
    own = load_task_models([adapter], of_base(model, dtype), device)[0]
    examples = read_labelled(source, columns, own.options or ())
    found, fitting = _of_fitting(partial(own.predictions, samples=samples, calibrated=calibrated), examples)
    if found is None:
        raise ValueError(
            f"{source}: none of its {len(examples):,} texts fits in tasks.max_tokens: "
            f"{own.base.config.tasks.max_tokens}; shorten them, or adapt again with a larger one"
        )
    values = {**asdict(score(found)), **asdict(uncertainty(found))}
    if output:  # before they are printed: who reads that may have enough of it
        told = {name: None if not math.isfinite(value) else value for name, value in values.items()}
        write_whole(Path(output), json.dumps(told, indent=1, allow_nan=False))
    if diagram:
        _draw(found, own.name, diagram)
    print(
        "\n".join(f"{name:<26} {value:.4f}" if name != "n" else f"{name:<26} {value}" for name, value in values.items())
    )
    truncated = sum(own.truncated([examples[place] for place in fitting]))
    _tell_left_out(own, len(examples), truncated, len(examples) - len(fitting))


def _check_picture(path: str) -> None:
    """ValueError unless matplotlib is there and draws pictures of the file's ending."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--diagram: is drawn by matplotlib; run: pip install -e '.[report]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if Path(path).suffix.lower()[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--diagram: {path}: is no picture by its ending; name a .svg, .png or .pdf file")


def _draw(found: Predictions, name: str, path: str) -> None:
    """A reliability diagram; the file's ending says which kind of picture."""
    import matplotlib  # an optional package

    from abmll.compare.plots import reliability

    confidence, choice = (column.numpy() for column in found.options.max(dim=1))
    examples = {"label": name, "run": name, "confidence": confidence, "correct": choice == found.label.numpy()}
    with matplotlib.rc_context({"text.parse_math": False}):  # a task's name may hold dollar signs
        reliability(pd.DataFrame(examples)).savefig(path)


def _of_fitting(
    ask: Callable[[Sequence[Any]], Found], questions: Sequence[str | Example]
) -> tuple[Found | None, Sequence[int]]:
    """What `ask` says of the questions that fit in a prompt, None where there are none, and their places."""
    places = range(len(questions))
    if not questions:
        return None, places
    try:
        return ask(questions), places
    except TooLong as error:  # found out by asking, so that texts that fit are tokenised once
        left_out = set(error.places)
    fitting = [place for place in places if place not in left_out]
    return ask([questions[place] for place in fitting]) if fitting else None, fitting


def _with_text(rows: Sequence[Row], columns: Columns) -> list[int]:
    """The places of the rows that say anything: an empty cell asks nothing."""
    return [place for place, row in enumerate(rows) if row.text(columns).strip()]


def _questions(own: TaskModel, rows: Sequence[Row], columns: Columns) -> list[str | Example]:
    return [_question(own, row, columns) for row in rows]


def _question(own: TaskModel, row: Row, columns: Columns) -> str | Example:
    options = row.options()
    if own.options is not None:
        check_alike(options, own.options, row.where)
        return row.text(columns)
    if options is None:
        raise ValueError(f"{row.where}: task {own.name}: a row needs its own `options`, a list of strings")
    return Example(row.text(columns), options, options[0])


def _line(number: int, name: str | None, text: str, found: Prediction | None, abstain: float | None) -> dict[str, Any]:
    """`found` None: the text is empty, or fits in no prompt."""
    line: dict[str, Any] = {"row": number, **({"adapter": name} if name else {}), "text": text}
    if found is None:
        return {**line, "label": None, "too_long" if text.strip() else "empty": True}
    line.update(asdict(found))
    if abstain is not None:
        line["abstained"] = found.confidence < abstain
        line["label"] = None if line["abstained"] else found.label
    if not line["truncated"]:  # told where it is so
        del line["truncated"]
    return {key: value for key, value in line.items() if value is not None or key == "label"}


def _tell_left_out(own: TaskModel, texts: int, truncated: int, too_long: int, empty: int = 0) -> None:
    """So many of the texts, where there are any."""
    for count, told in ((truncated, told_truncated), (too_long, told_too_long)):
        if count:
            print(told(count, texts, own.base.config.tasks.max_tokens), file=sys.stderr)
    if empty:
        print(f"{empty:,} of {texts:,} texts are empty, and were left out", file=sys.stderr)


def _as_json(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


def _no_nan(value: Any) -> Any:
    """A user's row as JSON can hold it: Python reads NaN and Infinity, and few others do."""
    if isinstance(value, dict):
        return {name: _no_nan(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_no_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cannot_write_into(path: Path, read: Sequence[str]) -> str | None:
    """As `unwritable`; but what is there, a pipe or /dev/null too, is written into, whatever its folder is."""
    if not path.exists() or path.is_dir():
        return unwritable(path)
    if problem := is_read(path, read):
        return problem
    return None if os.access(path, os.W_OK) else "cannot be written; name another file"


def _output(path: str | None) -> AbstractContextManager[TextIO]:
    return nullcontext(sys.stdout) if path is None else open(path, "w", encoding="utf-8")
