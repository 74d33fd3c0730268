"""Data that would fake a score is told of before a run."""

from __future__ import annotations

from abmll.tasks.doubts import FEWEST, doubts
from abmll.tasks.task import Example, Task


def questions(count, place=None, start=0):
    """Questions with options of their own, and the answer at one place, or at each in turn."""
    found = []
    for number in range(start, start + count):
        options = (f"a{number}", f"b{number}")
        found.append(Example(f"question {number}", options, options[number % 2 if place is None else place]))
    return tuple(found)


def test_test_rows_that_are_training_rows():
    train = questions(6)
    assert list(doubts(Task("sound", train, (), questions(4, start=6)))) == []
    (line,) = doubts(Task("leaky", train, (), (*train[:2], *questions(3, start=6))))
    assert line == "leaky: 2 of 5 test rows are training rows too; leave them out of one"
    (line,) = doubts(Task("turned", train, (), (Example(train[0].input, train[0].options[::-1], train[0].output),)))
    assert line.startswith("turned: 1 of 1 test rows are training rows too"), "in another order they are the same"
    other = Example(train[0].input, ("yes", "no"), "no")  # the same text under other options is another question
    assert list(doubts(Task("sound", train, (), (other,)))) == []


def test_answers_that_stand_at_one_place():
    (line,) = doubts(Task("sorted", questions(FEWEST, place=1), (), questions(3, start=100)))
    assert line.startswith(f"sorted: all {FEWEST} train rows have their answer at place 2 of their own options")
    assert list(doubts(Task("few", questions(FEWEST - 1, place=0), (), ()))) == []


def test_training_rows_of_one_answer():
    same = tuple(Example(f"text {number}", ("yes", "no"), "yes") for number in range(20))
    (line,) = doubts(Task("one class", same, (), ()))
    assert line == "one class: all 20 train rows have one answer, 'yes'; add others"
    assert list(doubts(Task("of the test alone", questions(9, place=0)[:2], (), same))) == []
