"""Evaluation: what it scores, and that it leaves no trace."""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from evaluations import (
    CLOSE,
    OPTIONS,
    Meeting,
    adapt_by_hand,
    evaluate,
    evaluator,
    mean_nll,
    predictions,
    scattered,
)

from abmll.evaluation import Evaluation
from abmll.kernels import NoiseKey, fold_seed
from abmll.methods import Pretrained
from abmll.models.answers import Rows, answer_logits
from abmll.models.architectures import architecture_config, random_model
from abmll.tasks.batch import side_by_side
from abmll.tasks.episodes import by_length, in_batches, support_examples

METHODS = ("abmll", "reptile", "lora", "pretrained")


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in METHODS for option in OPTIONS if (name, option) != ("abmll", "tfb")]
)
def test_evaluation_leaves_no_trace(name, option, build_tiny):
    tiny = scattered(build_tiny(method={"name": name}))
    learner, adapters = tiny.learner, tiny.adapters
    optimizer = learner.optimizer(1e-3)
    learner.phi_step(tiny.batch, NoiseKey(0, 0) if tiny.method.sampled else None, optimizer)
    adapters.reset_phi()
    everything = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    flags = {key: value.requires_grad for key, value in tiny.model.named_parameters()}
    moments = copy.deepcopy(optimizer.state_dict())
    generator = torch.get_rng_state()

    evaluate(tiny, **OPTIONS[option])
    assert not any(module._forward_hooks for module in tiny.model.modules())
    for key, value in tiny.model.state_dict().items():
        assert torch.equal(value, everything[key]), key
    assert {key: value.requires_grad for key, value in tiny.model.named_parameters()} == flags
    assert all(value.grad is None for value in tiny.model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    after = optimizer.state_dict()
    assert after["param_groups"] == moments["param_groups"]
    for index, state in moments["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


@pytest.mark.parametrize("name", ["abmll", "reptile"])
def test_training_goes_on_as_if_there_had_been_no_evaluation(name, build_tiny):
    gradients = []
    for validate in (False, True):
        tiny = scattered(build_tiny(method={"name": name}))
        optimizer = tiny.learner.optimizer(1e-2)
        for step in range(2):
            tiny.adapters.reset_phi()
            update = tiny.method.update(tiny.learner, tiny.visit(optimizer=optimizer, episodes=[step]))
            if validate:
                tiny.adapters.reset_phi()
                evaluate(tiny, "validation", samples=1)
        gradients.append(update.gradient)
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())


@pytest.mark.parametrize("name", METHODS)
def test_scores_before_and_after_adaptation(name, build_tiny):
    tiny = scattered(build_tiny(method={"name": name, "test_steps": 2}))
    found = evaluate(tiny)
    names = [task.name for task in tiny.parts.tasks.test]
    assert found.method == name and found.split == "test" and found.steps == [0, 2]
    for steps in (0, 2):
        assert list(found.tasks[steps]) == names
        mean = sum(scores["nll"] for scores in found.tasks[steps].values()) / len(names)
        assert found.overall[steps]["nll"] == pytest.approx(mean)
        assert found.overall[steps]["n"] == sum(len(task.test) for task in tiny.parts.tasks.test)
    assert all(found.tasks[0][task]["nll"] != found.tasks[2][task]["nll"] for task in names)


@pytest.mark.parametrize("name", ["abmll", "reptile"])
def test_both_scores_equal_a_loop_by_hand(name, build_tiny):
    tiny = scattered(build_tiny(method={"name": name}))
    found = predictions(tiny)
    task = tiny.parts.tasks.test[0]
    torch.testing.assert_close(found[0].nll, mean_nll(tiny, task.test), **CLOSE)
    adapt_by_hand(tiny, support_examples(task, 3 * tiny.config.tasks.batch_size, tiny.config.seed))
    torch.testing.assert_close(found[3].nll, mean_nll(tiny, task.test), **CLOSE)
    assert (found[3].nll - found[0].nll).abs().max() > 0.01


def test_pretrained_at_no_steps_is_the_base_model(build_tiny):
    tiny = build_tiny()
    found = predictions(tiny, Pretrained(tiny.config.method))[0]
    base = random_model(architecture_config("tiny"), torch.device("cpu"), torch.float32, "sdpa").eval()
    row = 0
    for batch in in_batches(tiny.parts.tasks.test[0].test, tiny.parts.tasks.letter_ids, 1):
        with torch.no_grad():
            logits = base(input_ids=batch.input_ids[None]).logits[0, -1].double()
        options = logits[batch.letter_ids[0][batch.option_mask[0]]].softmax(dim=-1)
        torch.testing.assert_close(found.options[row, : len(options)], options, **CLOSE)
        torch.testing.assert_close(found.nll[row], -logits.log_softmax(dim=-1)[batch.target[0]], **CLOSE)
        row += 1
    assert row == len(found.label)


def test_pretrained_scores_the_same_beside_every_method(build_tiny):
    tinies = [build_tiny(method={"name": name}) for name in ("abmll", "reptile", "pretrained")]
    scores = [evaluate(tiny, method=Pretrained(tiny.config.method)).to_json() for tiny in tinies]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("posterior", ["activation", "weight"])
@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_predictions_average_softmaxes(samples, posterior, build_tiny):
    tiny = scattered(build_tiny(adapters={"posterior": posterior, "log_variance_offset": -4.0}))
    found, again = (predictions(tiny, samples=samples, batch_size=3) for _ in range(2))
    mean = predictions(tiny)
    task, letters = tiny.parts.tasks.test[0], tiny.parts.tasks.letter_ids
    seed, rows, geometric = fold_seed(tiny.config.seed, "prediction", task.name, 0), [], []
    order = by_length(task.test)
    for step, batch in enumerate(in_batches([task.test[place] for place in order], letters, 3)):
        # drawn weights are the same for every batch, drawn activations are not
        key = NoiseKey(seed, 0 if posterior == "weight" else step)
        repeated = Rows.of(tiny.model, side_by_side([batch] * samples))
        names = key.rows(samples, "cpu")
        context = tiny.adapters.context.forward_pass(names, groups=repeated.groups, slot=0)
        with torch.no_grad(), context:
            logits = answer_logits(tiny.model, repeated).unflatten(0, (samples, -1))
        # the first sample is the one that a pass of its own draws; the others are others
        torch.testing.assert_close(logits[0], tiny.learner.forward(batch, key)[0].detach(), **CLOSE)
        assert samples == 1 or (logits[1:] - logits[0]).abs().amax(dim=-1).min() > 1e-3
        drawn = [sample.double().softmax(dim=-1) for sample in logits]
        target = batch.target[None, :, None].expand(samples, -1, 1)
        at_target = torch.stack(drawn).gather(2, target)[..., 0]
        rows.append(-at_target.mean(dim=0).log())
        geometric.append(-at_target.log().mean(dim=0))
    assert len(task.test) > 3 and len(rows) > 1
    torch.testing.assert_close(found[0].nll[order], torch.cat(rows), **CLOSE)
    if samples > 1:
        assert (found[0].nll[order] - torch.cat(geometric)).abs().max() > 1e-3
    for steps in (0, 3):
        assert torch.equal(found[steps].options, again[steps].options)
        assert (found[steps].nll - mean[steps].nll).abs().max() > 1e-3  # not the mean's


def test_drawn_weights_do_not_depend_on_the_batches(build_tiny):
    """A sample is one function of the question, whichever questions it is asked beside."""
    tiny = scattered(build_tiny(adapters={"posterior": "weight", "log_variance_offset": -4.0}))
    alone, three = (predictions(tiny, samples=3, batch_size=size) for size in (1, 3))
    mean = predictions(tiny)
    for steps in (0, 3):
        torch.testing.assert_close(alone[steps].options, three[steps].options, **CLOSE)
        torch.testing.assert_close(alone[steps].variance, three[steps].variance, **CLOSE)
        assert (alone[steps].options - mean[steps].options).abs().max() > 1e-3


def test_point_estimates_have_no_samples(build_tiny):
    tiny = scattered(build_tiny(method={"name": "reptile"}))
    assert evaluate(tiny, samples=5) == evaluate(tiny, samples=0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_means_scores_do_not_depend_on_the_batch_size(batch_size, build_tiny):
    tiny = scattered(build_tiny())
    found, expected = predictions(tiny, batch_size=batch_size), predictions(tiny, batch_size=4)
    for steps in (0, 3):
        assert torch.equal(found[steps].label, expected[steps].label)
        torch.testing.assert_close(found[steps].options, expected[steps].options, **CLOSE)
        torch.testing.assert_close((-found[steps].nll).exp(), (-expected[steps].nll).exp(), **CLOSE)


def test_the_split_decides_which_examples_are_scored(build_tiny):
    tiny = scattered(build_tiny())
    tasks = tiny.parts.tasks.test
    test, few, validation = evaluate(tiny), evaluate(tiny, max_examples=2), evaluate(tiny, "validation")
    assert [test.tasks[0][task.name]["n"] for task in tasks] == [len(task.test) for task in tasks]
    assert {scores["n"] for scores in few.tasks[0].values()} == {2}
    assert [validation.tasks[0][task.name]["n"] for task in tasks] == [len(task.validation) for task in tasks]


def of_option(option, build_tiny, **sections):
    """A tiny run that it is for."""
    return scattered(build_tiny(method={"name": "reptile" if option == "tfb" else "abmll"}, **sections))


@pytest.mark.parametrize("option", OPTIONS)
def test_two_ranks_gather_what_one_scores(option, build_tiny):
    alone = evaluate(of_option(option, build_tiny), **OPTIONS[option])
    meeting, tinies = Meeting(2), [of_option(option, build_tiny) for _ in range(2)]

    def run(number):
        tiny = tinies[number]
        ranks = meeting.rank(number)
        return evaluator(tiny, ranks, **OPTIONS[option]).evaluate(tiny.method, tiny.parts.tasks.test, "test")

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    assert sorted(len(item) for item in meeting.items) == [1, 2] and not set(meeting.items[0]) & set(meeting.items[1])
    assert found[0] == found[1] == alone


@pytest.mark.parametrize("option", OPTIONS)
def test_a_task_scores_beside_others_as_alone(option, build_tiny):
    tiny = of_option(option, build_tiny)
    alone, beside = (evaluate(tiny, beside=beside, **OPTIONS[option]) for beside in (1, 3))
    for steps in (0, 3):
        for task, expected in alone.tasks[steps].items():
            for fitted in {"temperature", "tfb_sigma"} & set(expected):
                assert beside.tasks[steps][task][fitted] == pytest.approx(expected[fitted], rel=1e-3)
            found = beside.predictions[steps][task]
            torch.testing.assert_close(found.options, alone.predictions[steps][task].options, rtol=1e-3, atol=1e-4)


def test_options_go_together(build_tiny):
    names = ("support", "predictions", "tfb")
    every = {key: value for option in names for key, value in OPTIONS[option].items()}
    tiny = of_option("tfb", build_tiny)
    found = evaluate(tiny, **every)
    assert all({"temperature", "tfb_sigma"} < set(scores) for scores in found.tasks[3].values())
    for option in ("mean", *names):
        assert evaluate(tiny, **OPTIONS[option]).overall[3]["nll"] != found.overall[3]["nll"]


def test_scores_survive_json(build_tiny):
    found = evaluate(build_tiny(), temperature="support")
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("option", OPTIONS)
def test_a_diverged_model_has_no_scores(option, build_tiny):
    tiny = of_option(option, build_tiny)
    with torch.no_grad():
        next(iter(tiny.adapters.theta.values())).fill_(float("nan"))
    found = evaluate(tiny, **OPTIONS[option])
    names = [task.name for task in tiny.parts.tasks.test]
    assert found.diverged == [(steps, name) for steps in found.steps for name in names]
    assert all(math.isnan(found.overall[steps]["accuracy"]) for steps in found.steps)


def test_each_row_of_the_support_set_counts_once(build_tiny):
    """Four rows in six places, each place behind other demonstrations: the four are counted."""
    found = {}
    for demonstrate in ("test", "adaptation"):
        shown = {"demonstrations": 1, "demonstrate": demonstrate, "max_tokens": 1024}
        rows = {"train_tasks": 2, "test_tasks": 1, "train_examples": 6, "test_examples": 4}  # two of validation
        tiny = build_tiny(method={"name": "frequencies"}, tasks={**shown, "builtin": rows})
        (task,), size = tiny.parts.tasks.test, 6
        support = evaluator(tiny)._support(tiny.method, task, size)
        assert (len(support.examples), len(support.distinct)) == (size, 4)
        assert len({tuple(example.token_ids) for example in support.distinct}) == 4
        found[demonstrate] = predictions(tiny)[3].options
    assert torch.equal(found["test"], found["adaptation"])
