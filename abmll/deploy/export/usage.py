"""The part of a model card that can be run: the exact prompt, and code that gives the options' probabilities."""

from __future__ import annotations

import json
import shlex

from abmll.deploy.export.report import Report
from abmll.deploy.export.subject import Subject
from abmll.tasks.checks import LETTERS


def how_to_ask(subject: Subject) -> str:
    """The section about the prompt, whose code makes `prompt` and `options`."""
    before, after, special = prompt_frame(subject)
    own = subject.card.options is None
    lines = [f"BEFORE = {_text(before)}", f"AFTER = {_text(after)}", f"text = {_text(subject.examples[0].input)}"]
    if own:
        lines += [
            f"options = {_text(list(subject.examples[0].options))}",
            'choices = "\\n".join(f"{letter}) {option}" for letter, option in zip("' + LETTERS + '", options))',
            'prompt = BEFORE + text + "\\n\\nChoices:\\n" + choices + AFTER',
        ]
    else:
        lines += [f"options = {_text(list(subject.card.options))}", "prompt = BEFORE + text + AFTER"]
    tasks = subject.base.config.tasks
    number = len(subject.card.demonstrations) - subject.prompts[0].left_out
    shown = (
        f" Its {number} answered examples are part of every prompt; before a text that leaves no room for all of them "
        "`predict` shows fewer, which the code below does not."
        if number
        else ""
    )
    return (
        "## Prompt\n\nThe adapter knows this form and no other; a chat template of the server's must not be put around "
        f"it.{shown} Tokenize it {'with' if special else 'without'} adding special tokens. Prompts were at most "
        f"{tasks.max_tokens} tokens long. A text that spells one of the tokenizer's special tokens was given a space "
        "behind its first character.\n\n```python\n" + "\n".join(lines) + "\n```"
    )


def prompt_frame(subject: Subject) -> tuple[str, str, bool]:
    """What stands before the text and behind it (with options of a question's own: behind these), and whether the
    tokenizer adds special tokens to that.
    """
    tokenizer, example, ids = subject.base.tokenizer, subject.examples[0], list(subject.prompts[0].token_ids)
    text, special = subject.base.prompter.prompt(example), not getattr(tokenizer, "chat_template", None)
    if tokenizer(text, add_special_tokens=special)["input_ids"] != ids:  # demonstrations were left out or shortened
        text, special = tokenizer.decode(ids, clean_up_tokenization_spaces=False), False
    before, _, after = text.rpartition(example.input)
    if subject.card.options is None:
        choices = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, example.options, strict=False))
        after = after.removeprefix(f"\n\nChoices:\n{choices}")
    return before, after, special


def how_to_use(subject: Subject, report: Report) -> str:
    """The section whose code makes `probabilities` of them."""
    special = prompt_frame(subject)[2]
    load = _load_peft(subject) if report.format == "peft" else _load_merged()
    code = [
        "import torch",
        *load,
        f"LETTER_IDS = {list(subject.base.prompter.letter_ids)}",
        f'ids = tokenizer(prompt, return_tensors="pt", add_special_tokens={special}).input_ids',
        "with torch.no_grad():",
        "    logits = model(input_ids=ids).logits[0, -1, LETTER_IDS[: len(options)]]",
        "probabilities = dict(zip(options, logits.double().softmax(dim=0).tolist()))",
    ]
    temperature = subject.card.temperature
    calibrated = (
        f" Cross-validation found the temperature {temperature:.3g}: dividing the logits by it calibrates them."
        if temperature is not None
        else ""
    )
    return (
        "## Use\n\nIn this folder, behind the lines above:\n\n```python\n" + "\n".join(code) + "\n```\n\n"
        f"An option's probability is its letter's among the letters of the options.{calibrated}\n\n"
        + _serve(subject, report, special)
    )


def _load_peft(subject: Subject) -> list[str]:
    config, source = subject.base.config.model, subject.source
    named = {"revision": config.revision} if config.revision else {}
    if source.kind == "gguf":
        named |= {"gguf_file": source.pretrained["gguf_file"]}
    where = source.pretrained["pretrained_model_name_or_path"] if source.kind == "gguf" else subject.base_name
    tokens = "".join(f", {key}={_text(value)}" for key, value in named.items())
    imports, weights = "AutoModelForCausalLM, AutoTokenizer", f"{tokens}, dtype=torch.{config.dtype}"
    if source.kind == "gguf":
        imports, weights = f"{imports}, GgufConfig", f"{weights}, quantization_config=GgufConfig(dequantize=True)"
    elif config.quantization == "nf4":
        packed = (
            "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
            f"bnb_4bit_compute_dtype=torch.{config.dtype})"
        )
        imports, weights = f"{imports}, BitsAndBytesConfig", f"{weights}, quantization_config={packed}"
    return [
        "from peft import PeftModel",
        f"from transformers import {imports}",
        f"base = AutoModelForCausalLM.from_pretrained({_text(where)}{weights})",
        'model = PeftModel.from_pretrained(base, ".").eval()',
        f"tokenizer = AutoTokenizer.from_pretrained({_text(where)}{tokens})",
    ]


def _load_merged() -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained(".").eval()',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]


def _serve(subject: Subject, report: Report, special: bool) -> str:
    if report.format == "peft" and subject.source.kind == "gguf":
        return "For vLLM use the format merged."
    if report.format == "peft":
        rank = max(8, 2 ** (subject.rank - 1).bit_length())
        base = shlex.quote(subject.base_name)
        command = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=."
    else:
        command = "vllm serve . --served-model-name adapter"
    request = {
        "model": "adapter",
        "prompt": "PROMPT",
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 20,
        "add_special_tokens": special,
    }
    return (
        f"With vLLM:\n\n```sh\n{command}\n```\n\nand POST to `/v1/completions` (not `/v1/chat/completions`):\n\n"
        f"```json\n{json.dumps(request)}\n```\n\nThe answer is the likeliest of the letters' tokens in `top_logprobs`; "
        "their exponentials, divided by their sum, are the options' probabilities (0 of a letter that is not there)."
    )


def _text(value: object) -> str:
    """A Python literal that is also JSON: on one line, so that nothing in it ends a code block."""
    return json.dumps(value, ensure_ascii=False)
