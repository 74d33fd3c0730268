"""Episodes are a function of (seed, index) and go through all data before any comes back."""

import subprocess
import sys
from collections import Counter

import pytest
import torch

from abmll.tasks.episodes import EpisodeSampler, PooledSampler, by_length, in_batches, support_examples
from abmll.tasks.examples import PromptedTask, ScoredExamples, TrainingExamples
from abmll.tasks.shuffle import EndlessShuffle
from abmll.tasks.task import PromptedExample

LETTER_IDS = tuple(range(100, 126))


def numbered_task(name, size, first=0):
    """Example number i holds the tokens 1 and `first` + i."""
    rows = [PromptedExample((1, first + i), i % 2, 2) for i in range(size)]
    return PromptedTask(name, TrainingExamples(name, rows, list), ScoredExamples((), list), ScoredExamples((), list))


def numbers(batches):
    return torch.cat([batch.input_ids[batch.answer_position] for batch in batches]).tolist()


def content(episode):
    batches = (*episode.support, *([episode.query] if episode.query else []))
    return episode.index, episode.epoch, episode.task, [batch.input_ids.tolist() for batch in batches]


def make(kind=EpisodeSampler, seed=0, query=False, sizes=(30, 7, 40, 10), steps=3, batch_size=2):
    tasks = [numbered_task(f"task{i}", size, 1000 * i) for i, size in enumerate(sizes)]
    return kind(tasks, LETTER_IDS, seed, steps, batch_size, query)


@pytest.mark.parametrize("kind", [EpisodeSampler, PooledSampler])
@pytest.mark.parametrize("query", [False, True])
def test_episode_depends_on_its_index_only(kind, query):
    forward = [content(make(kind, query=query).episode(index)) for index in range(60)]
    sampler = make(kind, query=query)
    backward = [content(sampler.episode(index)) for index in reversed(range(60))]
    assert forward == backward[::-1]
    assert content(sampler.episode(17)) == forward[17]
    # two ranks, each asking for its own share, see together what one rank sees
    ranks = [make(kind, query=query), make(kind, query=query)]
    assert [content(ranks[index % 2].episode(index)) for index in range(60)] == forward


@pytest.mark.parametrize("kind", [EpisodeSampler, PooledSampler])
@pytest.mark.parametrize("query", [False, True])
def test_what_is_known_of_an_episode_without_its_batches(kind, query):
    lengths = (3, 9, 5, 2, 7)
    rows = [PromptedExample((1,) * length, 0, 2) for length in lengths]
    tasks = [
        PromptedTask(name, TrainingExamples(name, rows, list), ScoredExamples((), list), ScoredExamples((), list))
        for name in ("one", "two")
    ]
    sampler, seen = kind(tasks, LETTER_IDS, 0, 2, 2, query), set()
    for index in range(8):
        episode = sampler.episode(index)
        assert (sampler.num_tokens(index), sampler.task(index)) == (episode.num_tokens, episode.task)
        seen.add(episode.num_tokens)
    assert len(seen) > 1


@pytest.mark.parametrize("kind", [EpisodeSampler, PooledSampler])
def test_shapes_and_fields(kind):
    episode = make(kind, query=True).episode(9)
    assert (episode.index, episode.epoch) == (9, 2)
    assert [len(batch.label) for batch in episode.support] == [2, 2, 2]
    assert len(episode.query.label) == 2
    assert make(kind).episode(9).query is None
    assert make(kind).episodes_per_epoch == 4
    assert (make(kind).examples_per_visit, make(kind, query=True).examples_per_visit) == (6, 8)


def test_every_epoch_visits_each_task_once_in_its_own_order():
    sampler = make()
    epochs = [tuple(sampler.episode(4 * epoch + i).task for i in range(4)) for epoch in range(20)]
    assert all(sorted(epoch) == ["task0", "task1", "task2", "task3"] for epoch in epochs)
    assert len(set(epochs)) > 5


def drawn(sampler, name, episodes):
    visits = [sampler.episode(index) for index in range(episodes)]
    return [number for visit in visits if visit.task == name for number in numbers((*visit.support, visit.query)[:4])]


def test_no_example_comes_back_before_all_were_seen():
    sampler = make(query=True)
    for name, size, first in (("task0", 30, 0), ("task1", 7, 1000), ("task2", 40, 2000), ("task3", 10, 3000)):
        sequence = drawn(sampler, name, 4 * 15)  # 15 visits of 8 examples
        passes = [sequence[start : start + size] for start in range(0, len(sequence) - size + 1, size)]
        assert len(passes) == 120 // size
        assert all(sorted(once) == list(range(first, first + size)) for once in passes)
        assert len(set(map(tuple, passes))) == len(passes), "each pass is shuffled anew"


