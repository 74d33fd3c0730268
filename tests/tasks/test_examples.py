"""Prompts are made when they are used: which ones, how often, and that nothing depends on when."""

from collections import Counter
from random import Random

import pytest

from abmll.tasks.episodes import EpisodeSampler, PooledSampler, in_batches, support_examples
from abmll.tasks.examples import ScoredExamples, TrainingExamples
from abmll.tasks.prompt import Limits, Prompter
from abmll.tasks.task import Example, PromptedExample, Task

STEPS, BATCH = 3, 4


class Encoder:
    """Row i as the token i; `fits` says which rows do. Remembers every row that it was given."""

    def __init__(self, fits=lambda row: True):
        self.fits, self.seen = fits, []

    def __call__(self, rows):
        self.seen += rows
        return [PromptedExample((row,), 0, 2) if self.fits(row) else None for row in rows]


def numbers(examples):
    return [example.token_ids[0] for example in examples]


def rows(count, name="t"):
    return tuple(Example(f"{name} {number}", ("a", "b"), "ab"[number % 2]) for number in range(count))


@pytest.fixture
def counted(plain_tokenizer, monkeypatch):
    """A prompter, and the list of all texts that went through its tokenizer."""
    prompter, texts = Prompter(plain_tokenizer, 1024, "truncate"), []
    encode = prompter._encode
    monkeypatch.setattr(prompter, "_encode", lambda more: texts.extend(more) or encode(more))
    return prompter, texts


def test_a_start_looks_at_one_prompt_a_split(counted):
    prompter, texts = counted
    for name in ("one", "two"):
        prompter.prompt_task(Task(name, rows(5000), rows(50), rows(300)), Limits(train=4000))
    assert len(texts) == 2 * 3


@pytest.mark.parametrize("kind", [EpisodeSampler, PooledSampler])
@pytest.mark.parametrize("query", [False, True])
def test_an_episode_tokenises_its_own_examples_only(kind, query, counted):
    prompter, texts = counted
    tasks = [prompter.prompt_task(Task(name, rows(500, name), (), ())) for name in ("one", "two", "three")]
    sampler = kind(tasks, prompter.letter_ids, 0, STEPS, BATCH, query)
    for index in (0, 7):
        texts.clear()
        episode = sampler.episode(index)
        batches = (*episode.support, *([episode.query] if query else []))
        assert len(texts) == (STEPS + query) * BATCH
        used = [prompt for batch in batches for prompt in batch.input_ids.split(batch.prompts.sizes)]
        assert sorted(row.tolist() for row in used) == sorted(prompter.tokenizer(texts)["input_ids"])


def test_scores_tokenise_the_support_and_the_scored_split_once(counted):
    prompter, texts = counted
    task = prompter.prompt_task(Task("t", rows(500), rows(40), rows(90)), Limits(test=30))
    texts.clear()
    support_examples(task, STEPS * BATCH, 0)
    assert len(texts) == STEPS * BATCH
    for _ in range(3):
        assert sum(len(batch.label) for batch in in_batches(task.test, prompter.letter_ids, 16)) == 30
    assert len(texts) == STEPS * BATCH + 30


def test_a_run_s_start_and_steps_tokenise_what_they_use(build_tiny, monkeypatch):
    seen = []
    encode = Prompter.encode
    monkeypatch.setattr(Prompter, "encode", lambda self, rows: seen.extend(rows) or encode(self, rows))
    sizes = {"train_tasks": 4, "test_tasks": 2, "train_examples": 64, "test_examples": 32}
    tiny = build_tiny(tasks={"builtin": sizes})
    assert len(seen) == 4 * 2 + 2 * 3  # one of each split; training tasks have two
    seen.clear()
    tiny.episode(0)
    assert len(seen) == tiny.config.method.inner_steps * tiny.config.tasks.batch_size


def test_prompts_do_not_depend_on_what_they_are_made_with(smollm2_or_bytes):
    """Some too long, some much too long: alone, in an episode or in one go, in any order, a row has the same ids."""
    prompter = Prompter(smollm2_or_bytes, 200, "truncate")
    some = [Example("word " * (3 * number), ("a", "b" * (number % 7)), "a") for number in range(1, 60)]
    whole = prompter.encode(some)
    assert any(example.truncated for example in whole) and not all(example.truncated for example in whole)
    assert [prompter.encode([row])[0] for row in some] == whole
    task = prompter.prompt_task(Task("t", tuple(some), (), ()))
    assert task.train.take([40, 3, 40, 58]) == [whole[40], whole[3], whole[40], whole[58]]


@pytest.fixture(params=["plain_tokenizer", pytest.param("smollm2_tokenizer", marks=pytest.mark.demo)])
def smollm2_or_bytes(request):
    return request.getfixturevalue(request.param)


def test_places_hold_the_same_whatever_was_looked_at_before():
    def fits(row):
        return row % 3 == 0

    forward = TrainingExamples("t", range(60), Encoder(fits))
    held = [numbers(forward.take([place]))[0] for place in range(60)]
    assert numbers(TrainingExamples("t", range(60), Encoder(fits)).take(range(60))) == held
    order = Random(1).sample(range(60), 60)
    shuffled = TrainingExamples("t", range(60), Encoder(fits))
    assert numbers(shuffled.take(order)) == [held[place] for place in order]
    assert numbers(shuffled.take(range(60))) == held
    assert all(held[place] == place for place in range(0, 60, 3)), "a row that fits stays at its own place"
    assert all(row % 3 == 0 for row in held)
    assert numbers(TrainingExamples("other", range(60), Encoder(fits)).take(range(60))) != held


def test_rows_that_fit_stand_in_equally_often():
    """200 rows for 3,800 places: 19 each, with the spread of a multinomial draw."""
    held = numbers(TrainingExamples("t", range(4000), Encoder(lambda row: row >= 3800)).take(range(3800)))
    counts = Counter(held)
    assert sorted(counts) == list(range(3800, 4000))
    expected = 3800 / 200
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert abs(chi_squared - 199) < 5 * (2 * 199) ** 0.5  # mean and deviation of chi-squared with 199 degrees


def test_a_row_is_tokenised_once_at_most():
    encoder = Encoder(lambda row: row == 7)
    examples = TrainingExamples("t", range(50), encoder)
    assert numbers(examples.take(range(50))) == [7] * 50
    assert numbers(examples.take([3, 7])) == [7, 7]
    assert sorted(encoder.seen) == list(range(50))


def test_no_row_that_fits_is_an_error():
    with pytest.raises(ValueError, match=r"task t: none of its 9 training prompts fits; raise tasks\.max_tokens"):
        TrainingExamples("t", range(9), Encoder(lambda row: False)).take([4])


def test_the_last_row_may_be_the_one_that_fits(plain_tokenizer):
    """Else a task whose first rows are long would be refused."""
    prompter = Prompter(plain_tokenizer, 180, "drop")
    long = Example("x" * 400, ("a", "b"), "a")
    task = prompter.prompt_task(Task("t", (long,) * 20 + rows(1), (), (long,) * 4 + rows(2)))
    assert task.train.take([0, 20, 5]) == prompter.encode(rows(1)) * 3
    assert list(task.test) == prompter.encode(rows(2))


def test_scored_examples_are_those_that_fit_each_once():
    encoder = Encoder(lambda row: row % 2)
    examples = ScoredExamples(range(10), encoder)
    assert examples.num_rows == 10 and not encoder.seen
    assert numbers(examples[:3]) == [1, 3, 5]
    assert (len(examples), numbers(examples)) == (5, [1, 3, 5, 7, 9])
    assert encoder.seen == list(range(10))
