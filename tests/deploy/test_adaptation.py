"""Adapting theta to a user's examples: the steps, side by side, cross-validation."""

import math

import pytest
import torch
from deployed import EXAMPLES, OPTIONS, adapt_by_hand, prompts
from evaluations import ROUNDING

from abmll import Example, MetaModel
from abmll.compare.statistics import wilson
from abmll.config import ConfigError, Refused
from abmll.deploy.adaptation import make_support, steps_for
from abmll.deploy.cross_validation import make_folds, summarise
from abmll.evaluation.temperature import fit_temperature
from abmll.kernels import NoiseKey, fold_seed
from abmll.metrics import Predictions
from abmll.tasks.batch import collate


def test_it_takes_the_runs_steps_on_the_examples(meta):
    found = meta.adapt(EXAMPLES, "moods", folds=0)
    assert found.card.adaptation.steps == 3  # inner_steps: 3 x 2 examples are all six
    by_hand = adapt_by_hand(meta.base, EXAMPLES, 3, "moods")
    assert found.phi.keys() == by_hand.keys()
    for name, value in found.phi.items():
        assert torch.equal(value, by_hand[name]), name
    assert any(not torch.equal(value, meta.base.adapters.theta[name].cpu()) for name, value in found.phi.items())


def test_more_examples_take_more_steps_unless_told(meta):
    many = [(f"{text} {number}", label) for number in range(3) for text, label in EXAMPLES]
    assert steps_for(meta.base, 6) == 3 and steps_for(meta.base, 18) == 9 and steps_for(meta.base, 17) == 9
    support = make_support(meta.base, "moods", [Example(text, OPTIONS, label) for text, label in many])
    assert {tuple(prompt.token_ids) for prompt in support.prompts} == {
        tuple(prompt.token_ids) for prompt in prompts(meta.base, many)
    }
    assert meta.adapt(many, folds=0, steps=2).card.adaptation.steps == 2


def test_tasks_side_by_side_are_what_each_is_alone(meta):
    """Five tasks: more than go in one pass."""
    tasks = {f"task {number}": EXAMPLES[number % 2 :] for number in range(5)}
    together = meta.adapt_all(tasks, folds=2)
    for name, examples in tasks.items():
        alone = meta.adapt(examples, name, folds=2)
        assert together[name].name == name
        # a gradient's rounding is scaled by AdamW to steps of test_lr where the gradient is nearly 0: compare losses
        assert torch.allclose(
            torch.tensor(together[name].card.adaptation.loss), torch.tensor(alone.card.adaptation.loss), rtol=1e-3
        )
        one, other = (model.predict(["It was slow."])[0].confidence for model in (together[name], alone))
        assert abs(one - other) < 1e-3


def test_the_loss_is_an_examples_before_each_step(meta, adapted):
    """At the first step phi is theta; the noise is the adaptation's own."""
    base, loss = meta.base, adapted.card.adaptation.loss
    support = make_support(base, "moods", [Example(text, OPTIONS, label) for text, label in EXAMPLES])
    batch = collate(support.prompts[:2], base.prompter.letter_ids)
    base.show(None)
    with torch.no_grad():
        logits, _ = base.learner.forward(batch, NoiseKey(fold_seed(base.config.seed, "adaptation", "moods"), 0))
    right = logits.log_softmax(dim=1).gather(1, batch.target[:, None])
    assert len(loss) == 3 and loss[0] == pytest.approx(-float(right.mean()), rel=ROUNDING)


@pytest.mark.parametrize("override", ["adapters.log_variance_offset=-3", "adapters.alpha=4", "method.name=reptile"])
def test_an_override_does_not_make_theta_another_ones(run, override):
    """The numbers would fit, and mean something else."""
    with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}: theta was trained with .*; leave it as it"):
        MetaModel.load(run, [override], device="cpu")


@pytest.mark.parametrize(
    "override", ["eval.samples=8", "eval.prune.fraction=0.5", "tasks.folder=x", "trainer.parallel_episodes=2"]
)
def test_an_override_that_no_adaptation_reads_is_refused(run, override):
    told = rf"override: {override.partition('=')[0]}: adapting to examples of your own does not read it; "
    with pytest.raises(ConfigError, match=told + ("give --samples" if "samples" in override else "remove it")):
        MetaModel.load(run, [override], device="cpu")
    MetaModel.load(run, ["eval.batch_size=2"], device="cpu")


def test_a_diverging_adaptation_is_refused(run):
    meta = MetaModel.load(run, ["method.test_lr=1e30"], device="cpu")
    with pytest.raises(Refused, match=r"task moods: adaptation: the loss by step is .*lower method\.test_lr"):
        meta.adapt(EXAMPLES, "moods", folds=0)


