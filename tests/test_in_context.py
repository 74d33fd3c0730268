"""Scores and training with demonstrations in the prompts."""

import pytest
import torch

from abmll.evaluation import Evaluator
from abmll.methods import Pretrained
from abmll.models.architectures import architecture_config, random_model
from abmll.tasks.checks import LETTERS
from abmll.tasks.episodes import in_batches, support_examples

MODES = ("test", "adaptation", "always")
# Batches of another shape are summed in other orders: fp32's roundings, all to one side, in a row of sums over 1,024
# keys and 128 columns in each of two layers, there and back in two steps.
ROUNDING = (1024 + 128) * 2 * 2 * 2 * 2.0**-24


class OneRank:
    rank, world_size, device = 0, 1, torch.device("cpu")

    def gather(self, item):
        return [item]


def build(build_tiny, count, demonstrate="test", name="abmll"):
    """An epsilon above the gradients: a step is proportional to them, and rounding stays rounding."""
    tasks = {"demonstrations": count, "demonstrate": demonstrate, "max_tokens": 1024}
    method = {"name": name, "inner_steps": 2, "adam_eps": 30, "test_lr": 1.0, "inner_lr": 1.0}
    tiny = build_tiny(tasks=tasks, method=method)
    tiny.scatter(0.03).adapters.reset_phi()
    return tiny


def evaluate(tiny, beside=1, method=None):
    config, letters = tiny.config, tiny.parts.tasks.letter_ids
    evaluator = Evaluator(tiny.learner, letters, config.eval, 4, config.seed, OneRank(), beside)
    return evaluator.evaluate(method or tiny.method, tiny.parts.tasks.test, "test")


@pytest.fixture(scope="module")
def found(build_tiny):
    """Scores of the tasks one after another, by mode; "none": without demonstrations."""
    tinies = {mode: build(build_tiny, 2, mode) for mode in MODES} | {"none": build(build_tiny, 0, "always")}
    return {mode: evaluate(tiny) for mode, tiny in tinies.items()}


def options(evaluation, steps):
    return torch.cat([prediction.options for prediction in evaluation.predictions[steps].values()])


def test_scores_without_and_with_weight_adaptation(found):
    """Both in one run; where demonstrations stand decides the latter alone."""
    zero, adapted = ({mode: options(found[mode], steps) for mode in found} for steps in (0, 2))
    assert torch.equal(zero["test"], zero["adaptation"]) and torch.equal(zero["test"], zero["always"])
    assert (zero["test"] - zero["none"]).abs().max() > 1e-3
    assert (adapted["test"] - adapted["none"]).abs().max() > 1e-3
    assert (adapted["test"] - adapted["adaptation"]).abs().max() > 1e-3
    assert torch.equal(adapted["adaptation"], adapted["always"]), "on unseen tasks the two are one"


@pytest.mark.parametrize("mode", ["test", "adaptation"])
def test_side_by_side_scores_as_alone(mode, found, build_tiny):
    beside = evaluate(build(build_tiny, 2, mode), beside=3)
    for steps in (0, 2):
        torch.testing.assert_close(options(beside, steps), options(found[mode], steps), rtol=ROUNDING, atol=ROUNDING)


def test_the_base_model_in_context(build_tiny):
    """By hand: two support prompts and their letters before the question's, through the model itself."""
    tiny = build_tiny(tasks={"demonstrations": 2, "max_tokens": 1024})
    scored = evaluate(tiny, method=Pretrained(tiny.config.method)).predictions[0]
    base = random_model(architecture_config("tiny"), torch.device("cpu"), torch.float32, "sdpa").eval()
    letters, tokenizer = tiny.parts.tasks.letter_ids, tiny.parts.tokenizer
    for task in tiny.parts.tasks.test:
        (batch, *_) = in_batches(support_examples(task, 2, tiny.config.seed), letters, 2)
        former = [tokenizer.decode(ids) for ids in batch.input_ids.split(batch.prompts.sizes)]
        answered = [f"{text}{LETTERS[label]}<|im_end|>\n" for text, label in zip(former, batch.label, strict=True)]
        for row, plain in enumerate(task.test):
            text = "".join(answered) + tokenizer.decode(list(plain.token_ids))
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = base(input_ids=ids).logits[0, -1].double()
            expected = logits[list(letters[: plain.num_options])].softmax(dim=-1)
            options = scored[task.name].options[row, : plain.num_options]
            torch.testing.assert_close(options, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", ["abmll", "lora"])
def test_training_sees_demonstrations_only_where_it_is_told_to(name, build_tiny):
    """The same examples in the same batches; the gradients differ in `always` alone."""
    gradients = {}
    for mode in MODES:
        tiny = build(build_tiny, 2, mode, name)
        gradients[mode] = tiny.method.update(tiny.learner, tiny.visit()).gradient
    plain = build(build_tiny, 0, "always", name)
    gradients["none"] = plain.method.update(plain.learner, plain.visit()).gradient
    for key, value in gradients["none"].items():
        assert torch.equal(gradients["test"][key], value) and torch.equal(gradients["adaptation"][key], value), key
    assert any((gradients["always"][key] - value).abs().max() > 0 for key, value in gradients["none"].items())
