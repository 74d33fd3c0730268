"""Examples of a small task, a run's summary, and an adaptation by hand."""

from __future__ import annotations

import torch

from abmll.kernels import NoiseKey, fold_seed
from abmll.summary import save_summary
from abmll.tasks.batch import collate
from abmll.tasks.shuffle import EndlessShuffle
from abmll.tasks.task import Example

OPTIONS = ("bad", "good")
WORDS = ("dull", "fine", "poor", "great", "cold", "warm")
EXAMPLES = [(f"It was {word}.", OPTIONS[number % 2]) for number, word in enumerate(WORDS)]
TEXTS = ["It was slow.", "A very nice and very long evening, all told.", "No."]


def save_run(tiny, folder):
    """RUN/final of a tiny run whose theta was moved."""
    tiny.scatter(0.05)
    save_summary(folder / "final", tiny.adapters.theta, {"config": tiny.config.model_dump(mode="json"), "step": 7})
    return folder


def prompts(base, examples):
    return base.prompter.encode([Example(text, OPTIONS, label) for text, label in examples])


def adapt_by_hand(base, examples, steps, task):
    """phi after `steps` steps from theta, each on the next batch of the endless shuffle of the examples."""
    size, seed = base.config.tasks.batch_size, base.config.seed
    order = EndlessShuffle(len(examples), seed, "support", task).take(0, steps * size)
    own = prompts(base, examples)
    base.show(None)
    base.adapters.reset_phi()
    optimizer = torch.optim.AdamW(
        base.adapters.phi.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )
    noise = fold_seed(seed, "adaptation", task)
    for step in range(steps):
        batch = collate([own[place] for place in order[step * size : (step + 1) * size]], base.prompter.letter_ids)
        base.learner.phi_step(batch, NoiseKey(noise, step), optimizer)
    base.forget()
    return base.taken(0)


def option_probabilities(base, phi, text):
    """Of one text by the mean of `phi`: the letters' logits of the adapted model, renormalised."""
    base.show(phi)
    (prompt,) = prompts(base, [(text, "bad")])
    ids = torch.tensor([list(prompt.token_ids)])
    with torch.no_grad(), base.adapters.context.forward_pass(None, slot=0):
        logits = base.model(input_ids=ids, use_cache=False).logits[0, -1]
    letters = torch.tensor(base.prompter.letter_ids[:2])
    return logits[letters].double().softmax(dim=0)


def adapted_without_folds(call, run, data, out, *more):
    given = ("--run", run, "--data", data, "--out", out, "--folds", 0, "--device", "cpu", *more)
    assert call("adapt", *given)[0] == 0
    return out