def test_phi_is_looked_at_after_the_last_step(meta, monkeypatch):
    """The losses are taken before each step, and are all finite here."""
    from abmll.deploy import meta_model

    made = meta_model.adapt_side_by_side

    def diverging(base, supports, tell):
        for number, slot, loss in made(base, supports, tell):
            if supports[number].task == "bad":
                next(iter(base.adapters.phi.values())).data[slot] = math.inf
            yield number, slot, loss

    monkeypatch.setattr(meta_model, "adapt_side_by_side", diverging)
    wanted = r"task bad: adaptation: phi after the last step, .*: not finite; lower method\.test_lr"
    for folds in (0, 2):
        with pytest.raises(meta_model.Diverged, match=wanted) as error:
            meta.adapt_all({"bad": EXAMPLES, "fine": EXAMPLES}, folds=folds)
        assert error.value.models.keys() == {"fine"}


@pytest.mark.parametrize("folds", [0, 2])
def test_a_phi_that_predicts_nothing_is_refused(meta, monkeypatch, folds):
    """Every number of phi is finite; what is computed with them is not."""
    from abmll.deploy import meta_model

    made = meta_model.adapt_side_by_side

    def diverging(base, supports, tell):
        for number, slot, loss in made(base, supports, tell):
            for value in base.adapters.phi.values():
                value.data[slot] = 1e30
            yield number, slot, loss

    monkeypatch.setattr(meta_model, "adapt_side_by_side", diverging)
    with pytest.raises(meta_model.Diverged, match=r"its predictions after the last step: not finite; lower"):
        meta.adapt(EXAMPLES, "moods", folds=folds)


def test_one_tasks_divergence_leaves_the_others(meta, monkeypatch):
    """As `adapt_all` sees it: the loss of one task is NaN."""
    from abmll.deploy import meta_model

    made = meta_model.adapt_side_by_side

    def diverging(base, supports, tell):
        for number, slot, loss in made(base, supports, tell):
            yield number, slot, [math.nan] if supports[number].task == "bad" else loss

    monkeypatch.setattr(meta_model, "adapt_side_by_side", diverging)
    with pytest.raises(meta_model.Diverged, match="task bad: adaptation") as error:
        meta.adapt_all({"bad": EXAMPLES, "fine": EXAMPLES}, folds=2)
    assert error.value.models.keys() == {"fine"}
    assert error.value.models["fine"].card.scores["cross_validation"]["n"] == 6


def test_folds_hold_out_every_example_once(meta):
    examples = [Example(text, OPTIONS, label) for text, label in EXAMPLES]
    twice = [*examples, examples[0]]
    folds = make_folds(meta.base, "moods", twice, 3, 4)
    held_out = [example for fold in folds for example in fold.held_out]
    assert sorted(map(str, held_out)) == sorted(map(str, twice))
    for fold in folds:
        seen = {tuple(prompt.token_ids) for prompt in fold.support.prompts}
        own = {tuple(prompt.token_ids) for prompt in meta.base.prompter.encode(fold.held_out)}
        assert not seen & own, "a question stands on both sides"
        assert fold.support.steps == 4 and {example.output for example in fold.held_out} == set(OPTIONS)
    assert len(make_folds(meta.base, "moods", examples[:2], 5, 1)) == 2
    assert make_folds(meta.base, "moods", examples, 0, 1) == []


def test_cross_validation_scores_what_each_fold_left_out(meta):
    found = meta.adapt(EXAMPLES, "moods", folds=2)
    examples = [Example(text, OPTIONS, label) for text, label in EXAMPLES]
    right, nll = [], []
    for fold in make_folds(meta.base, "moods", examples, 2, 3):
        seen = [(example.input, example.output) for example in examples if example not in fold.held_out]
        in_order = [(e.input, e.output) for e in examples if (e.input, e.output) in seen]
        assert len(in_order) == 3
        order = {prompt.token_ids.tobytes(): place for place, prompt in enumerate(prompts(meta.base, seen))}
        assert {prompt.token_ids.tobytes() for prompt in fold.support.prompts} <= order.keys()
        meta.base.forget()
        meta.base.predictor().adapt(meta.base.method, ["moods"], [fold.support.prompts])
        own = meta.base.predictor().predict(
            meta.base.method, ("held out", "moods", 0), prompts(meta.base, [(e.input, e.output) for e in fold.held_out])
        )
        right += (own.options.argmax(dim=1) == own.label).tolist()
        nll += own.nll.tolist()
    meta.base.forget()
    assert found.card.scores["cross_validation"]["accuracy"] == pytest.approx(sum(right) / 6)
    assert found.card.scores["cross_validation"]["nll"] == pytest.approx(sum(nll) / 6, rel=1e-4)
    assert found.card.scores["cross_validation"]["folds"] == 2 and found.card.scores["cross_validation"]["n"] == 6
    before = meta.unadapted(OPTIONS).evaluate(examples)
    assert found.card.scores["before_adaptation"]["nll"] == pytest.approx(before.nll, rel=ROUNDING * 10)


def test_the_interval_is_wilsons():
    """Three of four right: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.95996."""
    options = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]).double()
    label, nothing = torch.tensor([0, 0, 1, 1]), torch.full((4,), math.nan).double()
    found = summarise(Predictions(options, label == 0, -options[range(4), label].log(), label, nothing, nothing), 2)
    z, p, n = 1.959964, 0.75, 4
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found["accuracy"] == p
    assert found["accuracy_low"] == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-6)
    assert found["accuracy_high"] == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-6)


