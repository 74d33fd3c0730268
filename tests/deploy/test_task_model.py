"""Predictions of a task's model, and the model on disk."""

import errno
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from deployed import EXAMPLES, OPTIONS, TEXTS, option_probabilities, save_run

from abmll import Example, MetaModel, TaskModel, load_task_models
from abmll.config import Refused
from abmll.deploy.task_model import TooLong


def test_a_prediction_is_the_letters_softmax(meta, adapted):
    found = adapted.predict(TEXTS)
    for text, prediction in zip(TEXTS, found, strict=True):
        expected = option_probabilities(meta.base, adapted.phi, text)
        assert list(prediction.probabilities) == list(OPTIONS)
        assert list(prediction.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-4)
        assert prediction.label == OPTIONS[int(expected.argmax())]
        assert prediction.confidence == max(prediction.probabilities.values())
        entropy = -sum(p * math.log(p) for p in prediction.probabilities.values())
        assert prediction.entropy == pytest.approx(entropy) and prediction.variance is None
    assert adapted.predict([]) == []


def test_samples_spread(adapted):
    (one,) = adapted.predict(["It was slow."], samples=8)
    assert one.variance > 0 and one.mutual_information > 0
    assert one == adapted.predict(["It was slow."], samples=8)[0], "the same samples every time"


def test_calibrated_is_at_the_temperature_of_cross_validation(adapted):
    card = adapted.card.model_copy(update={"scores": {"cross_validation": {"temperature": 2.5}}})
    told = TaskModel(adapted.base, adapted.phi, card)
    (plain,), (tempered,) = told.predict(TEXTS[:1]), told.predict(TEXTS[:1], calibrated=True)
    odds = [math.log(p["good"] / p["bad"]) for p in (plain.probabilities, tempered.probabilities)]
    assert odds[1] == pytest.approx(odds[0] / 2.5, rel=1e-6)


def test_uncalibrated_adapters_say_so(meta):
    with pytest.raises(ValueError, match="was made without cross-validation"):
        meta.adapt(EXAMPLES, folds=0).predict(TEXTS, calibrated=True)


def test_models_of_one_base_do_not_disturb_each_other(meta, adapted):
    before = adapted.predict(TEXTS)
    turned = [(text, OPTIONS[1 - OPTIONS.index(label)]) for text, label in EXAMPLES]
    other = meta.adapt(turned, "turned", folds=2)
    assert other.predict(TEXTS) != before
    assert adapted.predict(TEXTS) == before
    assert meta.unadapted(OPTIONS).predict(TEXTS) != before
    assert adapted.predict(TEXTS) == before


def test_questions_with_options_of_their_own(meta):
    rows = [Example(f"Which? {n}", (f"a{n}", f"b{n}", "c"), f"a{n}") for n in range(4)]
    model = meta.adapt(rows, folds=2)
    assert model.options is None
    (found,) = model.predict([Example("Which?", ("x", "y"), "x")])
    assert list(found.probabilities) == ["x", "y"]
    with pytest.raises(ValueError, match="have options of their own"):
        model.predict(["Which?"])


def test_suggested_are_the_least_sure(adapted):
    found = adapted.predict(TEXTS)
    by_entropy = sorted(range(len(TEXTS)), key=lambda place: -found[place].entropy)
    assert adapted.suggest(TEXTS, count=2) == by_entropy[:2]
    assert sorted(adapted.suggest(TEXTS, count=9, samples=4)) == [0, 1, 2]


def test_a_question_is_suggested_once(meta, adapted):
    twice = [TEXTS[0], *TEXTS, TEXTS[2]]
    assert adapted.suggest(twice, count=9) == [(0, 2, 3)[place] for place in adapted.suggest(TEXTS, count=9)]
    asked = [Example("No.", options, options[0]) for options in (("a", "b"), ("b", "a"), ("a", "c"))]
    assert sorted(meta.unadapted(None).suggest(asked, count=9)) == [0, 2]


