"""Files of examples: whatever they hold, the good rows are read and the others told, in lines of bounded length."""

from __future__ import annotations

import json

import pytest
from damage import damaged, fuzz, values
from hypothesis import example, given
from hypothesis import strategies as st

from abmll.tasks.checks import Faults
from abmll.tasks.jsonl import load_jsonl_tasks, read_examples
from abmll.tasks.task import Example

ROW = {"task": "t", "input": "Who? – é 🙂", "output": "no", "options": ["yes", "no"]}
FILE = "".join(json.dumps({**ROW, "input": f"{n}"}, ensure_ascii=n % 2 == 0) + "\n" for n in range(4)).encode()


def rows(draw_from: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    fields = {key: st.just(value) | draw_from for key, value in ROW.items()}
    lines = st.fixed_dictionaries(fields) | st.dictionaries(st.sampled_from(sorted(ROW)), draw_from) | draw_from
    return st.lists(lines.map(json.dumps), max_size=5).map(lambda found: "\n".join(found).encode())


@fuzz
@given(st.binary(max_size=300) | damaged(FILE) | rows(values))
@example(b'{"input": "a", "output": ' + b"[" * 100_000)
@example(b'{"input": "a", "output": "no", "options": ' + b"9" * 5000 + b"}")
@example(b'{"input": "\\uD83D", "output": "no", "options": ["yes", "no"]}')  # an upper-case escape
@example(b'{"input": 1, "output": ' + b"[" * 400 + b"]" * 400 + b', "options": []}')
@example(json.dumps({**ROW, "output": "x" * 10**6}).encode())
@example(json.dumps({**ROW, "options": ["x" * 10**6, "x" * 10**6]}).encode())
def test_whatever_a_file_holds_is_read_or_told(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tasks")
    path = folder / "t/train.jsonl"
    path.parent.mkdir()
    path.write_bytes(data)
    faults = Faults("here", "files")
    found = read_examples(path, faults)
    for one in found:
        assert type(one) is Example and one.output in one.options and 2 <= len(set(one.options)) <= 26
        "".join((one.input, *one.options)).encode()  # a tokenizer can read it
    try:
        tasks = load_jsonl_tasks(folder, ["t"], scored=()).tasks
        assert tasks["t"].train == found and found
    except ValueError as error:
        assert str(error).startswith((str(folder), "tasks.folder")) and len(str(error)) < 30_000


def test_half_a_surrogate_pair_is_refused_however_it_is_spelled(tmp_path):
    """Found by the property above: upper-case escapes passed, and a tokenizer raised in the middle of a run."""
    path = tmp_path / "train.jsonl"
    for escape in ("\\ud83d", "\\uD83D", "\\uDe00"):
        path.write_text(f'{{"input": "{escape}", "output": "no", "options": ["yes", "no"]}}\n')
        faults = Faults("here", "files")
        assert read_examples(path, faults) == ()
        with pytest.raises(ValueError, match="half a surrogate pair"):
            faults.check()
    path.write_text('{"input": "\\uD83D\\uDE00", "output": "no", "options": ["yes", "no"]}\n')
    (found,) = read_examples(path, Faults("here", "files"))
    assert found.input == "\U0001f600"