def test_rows_that_repeat_another_do_not_narrow_the_interval(meta):
    """Ten times the same six questions are six."""
    found = meta.adapt(EXAMPLES * 10, "moods", folds=2, steps=1).card.scores["cross_validation"]
    assert found["n"] == 60
    _, low, high = wilson(found["accuracy"], 6)
    assert (found["accuracy_low"], found["accuracy_high"]) == (low, high)
    assert high - low > 2 * (wilson(found["accuracy"], 60).high - wilson(found["accuracy"], 60).low)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([("a", "good"), ("b", "good")], "every label is 'good'"),
        ([], "no examples"),
        ([("a", "good"), ("b", "Good"), ("c", "bad")], "task task: labels 'Good' and 'good' differ in case"),
        ([("a", 1), ("b", 2)], r"is no \(text, label\), two strings"),
        ([("a", str(number)) for number in range(30)], "30 options: more than the 26"),
        ([Example("a", ("x", "y"), "z")] * 2, "output 'z' is not among"),
        (
            [Example(str(number), ("a", "b"), "a") for number in range(8)],
            "task task: every label is 'a': an adaptation needs examples of another of the options too; add some",
        ),
        ([("a" + chr(0xD800), "x"), ("b", "y")], "half a surrogate pair"),
    ],
)
def test_examples_that_are_no_task_are_refused(meta, examples, message):
    with pytest.raises(ValueError, match=message):
        meta.adapt(examples)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"folds": 1}, {"folds": -1}])
def test_steps_and_folds_that_are_none(meta, settings):
    with pytest.raises(ValueError, match="steps are at least 1, and folds 0 or at least 2"):
        meta.adapt(EXAMPLES, **settings)


def test_options_that_are_no_options(meta):
    for options in (["a"], ["a", "a"], list(map(str, range(30)))):
        with pytest.raises(ValueError, match="option"):
            meta.unadapted(options)


def test_examples_that_do_not_fit_are_left_out(run):
    meta = MetaModel.load(run, ["tasks.too_long=drop"], device="cpu")
    long = ("long " * 400, "good")
    found, short = meta.adapt([*EXAMPLES, long], "moods", folds=2), meta.adapt(EXAMPLES, "moods", folds=2)
    assert found.card.adaptation.examples == 6
    assert found.card.model_dump() == short.card.model_dump()
    with pytest.raises(ValueError, match=r"none of its 2 examples fits in tasks\.max_tokens: 320; raise it"):
        meta.adapt([long, (long[0] + "x", "bad")])


def test_a_temperature_at_an_end_is_none():
    """A thousand of a thousand wrong at p = .7: guesses would be better. Of eight nobody would say so."""
    for right, count in ((False, 1000), (False, 8), (True, 8)):
        options, nothing = torch.tensor([[0.7, 0.3]] * count).double(), torch.full((count,), math.nan).double()
        label = torch.full((count,), 0 if right else 1)
        nll = -options.gather(1, label[:, None])[:, 0].log()
        predictions = Predictions(options, label == 0, nll, label, nothing, nothing)
        found = summarise(predictions, 2)
        assert found["accuracy"] == right
        if count == 1000:
            assert math.isnan(found["temperature"])
        else:
            assert found["temperature"] == fit_temperature(predictions) and (found["temperature"] < 1) == right


@pytest.mark.parametrize("demonstrate", ["test", "adaptation"])
def test_a_fold_shows_nothing_that_it_holds_out(run, demonstrate):
    overrides = ["tasks.demonstrations=2", "tasks.max_tokens=900", f"tasks.demonstrate={demonstrate}"]
    base = MetaModel.load(run, overrides, device="cpu").base
    examples = [Example(text, OPTIONS, label) for text, label in EXAMPLES]
    for fold in make_folds(base, "moods", examples, 3, None):
        prompts_of_fold = [base.tokenizer.decode(list(prompt.token_ids)) for prompt in fold.support.prompts]
        for held_out in fold.held_out:
            assert held_out not in fold.support.shown
            assert not any(held_out.input in prompt for prompt in prompts_of_fold)


def test_demonstrations_are_kept_with_the_task(run, tmp_path):
    from abmll import load_task_models

    meta = MetaModel.load(run, ["tasks.demonstrations=2", "tasks.max_tokens=900"], device="cpu")
    model = meta.adapt(EXAMPLES, folds=0)
    assert len(model.card.demonstrations) == 2
    (loaded,) = load_task_models([model.save(tmp_path / "adapter")], device="cpu")
    (prompt,), (bare,) = loaded._prompts([Example("No.", OPTIONS, "bad")]), prompts(meta.base, [("No.", "bad")])
    assert len(prompt.token_ids) > 2 * len(bare.token_ids)
    assert loaded.predict(["No."]) == model.predict(["No."])
