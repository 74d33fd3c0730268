"""The commands `launch/predict.py`, `launch/suggest.py` and `launch/evaluate.py --adapter`: adapters in use."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, TextIO

import pandas as pd
from tqdm import tqdm

from abmll.deploy.meta_model import MetaModel
from abmll.deploy.task_model import Prediction, TaskModel, load_task_models, of_base
from abmll.deploy.truncation import told_truncated
from abmll.files import unwritable, write_whole
from abmll.metrics import Predictions, score
from abmll.tasks.labelled import Columns, Row, read_labelled, read_rows
from abmll.tasks.task import Example
from abmll.uncertainty import uncertainty

CHUNK = 256  # rows read, predicted and written at a time: their prompts go by length through one batch after another


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
    both = [Path(name) for name in (source, output) if name is not None]
    if len(both) == 2 and all(path.exists() for path in both) and both[0].samefile(both[1]):
        raise ValueError(f"--output: {output}: is the input; name another file")
    models = load_task_models(adapters, of_base(model, dtype), device)
    names = [own.name for own in models]
    if len(set(names)) < len(names):
        names = list(adapters)
    rows = (checked(row, columns) for row in read_rows(source))
    chunks = as_they_come(rows) if source == "-" else in_chunks(rows)
    first = next(chunks, None)  # a file that cannot be read costs no output
    chunks = chunks if first is None else chain([first], chunks)
    written = abstained = 0
    cut, last_cut = 0, None
    with _output(output) as file, tqdm(unit="line", file=sys.stderr, leave=False, disable=None) as bar:
        for line in predicted_lines(models, names, chunks, columns, samples, calibrated, abstain):
            file.write(_as_json(line) + "\n")
            written, abstained = written + 1, abstained + line.get("abstained", False)
            if line.get("truncated") and line["row"] != last_cut:  # by several adapters it is one text
                cut, last_cut = cut + 1, line["row"]
            bar.update()
            if written % CHUNK == 0 or source == "-":
                file.flush()
    left_out = f", the label left out of {abstained:,}" if abstain is not None else ""
    print(f"{written:,} predictions{left_out}", file=sys.stderr)
    if cut:
        _tell_truncated(models[0], cut, written // len(models))


def predicted_lines(
    models: Sequence[TaskModel],
    names: Sequence[str],
    chunks: Iterable[Sequence[Row]],
    columns: Columns,
    samples: int = 0,
    calibrated: bool = False,
    abstain: float | None = None,
) -> Iterator[dict[str, Any]]:
    """What `predict` writes, chunk by chunk of the rows; `names` tell the models apart."""
    number = 0
    for chunk in chunks:
        by_model = [own.predict(_questions(own, chunk, columns), samples, calibrated) for own in models]
        for place in range(len(chunk)):
            text = chunk[place].text(columns)
            for name, found in zip(names, by_model, strict=True):
                yield _line(number, name if len(names) > 1 else None, text, found[place], abstain)
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
    """Prints the rows most worth a label, the most uncertain first, as JSONL: by an adapter, or by theta itself."""
    rows = list(read_rows(source))
    if run is not None:
        own = MetaModel.load(run, of_base(model, dtype), device).unadapted(options or ())
    else:
        own = load_task_models([str(adapter)], of_base(model, dtype), device)[0]
    for place in own.suggest(_questions(own, rows, columns), count, samples):
        print(_as_json({"row": place, **_no_nan(rows[place].fields)}))


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

    In the JSON a score that is not a number is null.
    """
    for option, path in (("--output", output), ("--diagram", diagram)):
        if path and (problem := unwritable(Path(path))):
            raise ValueError(f"{option}: {path}: {problem}")
    own = load_task_models([adapter], of_base(model, dtype), device)[0]
    examples = read_labelled(source, columns, own.options or ())
    found = own.predictions(examples, samples, calibrated)
    values = {**asdict(score(found)), **asdict(uncertainty(found))}
    print(
        "\n".join(f"{name:<26} {value:.4f}" if name != "n" else f"{name:<26} {value}" for name, value in values.items())
    )
    if truncated := sum(own.truncated(examples)):
        _tell_truncated(own, truncated, len(examples))
    if output:
        told = {name: None if not math.isfinite(value) else value for name, value in values.items()}
        write_whole(Path(output), json.dumps(told, indent=1, allow_nan=False))
    if diagram:
        _draw(found, own.name, diagram)


def _draw(found: Predictions, name: str, path: str) -> None:
    """A reliability diagram; the file's ending says which kind of picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--diagram: is drawn by matplotlib; run: pip install -e '.[report]'")
    from abmll.compare.plots import reliability

    confidence, choice = (column.numpy() for column in found.options.max(dim=1))
    examples = {"label": name, "run": name, "confidence": confidence, "correct": choice == found.label.numpy()}
    reliability(pd.DataFrame(examples)).savefig(path)


def _questions(own: TaskModel, rows: Sequence[Row], columns: Columns) -> list[str | Example]:
    return [_question(own, row, columns) for row in rows]


def _question(own: TaskModel, row: Row, columns: Columns) -> str | Example:
    if own.options is not None:
        return row.text(columns)
    options = row.options()
    if options is None:
        raise ValueError(f"{row.where}: task {own.name}: a row needs its own `options`, a list of strings")
    return Example(row.text(columns), options, options[0])


def _line(number: int, name: str | None, text: str, found: Prediction, abstain: float | None) -> dict[str, Any]:
    line: dict[str, Any] = {"row": number, **({"adapter": name} if name else {}), "text": text, **asdict(found)}
    if abstain is not None:
        line["abstained"] = found.confidence < abstain
        line["label"] = None if line["abstained"] else found.label
    if not line["truncated"]:  # told where it is so
        del line["truncated"]
    return {key: value for key, value in line.items() if value is not None or key == "label"}


def _tell_truncated(own: TaskModel, count: int, texts: int) -> None:
    print(told_truncated(count, texts, own.base.config.tasks.max_tokens), file=sys.stderr)


def _as_json(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


def _no_nan(value: Any) -> Any:
    """A user's row as JSON can hold it: Python reads NaN and Infinity, and few others do."""
    if isinstance(value, dict):
        return {name: _no_nan(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_no_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _output(path: str | None) -> AbstractContextManager[TextIO]:
    return nullcontext(sys.stdout) if path is None else open(path, "w", encoding="utf-8")