@pytest.mark.parametrize("adapted_to", ["phi", "theta"])
def test_a_prediction_that_is_none_is_refused(meta, adapted, monkeypatch, adapted_to):
    """An adapter whose phi diverged, from before that was looked at; a theta that did."""
    broken = TaskModel(adapted.base, {name: value * math.nan for name, value in adapted.phi.items()}, adapted.card)
    remedy = r"adapt again with a lower method\.test_lr"
    if adapted_to == "theta":
        broken, remedy = meta.unadapted(OPTIONS), "use another run"
        nan = {name: torch.full_like(value, math.nan) for name, value in meta.base.adapters.phi.items()}
        monkeypatch.setattr(meta.base, "show", lambda phi: [meta.base.adapters.phi[n].copy_(v) for n, v in nan.items()])
    for ask in (
        lambda: broken.predict(TEXTS),
        lambda: broken.predict(TEXTS, samples=2),
        lambda: broken.evaluate([Example(text, OPTIONS, "bad") for text in TEXTS]),
        lambda: broken.suggest(TEXTS),
        lambda: broken.suggest(TEXTS, samples=2),
    ):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=rf"3 of 3 are not finite, .*{adapted_to} div.*; {remedy}"),
        ):
            ask()
    monkeypatch.undo()
    meta.base.forget()
    adapted.predict(TEXTS)


def test_a_point_estimate_has_no_samples(tmp_path, build_tiny):
    tiny = build_tiny(method={"name": "reptile"})
    model = MetaModel.load(save_run(tiny, tmp_path), device="cpu").adapt(EXAMPLES, folds=0)
    assert model.predict(TEXTS[:1])[0].variance is None
    with pytest.raises(ValueError, match="samples: 4: reptile has no posterior"):
        model.predict(TEXTS, samples=4)


def test_what_does_not_fit_is_named(run):
    meta = MetaModel.load(run, ["tasks.too_long=drop"], device="cpu")
    model = meta.adapt(EXAMPLES, folds=0)
    remedy = r"shorten it or its options, or adapt again with a larger tasks\.max_tokens or with tasks\.too_long=trunc"
    with pytest.raises(TooLong, match=rf"'long long.*: does not fit in tasks\.max_tokens: 320; {remedy}") as error:
        model.predict(["No.", "long " * 400])
    assert error.value.places == (1,)


def test_a_text_that_lost_a_part_says_so(adapted):
    texts = ["No.", "long " * 400]
    assert [one.truncated for one in adapted.predict(texts)] == adapted.truncated(texts) == [False, True]


