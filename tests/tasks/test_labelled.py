"""A user's files of texts and labels: JSONL and CSV, good and bad."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abmll.tasks.checks import LETTERS
from abmll.tasks.labelled import Columns, contradictions, draw, read_labelled, read_rows, task_files
from abmll.tasks.task import Example


def write(path, contents):
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def test_jsonl_of_texts_and_labels(tmp_path):
    rows = [{"text": "a\nb", "label": "yes"}, {"text": "c", "label": "no"}, {"text": "?", "label": "yes"}]
    found = read_labelled(write(tmp_path / "t.jsonl", "\ufeff" + lines(*rows) + "\n\n"))
    assert found == [Example(row["text"], ("no", "yes"), row["label"]) for row in rows]


def test_csv_and_tsv_with_named_columns(tmp_path):
    expected = [Example('say "a, b"\nand c', ("0", "1"), "1"), Example("d", ("0", "1"), "0")]
    columns = Columns("review", "stars")
    csv = write(tmp_path / "t.csv", 'stars,review\r\n1,"say ""a, b""\nand c"\r\n0,d\r\n')
    assert read_labelled(csv, columns) == expected
    tsv = write(tmp_path / "t.tsv", 'stars\treview\n1\t"say ""a, b""\nand c"\n0\td\n')
    assert read_labelled(tsv, columns) == expected


def test_rows_of_the_task_files_keep_their_options(tmp_path):
    rows = [{"input": "q", "output": "x", "options": ["x", "y"]}, {"input": "r", "output": "v", "options": ["w", "v"]}]
    assert read_labelled(write(tmp_path / "t.jsonl", lines(*rows))) == [
        Example("q", ("x", "y"), "x"),
        Example("r", ("w", "v"), "v"),
    ]


def test_numbers_and_truth_values_are_labels(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": True}, {"text": "c", "label": 2.5}]
    assert read_labelled(write(tmp_path / "t.jsonl", lines(*rows)))[0].options == ("1", "2.5", "true")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("t.jsonl", "", "holds no rows"),
        ("t.jsonl", "{", r"t.jsonl:1: malformed JSON: .*'\{'"),
        ("t.jsonl", "[" * 100_000, "t.jsonl:1: malformed JSON"),
        ("t.jsonl", "[1]", "t.jsonl:1: a list, not an object"),
        (
            "t.jsonl",
            '{"sentence": "a", "label": "b"}',
            "no column text or input; it has 'sentence', 'label': .* --text",
        ),
        ("t.jsonl", '{"text": "a"}', "no column label or output; .* --label"),
        ("t.jsonl", '{"text": 3, "label": "b"}', "the text is 3, a int: it must be a string"),
        ("t.jsonl", '{"text": "a", "label": null}', "the label is None"),
        ("t.jsonl", '{"text": "a", "label": NaN}', "the label is nan: it must be a text or a finite number; remove"),
        ("t.jsonl", '{"text": "a", "label": -Infinity}', "the label is -inf"),
        ("t.jsonl", '{"text": "a", "label": 1e999}', "the label is inf"),
        ("t.jsonl", '{"text": "a", "label": " "}', "the label is ' '"),
        ("t.jsonl", '{"text": "a", "label": ["b"]}', r"the label is \['b'\]"),
        ("t.jsonl", '{"text": "a\\ud800", "label": "b"}', "half a surrogate pair"),
        ("t.jsonl", lines({"text": "a", "label": "b"}), "every label is 'b'"),
        ("t.jsonl", lines(*({"text": "a", "label": n} for n in range(27))), "27 different labels"),
        ("t.jsonl", '{"text": "a", "label": "b", "options": ["b", "b"]}', "listed twice"),
        ("t.jsonl", '{"text": "a", "label": "b", "options": ["c", "d"]}', "output 'b' is not among"),
        ("t.jsonl", b"\xff\xfe{}", "0xff is not UTF-8"),
        ("t.csv", "text,label\na,b,c\n", "2 columns in the header, another number"),
        ("t.csv", "text,label\na\n", "2 columns in the header, another number"),
        ("t.csv", 'text,label\n"a', "malformed CSV"),
        ("t.csv", "a,b\n1,2\n", "no column text or input"),
        ("t.csv", "label,text,label\n1,a,2\n", r"t\.csv:1: column 'label' occurs 2 times: rename or remove one"),
        ("t.tsv", 'text\tlabel\na\t0\n"b"\' c\t1\n', r"t\.tsv:3: malformed CSV: .* those in it are doubled"),
        (
            "t.csv",
            "text,label,options\na,b,\"['a', 'b']\"\n",
            "t.csv:2: `options` is text, .*: write a JSON list, in a",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": "b", "options": "[1]"}',
            "t.jsonl:1: `options` is text, '.1.': write a JSON",
        ),
        ("t.jsonl", '{"text": "a", "label": "b", "options": {"b": 1}}', "`options` is a dict, .* rename the column"),
        (
            "t.jsonl",
            '{"text": "a", "label": "caf\\u00e9", "options": ["tea", "cafe\\u0301"]}',
            r"t.jsonl:1: output 'caf\\xe9' and option 'cafe\\u0301' differ in Unicode form alone: write one of them",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, contents, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(write(tmp_path / name, contents))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (
            ("Bad", "bad"),
            r"labels 'Bad' and 'bad' differ in case or spaces alone: write one of them throughout, or rena",
        ),
        (("bad", "bad "), "'bad' and 'bad ' differ in case or spaces"),
        (("\u00a0bad", "bad"), r"'bad' and '\\xa0bad' differ in case or spaces"),
        (("stra\u00dfe", "STRASSE"), "'STRASSE' and 'straße' differ in case or spaces"),
        (("caf\u00e9", "cafe\u0301"), r"'cafe\\u0301' and 'caf\\xe9' differ in Unicode form alone"),
        (("Caf\u00e9", "cafe\u0301 "), "differ in case or spaces"),
        ((1, 1.0), "labels '1' and '1.0' are one number: write one of them throughout, or rename one"),
        ((1000, 1e3, "x"), "labels '1000' and '1000.0' are one number"),
    ],
)
def test_one_label_in_two_spellings_is_refused(tmp_path, labels, told):
    """And not an option of its own."""
    path = write(tmp_path / "t.jsonl", lines(*({"text": "a", "label": label} for label in (*labels, "good"))))
    with pytest.raises(ValueError, match=rf"t\.jsonl: labels .*{told.removeprefix('labels ')}"):
        read_labelled(path)


@pytest.mark.parametrize(
    "labels", [("not bad", "bad", "b\u00e4d"), (1, 2, "01"), (10**20, 10**20 + 1, "inf", "infinity")]
)
def test_labels_that_differ_otherwise_are_several(tmp_path, labels):
    path = write(tmp_path / "t.jsonl", lines(*({"text": "a", "label": label} for label in labels)))
    assert len(read_labelled(path)[0].options) == len(labels)


def test_a_quote_that_swallows_rows_is_refused(tmp_path):
    """An own quote at a text's start took the rows up to the next one for its text."""
    rows = ["1\tfine", '0\t"Great" it is not', "1\tso so"]
    path = write(tmp_path / "t.tsv", "\n".join(["label\ttext", '0\t"What', *rows[:1], '1\tsaid "no"', '0\tx"', ""]))
    with pytest.raises(ValueError, match=r"t\.tsv:2: malformed CSV: .* or save as JSONL"):
        read_labelled(path)
    path = write(tmp_path / "t.tsv", "\n".join(["label\ttext", *rows[:1], '0\t"What', *rows[::2], '0\tthe end"', ""]))
    with pytest.raises(ValueError, match=r"t\.tsv:3: a quote opens a field that spans rows, up to line 6: 'What"):
        read_labelled(path)


