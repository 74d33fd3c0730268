"""The commands `launch/predict.py`, `launch/suggest.py` and `launch/evaluate.py --adapter`: adapters in use."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, TextIO

import pandas as pd
from tqdm import tqdm

from abmll.deploy.meta_model import MetaModel
from abmll.deploy.task_model import Prediction, TaskModel, load_task_models, moved_to
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
    device: str | None = None,
) -> None:
    """A JSONL line for every row and adapter, written as they come. ValueErrors for a user's mistakes.

    `abstain`: of a prediction that is less sure than this the label is left out.
    """
    models = load_task_models(adapters, moved_to(model), device)
    chunks = as_they_come(read_rows(source)) if source == "-" else in_chunks(read_rows(source))
    written = abstained = 0
    with _written_to(output) as file, tqdm(unit="line", file=sys.stderr, leave=False, disable=None) as bar:
        for line in predicted_lines(models, chunks, columns, samples, calibrated, abstain):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written, abstained = written + 1, abstained + line.get("abstained", False)
            bar.update()
            if written % CHUNK == 0 or source == "-":
                file.flush()
    left_out = f", the label left out of {abstained:,}" if abstain is not None else ""
    print(f"{written:,} predictions{left_out}", file=sys.stderr)


def predicted_lines(
    models: Sequence[TaskModel],
    chunks: Iterable[Sequence[Row]],
    columns: Columns,
    samples: int = 0,
    calibrated: bool = False,
    abstain: float | None = None,
) -> Iterator[dict[str, Any]]:
    """What `predict` writes, chunk by chunk of the rows."""
    number = 0
    for chunk in chunks:
        by_model = [own.predict(_questions(own, chunk, columns), samples, calibrated) for own in models]
        for place in range(len(chunk)):
            for own, found in zip(models, by_model, strict=True):
                yield _line(number, own, chunk[place].text(columns), found[place], abstain, len(models) > 1)
            number += 1


def in_chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """CHUNK rows at a time: the same batches, and so the same samples, every time."""
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


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
    device: str | None = None,
) -> None:
    """Prints the rows most worth a label, the most uncertain first, as JSONL: by an adapter, or by theta itself."""
    rows = list(read_rows(source))
    if run is not None:
        own = MetaModel.load(run, moved_to(model), device).unadapted(options or ())
    else:
        own = load_task_models([str(adapter)], moved_to(model), device)[0]
    for place in own.suggest(_questions(own, rows, columns), count, samples):
        print(json.dumps({"row": place, **rows[place].fields}, ensure_ascii=False))


def evaluate_adapter(
    adapter: str,
    source: str,
    output: str | None,
    columns: Columns,
    samples: int,
    calibrated: bool,
    diagram: str | None,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Prints all scores of a labelled file; writes them as JSON and draws a reliability diagram where asked to."""
    examples = read_labelled(source, columns)
    own = load_task_models([adapter], moved_to(model), device)[0]
    if own.options is not None:
        examples = [_with_options(example, own, source) for example in examples]
    found = own.predictions(examples, samples, calibrated)
    values = {**asdict(score(found)), **asdict(uncertainty(found))}
    print(
        "\n".join(f"{name:<26} {value:.4f}" if name != "n" else f"{name:<26} {value}" for name, value in values.items())
    )
    if output:
        Path(output).write_text(json.dumps(values, indent=1))
    if diagram:
        _draw(found, own.name, diagram)


def _draw(found: Predictions, name: str, path: str) -> None:
    """A reliability diagram; the file's ending says which kind of picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--diagram: is drawn by matplotlib; run: pip install -e '.[report]'")
    from abmll.compare.plots import reliability

    confidence, choice = (column.numpy() for column in found.options.max(dim=1))
    examples = {"label": name, "confidence": confidence, "correct": choice == found.label.numpy()}
    reliability(pd.DataFrame(examples)).savefig(path)


def _with_options(example: Example, own: TaskModel, source: str) -> Example:
    """The same question with the adapter's options in their order, which need not all occur in a file."""
    if example.output not in own.options:
        raise ValueError(
            f"{source}: label {example.output!r} is not among the adapter's options {list(own.options)}: name the "
            "column that holds them with --label"
        )
    return Example(example.input, own.options, example.output)


def _questions(own: TaskModel, rows: Sequence[Row], columns: Columns) -> list[str | Example]:
    return [_question(own, row, columns) for row in rows]


def _question(own: TaskModel, row: Row, columns: Columns) -> str | Example:
    if own.options is not None:
        return row.text(columns)
    options = row.options()
    if options is None:
        raise ValueError(f"{row.where}: task {own.name}: a row needs its own `options`, a list of strings")
    return Example(row.text(columns), options, options[0])


def _line(
    number: int, own: TaskModel, text: str, found: Prediction, abstain: float | None, named: bool
) -> dict[str, Any]:
    line: dict[str, Any] = {"row": number, **({"adapter": own.name} if named else {}), "text": text, **asdict(found)}
    if abstain is not None:
        line["abstained"] = found.confidence < abstain
        line["label"] = None if line["abstained"] else found.label
    return {key: value for key, value in line.items() if value is not None or key == "label"}


class _written_to:
    """A file that is written line by line, or standard output."""

    def __init__(self, path: str | None):
        self._path = path

    def __enter__(self) -> TextIO:
        self._file = sys.stdout if self._path is None else open(self._path, "w", encoding="utf-8")
        return self._file

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()