def test_saved_and_loaded_it_predicts_the_same(adapted, tmp_path):
    folder = adapted.save(tmp_path / "adapter")
    (loaded,) = load_task_models([folder], device="cpu")
    assert loaded.card == adapted.card and loaded.predict(TEXTS) == adapted.predict(TEXTS)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "card.json", "manifest.json"]
    adapted.save(folder)  # an adapter may be replaced


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # import deepspeed fails
from abmll import MetaModel, load_task_models
print(MetaModel.load(sys.argv[1]).adapt([("no", "bad"), ("yes", "good")], folds=2).predict(["no"])[0].label)
print(load_task_models([sys.argv[2]])[0].name)
"""


def test_it_needs_no_deepspeed(run, adapted, tmp_path):
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(run), str(adapted.save(tmp_path / "adapter"))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[1:] == ["moods"] and found.stdout.split()[0] in OPTIONS


def test_another_base_is_refused(adapted, tmp_path):
    folder = adapted.save(tmp_path / "adapter")
    card = json.loads((folder / "card.json").read_text())
    changed = type(adapted)(adapted.base, adapted.phi, adapted.card.model_copy(deep=True))
    changed.card.base.__dict__["fingerprint"] = "0" * 64
    changed.save(tmp_path / "other")
    with pytest.raises(Refused, match=r"was made on random:tiny with fingerprint 000000000000, .* --model"):
        load_task_models([tmp_path / "other"], device="cpu")
    assert card["base"]["fingerprint"] == adapted.base.fingerprint


def test_adapters_of_other_layers_cannot_share_a_base(adapted, tmp_path, build_tiny):
    tiny = build_tiny(adapters={"rank": 2})
    other = MetaModel.load(save_run(tiny, tmp_path / "run"), device="cpu").adapt(EXAMPLES, folds=0)
    folders = [adapted.save(tmp_path / "one"), other.save(tmp_path / "two")]
    with pytest.raises(Refused, match=r"two: adapters\.rank is 2, and 8 in the first adapter"):
        load_task_models(folders, device="cpu")


@pytest.mark.parametrize("name", ["adapter.safetensors", "card.json", "manifest.json"])
@pytest.mark.parametrize("how", ["emptied", "truncated", "changed", "removed"])
def test_a_damaged_adapter_is_refused(adapted, tmp_path, name, how):
    folder = adapted.save(tmp_path / "adapter")
    data = (folder / name).read_bytes()
    if how == "removed":
        (folder / name).unlink()
    else:
        changed = {"emptied": b"", "truncated": data[:-9], "changed": data[:-9] + bytes(9)}[how]
        (folder / name).write_bytes(changed)
    with pytest.raises(Refused, match=r"--adapter: .*adapt\.py"):
        load_task_models([folder], device="cpu")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_is_no_adapter(adapted, tmp_path, capsys):
    from abmll.files import new_partial, publish

    partial = new_partial(tmp_path / "adapter")
    (partial / "adapter.safetensors").write_bytes(pickle.dumps(Evil()))
    (partial / "card.json").write_text(json.dumps(adapted.card.model_dump()))
    publish(partial, tmp_path / "adapter")
    with pytest.raises(Refused, match=r"adapter\.safetensors: cannot be read as safetensors"):
        load_task_models([tmp_path / "adapter"], device="cpu")
    assert "executed" not in capsys.readouterr().out


def test_nothing_but_an_adapter_is_overwritten(adapted, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(Refused, match="holds other files than an adapter's"):
        adapted.save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_how_it_was_adapted_does_not_matter_to_a_base(adapted, run, tmp_path):
    other = MetaModel.load(run, ["method.test_lr=3e-4", "tasks.batch_size=3"], device="cpu").adapt(EXAMPLES, "slow")
    one, two = load_task_models([adapted.save(tmp_path / "one"), other.save(tmp_path / "two")], device="cpu")
    assert one.predict(TEXTS) == adapted.predict(TEXTS)
    assert two.predict(TEXTS)[0].confidence == pytest.approx(other.predict(TEXTS)[0].confidence, rel=1e-6)


def test_foreign_files_in_an_adapters_folder_stay(adapted, tmp_path):
    folder = adapted.save(tmp_path / "adapter")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match="holds other files than an adapter's"):
        adapted.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half(adapted, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("abmll.deploy.adapter.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        adapted.save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.predict("hello"), "is one text; give a list"),
        (lambda model: model.predict([chr(0xD800)]), "half a surrogate pair"),
        (lambda model: model.predict([Example("a", ("b",), "b")]), "1 option"),
        (lambda model: model.suggest(["a", "b"], samples=1), "one sample has no variance"),
        (lambda model: model.predict(["a"], samples=-3), "^samples: -3: must be 0 or more; 0 takes"),
        (lambda model: model.suggest(["a", "b"], samples=-3), "^samples: -3: must be 0 or more"),
    ],
)
def test_mistakes_in_texts_are_told(adapted, call, message):
    with pytest.raises(ValueError, match=message):
        call(adapted)


def test_nothing_to_suggest_from_nothing(adapted):
    assert adapted.suggest([]) == []


def test_theta_alone_is_no_adapter(meta, tmp_path):
    with pytest.raises(Refused, match="is not adapted"):
        meta.unadapted(OPTIONS).save(tmp_path / "adapter")


def test_a_run_without_a_summary_is_refused(tmp_path):
    with pytest.raises(Refused, match="holds no run; name a run's output folder, or its final/"):
        MetaModel.load(tmp_path)


def test_the_base_is_told_by_its_weights(meta):
    from abmll.models.architectures import architecture_config, random_model
    from abmll.models.fingerprint import fingerprint

    def model(dtype):
        torch.manual_seed(0)
        return random_model(architecture_config("tiny"), torch.device("cpu"), dtype, "sdpa")

    one = model(torch.bfloat16)
    assert fingerprint(one) == fingerprint(model(torch.bfloat16)) == fingerprint(one.float())
    with torch.no_grad():
        next(iter(one.parameters())).mul_(1.5)
    assert fingerprint(one) != fingerprint(model(torch.bfloat16))