def test_columns_without_a_name_may_be_several(tmp_path):
    path = write(tmp_path / "t.csv", "text,label,,\na,0,,\n\nb,1,,\n")
    assert [example.input for example in read_labelled(path)] == ["a", "b"]


def test_all_rows_have_options_of_their_own_or_none(tmp_path):
    rows = [{"text": "q", "label": "x", "options": ["x", "y"]}, {"text": "r", "label": "y", "options": None}]
    with pytest.raises(ValueError, match=r"t\.jsonl:2: has no `options`, and \S*t\.jsonl:1 has: give all rows some"):
        read_labelled(write(tmp_path / "t.jsonl", lines(*rows)))
    csv = write(tmp_path / "t.csv", "text,label,options\na,0,\nb,1,\n")  # as pandas writes a column of None
    assert read_labelled(csv)[0].options == ("0", "1")


def test_questions_with_several_answers_are_counted():
    one, other = Example("q", ("x", "y"), "x"), Example("q", ("y", "x"), "y")
    assert contradictions([one, other, one]) == 1
    assert contradictions([one, one, Example("r", ("x", "y"), "y"), Example("q", ("x", "z"), "z")]) == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: No such file"):
        read_labelled(tmp_path / "none.jsonl")


def test_all_bad_rows_are_told_at_once(tmp_path):
    path = write(tmp_path / "t.jsonl", lines(*({"text": n, "label": "b"} for n in range(50))))
    with pytest.raises(ValueError, match="50 faults in 50 rows") as error:
        read_labelled(path)
    assert "t.jsonl:1:" in str(error.value) and "30 more" in str(error.value)


