"""Runs whose base is a folder, as others have it, and models of tasks adapted from them."""

from __future__ import annotations

import re

import torch
from deployed import EXAMPLES, save_run

from abmll import MetaModel
from abmll.config.schema import ModelConfig
from abmll.models.architectures import architecture_config
from abmll.models.load import load_model


def save_base(folder, tied=False, template=True):
    """The tiny random model as a Hugging Face folder, in fp32."""
    model, tokenizer = load_model(ModelConfig(name="random:tiny", dtype="float32"), "cpu")
    if tied:
        config = architecture_config("tiny")
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        model = type(model)(config)
    if not template:
        tokenizer.chat_template = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapted_from(build_tiny, base, folder, examples=EXAMPLES, dtype="float32", task="moods", folds=0, **sections):
    """A task's model over a base: theta off its start, then the run's three steps."""
    model = {"name": base, "dtype": dtype, **sections.pop("model", {})}
    run = save_run(build_tiny(seed=3, model=model, **sections), folder)
    return MetaModel.load(run, device="cpu").adapt(examples, task, folds)


def code_of(card):
    """The Python of a model card, in order."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL))