def test_pool_is_drawn_without_replacement_over_all_tasks():
    sampler = make(PooledSampler, sizes=(30, 7, 41, 12))
    sequence = [number for index in range(30) for number in numbers(sampler.episode(index).support)]
    everything = [1000 * task + i for task, size in enumerate((30, 7, 41, 12)) for i in range(size)]
    assert sorted(sequence[:90]) == sorted(sequence[90:]) == everything
    assert sequence[:90] != sequence[90:]
    assert sampler.episode(3).task == "pooled"
    assert any(len({number // 1000 for number in numbers(sampler.episode(i).support)}) > 1 for i in range(5))


@pytest.mark.parametrize("kind", [EpisodeSampler, PooledSampler])
def test_seeds_differ(kind):
    first, second = make(kind, seed=0), make(kind, seed=1)
    assert [content(first.episode(i)) for i in range(8)] != [content(second.episode(i)) for i in range(8)]


def test_tasks_of_one_size_are_shuffled_apart():
    sampler = make(sizes=(30, 30))
    sequences = [[number % 1000 for number in drawn(make(query=True, sizes=(30, 30)), f"task{i}", 2)] for i in (0, 1)]
    assert sequences[0] != sequences[1]
    assert sampler.episodes_per_epoch == 2


def test_shuffles_are_the_same_in_every_process():
    code = "from abmll.tasks.shuffle import permutation; print(permutation(10, 3, 'train', 'glue-rte', 0))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {"[1, 3, 9, 8, 5, 7, 2, 0, 6, 4]\n"}  # a change here changes the data order of every run


def test_endless_shuffle_in_any_order():
    whole = EndlessShuffle(5, "key").take(0, 60)
    pieces = EndlessShuffle(5, "key")
    assert all(pieces.take(start, 7) == whole[start : start + 7] for start in (50, 3, 11, 0, 27, 26))
    assert Counter(whole) == dict.fromkeys(range(5), 12)


@pytest.mark.parametrize("size", [8, 9, 13, 16, 20, 37])
def test_a_stretch_holds_no_element_twice_that_it_can_do_without(size):
    """Stretches of 8 straddle two shuffles of most sizes; every shuffle still holds each element once."""
    together, shuffle = 8, EndlessShuffle(size, "key", together=8)
    whole = shuffle.take(0, together * size * 3)
    stretches = [whole[start : start + together] for start in range(0, len(whole), together)]
    assert all(len(set(stretch)) == together for stretch in stretches)
    assert all(sorted(whole[start : start + size]) == list(range(size)) for start in range(0, len(whole), size))
    for number in (40, 2, 19, 0, 20, 21):  # in any order
        start = number % len(stretches) * together
        assert EndlessShuffle(size, "key", together=8).take(start, together) == whole[start : start + together]
        assert shuffle.take(start, together) == whole[start : start + together]
    first = EndlessShuffle(size, "key").take(0, size)
    assert whole[:size] == first, "what nothing straddles is as it was"


@pytest.mark.parametrize("kind", [EpisodeSampler, PooledSampler])
def test_a_query_batch_is_of_rows_that_phi_was_not_trained_on(kind):
    """Wherever a task has as many rows as an episode takes: 8 of 8, 9, 11 and 30."""
    sampler = make(kind, query=True, sizes=(8, 9, 11, 30))
    for index in range(200):
        episode = sampler.episode(index)
        assert len(set(numbers((*episode.support, episode.query)))) == 8


def test_support_examples():
    def support(count, seed=0, size=12):
        return [example.token_ids[1] for example in support_examples(numbered_task("unseen", size), count, seed)]

    assert sorted(support(12)) == list(range(12))
    assert support(12) == support(12) != support(12, seed=1)
    assert support(12)[:8] == support(8), "more steps go on from fewer"
    assert Counter(support(12, size=3)) == {0: 4, 1: 4, 2: 4}


def test_in_batches_hold_every_example_once_in_the_order_of_lengths():
    lengths = (5, 2, 9, 2, 7, 3, 8)
    examples = [PromptedExample((50 + i,) * length, i % 4, 4) for i, length in enumerate(lengths)]
    order = by_length(examples)
    assert order.tolist() == [1, 3, 5, 0, 4, 6, 2]
    batches = list(in_batches([examples[place] for place in order], LETTER_IDS, 3))
    assert [batch.prompts.sizes for batch in batches] == [(2, 2, 3), (5, 7, 8), (9,)]
    assert numbers(batches) == [51, 53, 55, 50, 54, 56, 52]
    assert torch.cat([batch.label for batch in batches]).tolist() == [1, 3, 1, 0, 0, 2, 2]
    assert sum(batch.num_tokens for batch in batches) == sum(lengths)
    assert list(in_batches([], LETTER_IDS, 3)) == []


@pytest.mark.parametrize("kind", [EpisodeSampler, PooledSampler])
def test_nothing_to_train_on_is_an_error(kind):
    with pytest.raises(ValueError, match="no task to train on"):
        make(kind, sizes=())
    with pytest.raises(ValueError, match="task task1: no training examples"):
        make(kind, sizes=(3, 0))
    with pytest.raises(ValueError, match="no training examples"):
        support_examples(numbered_task("empty", 0), 2, 0)