def test_standard_input_is_read_as_it_comes(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "a"}\n{"text": "b"}\n{'))
    rows = read_rows("-")
    assert [next(rows).text(Columns()) for _ in range(2)] == ["a", "b"]
    with pytest.raises(ValueError, match="standard input:3: malformed JSON"):
        next(rows)


def test_bytes_of_standard_input(monkeypatch):
    """A mark at the start is none of the text, as in a file; rows before a byte that is not UTF-8 are read."""
    sent = b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b\xc3\xa9"}\n{"text": "\xe9"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sent), encoding="ascii", errors="surrogateescape"))
    rows = read_rows("-")
    assert [next(rows).text(Columns()) for _ in range(2)] == ["a", "bé"]
    with pytest.raises(ValueError, match=r"^standard input:3: byte 0xe9 is not UTF-8: "):
        next(rows)


def test_examples_are_drawn_by_the_seed():
    examples = [Example(str(number), ("a", "b"), "a") for number in range(600)]
    some = draw(examples, 20, 3, "t")
    assert len(some) == 20 and some == draw(examples, 20, 3, "t") != draw(examples, 20, 4, "t")
    assert some == sorted(some, key=lambda example: int(example.input)), "in the file's order"
    assert draw(examples[:9], 20, 3, "t") == examples[:9]
    rare = [Example(str(number), ("a", "b"), "b" if number in (7, 300, 500) else "a") for number in range(600)]
    assert sum(example.output == "b" for example in draw(rare, 6, 3, "t")) == 1, "one at least, and no more than it is"
    even = [Example(str(number), ("a", "b"), "ab"[number % 4 == 0]) for number in range(2000)]
    assert 0.15 < sum(example.output == "b" for example in draw(even, 200, 3, "t")) / 200 < 0.35  # 1/4 +- 3.3 sd
    with pytest.raises(ValueError, match=r"t: 600 examples: .* --examples 100"):
        draw(examples, None, 3, "t")
    with pytest.raises(ValueError, match="t: 3 examples: an adaptation takes 4 to 500"):
        draw(examples[:3], None, 3, "t")
    with pytest.raises(ValueError, match=r"^--examples: 2: an adaptation takes 4 to 500; raise it"):
        draw(examples, 2, 3, "t")
    five = [Example(str(number), tuple("abcde"), "abcde"[number % 5]) for number in range(20)]
    assert {example.output for example in draw(five, 5, 3, "t")} == set("abcde")
    with pytest.raises(ValueError, match="--examples: 4: fewer than there are labels, 5; raise it"):
        draw(five, 4, 3, "t")
    own = [Example(str(number), (f"a{number}", f"b{number}"), f"a{number}") for number in range(20)]
    assert len(draw(own, 4, 3, "t")) == 4
    with pytest.raises(ValueError, match=r"t: 3 examples: .*; add some"):
        draw(examples[:3], 9, 3, "t")


def test_a_folder_of_tasks(tmp_path):
    for name in ("a.jsonl", "b.csv", "c/train.jsonl", "c/test.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert {name: path.name for name, path in task_files(tmp_path).items()} == {
        "a": "a.jsonl",
        "b": "b.csv",
        "c": "train.jsonl",
    }
    with pytest.raises(ValueError, match="holds no tasks"):
        task_files(tmp_path / "c/nothing")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="are both task a"):
        task_files(tmp_path)


def test_options_that_are_told(tmp_path):
    rows = [{"input": "q", "output": "y", "options": ["z", "y"]}, {"text": "r", "label": "y"}]
    path = write(tmp_path / "t.jsonl", lines(*rows))
    with pytest.raises(ValueError, match=r"t\.jsonl:1: `options` \['z', 'y'\]: the task has \['x', 'y'\] for all its"):
        read_labelled(path, options=("x", "y"))
    assert read_labelled(path, options=("y", "z")) == [Example("q", ("y", "z"), "y"), Example("r", ("y", "z"), "y")]
    with pytest.raises(ValueError, match=r"t\.jsonl:2: needs its own `options`"):
        read_labelled(path, options=())


ROW = st.dictionaries(
    st.sampled_from(["text", "label", "options", "input", "output", "x"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=4,
)
CONTENTS = st.one_of(
    st.binary(),
    st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(ROW, max_size=4).map(lambda rows: lines(*rows).encode()),
    st.lists(st.lists(st.text(), max_size=3), max_size=4).map(
        lambda rows: ("text,label\n" + "\n".join(",".join(row) for row in rows)).encode("utf-8", "surrogatepass")
    ),
)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
@settings(max_examples=200, deadline=None)
@given(contents=CONTENTS)
def test_any_file_gives_examples_or_a_value_error(tmp_path_factory, ending, contents):
    path = write(tmp_path_factory.getbasetemp() / f"any.{ending}", contents)
    try:
        found = read_labelled(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    for example in found:
        assert 2 <= len(example.options) <= len(LETTERS) and example.output in example.options
        (example.input + "".join(example.options)).encode()
