"""Prompts: exact text, letters, and what happens to those that are too long."""

import pytest

from abmll.tasks.checks import LETTERS
from abmll.tasks.jsonl import load_jsonl_tasks
from abmll.tasks.prompt import Limits, Prompter
from abmll.tasks.task import Example, Task

EXAMPLE = Example("Who was sued?", ("Jason", "Steven"), "Steven")
TEXT = (
    "Return the label of the correct answer for the question below.\n\n"
    "Question: Who was sued?\n\nChoices:\nA) Jason\nB) Steven"
)
LONG = Example("premise: " + "x" * 400 + " hypothesis: end", ("Jason", "Steven"), "Jason")


def task(*train, validation=(), test=()):
    return Task("t", tuple(train), tuple(validation), tuple(test))


def decoded(prompter, ids):
    return prompter.tokenizer.decode(list(ids))


def test_text_without_a_template(plain_tokenizer):
    prompter = Prompter(plain_tokenizer, 1024, "drop")
    assert prompter.prompt(EXAMPLE) == TEXT + "\n\nAnswer:"
    (example,) = prompter.encode([EXAMPLE])
    assert decoded(prompter, example.token_ids) == "<s>" + TEXT + "\n\nAnswer:"
    assert list(example.token_ids).count(plain_tokenizer.bos_token_id) == 1
    assert (example.label, example.num_options) == (1, 2)


def test_text_through_a_template_has_one_bos(chat_tokenizer):
    prompter = Prompter(chat_tokenizer, 1024, "drop")
    assert prompter.prompt(EXAMPLE) == f"<s><user>{TEXT}</user><bot>\n"
    (example,) = prompter.encode([EXAMPLE])
    assert decoded(prompter, example.token_ids) == f"<s><user>{TEXT}</user><bot>\n"
    assert list(example.token_ids).count(chat_tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["plain_tokenizer", "chat_tokenizer", "metaspace_tokenizer"])
def test_prompt_is_what_the_template_renders(kind, request):
    tokenizer = request.getfixturevalue(kind)
    prompter = Prompter(tokenizer, 1024, "drop")
    odd = Example("{{ braces }} {% if %} \\1 </user>", ("a", "b "), "a")
    text = prompter.prompt(odd)
    assert "Question: {{ braces }} {% if %} \\1 </user>\n\nChoices:\nA) a\nB) b" in text
    if tokenizer.chat_template:
        content = text.removeprefix("<s><user>").removesuffix("</user><bot>\n")
        message = [{"role": "user", "content": content}]
        assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == text


@pytest.mark.parametrize(
    ("kind", "written"), [("plain_tokenizer", " {}"), ("chat_tokenizer", "{}"), ("metaspace_tokenizer", " {}")]
)
def test_letters_follow_the_prompt(kind, written, request):
    prompter = Prompter(request.getfixturevalue(kind), 1024, "drop")
    (example,) = prompter.encode([EXAMPLE])
    assert len(set(prompter.letter_ids)) == 26
    prompt = decoded(prompter, example.token_ids)
    for letter, token in zip(LETTERS, prompter.letter_ids, strict=True):
        assert decoded(prompter, [*example.token_ids, token]) == prompt + written.format(letter)


def test_letters_without_a_space_where_the_tokenizer_has_no_other(make_tokenizer):
    prompter = Prompter(make_tokenizer(merges="AB"), 1024, "drop")
    assert [prompter.tokenizer.decode([token]) for token in prompter.letter_ids] == list(LETTERS)


def test_letters_that_cannot_serve_name_the_tokenizer(make_tokenizer, chat_tokenizer):
    from tokenizers import processors

    appends_eos = make_tokenizer(bos=False)
    appends_eos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", appends_eos.bos_token_id)]
    )
    with pytest.raises(ValueError, match="tokenizer bytes: cannot write every answer's letter"):
        Prompter(appends_eos, 1024, "drop")
    joins_letters = make_tokenizer(template="{{ messages[0]['content'] }} ")  # " A" is one token, " " then is not
    with pytest.raises(ValueError, match=r"tokenizer bytes: .*A, B, C, D, E as 'A'"):
        Prompter(joins_letters, 1024, "drop")


@pytest.mark.parametrize(
    "template", ["no message", "{{ messages[0]['content'] * 2 }}", "{{ messages[0]['content'] | lower }}"]
)
def test_template_that_changes_the_message_is_an_error(template, make_tokenizer):
    with pytest.raises(ValueError, match="tokenizer bytes: its chat template"):
        Prompter(make_tokenizer(template=template), 1024, "drop")


def test_template_variables_make_prompts_the_same_every_day(make_tokenizer):
    template = "{{ date_string }}|{{ enable_thinking }}|{{ messages[0]['content'] }}"
    assert Prompter(make_tokenizer(template=template), 1024, "drop").prompt(EXAMPLE) == f"26 Jul 2024|False|{TEXT}"
    template = "{%- set today = strftime_now('%d %B %Y') -%}{{ today }}|{{ messages[0]['content'] }}"
    assert Prompter(make_tokenizer(template=template), 1024, "drop").prompt(EXAMPLE) == f"26 Jul 2024|{TEXT}"


@pytest.mark.parametrize("kind", ["plain_tokenizer", "chat_tokenizer"])
def test_truncation_shortens_the_question_only(kind, request):
    prompter = Prompter(request.getfixturevalue(kind), 180, "truncate")
    long, short = prompter.encode([LONG, EXAMPLE])
    assert (long.truncated, short.truncated) == (True, False)
    text = decoded(prompter, long.token_ids)
    assert 170 < len(long.token_ids) <= 180
    assert "question below.\n\nQuestion: prem" in text
    assert " ... " in text
    assert "end\n\nChoices:\nA) Jason\nB) Steven" in text
    assert text.endswith(prompter.prompt(EXAMPLE)[-8:])
    assert [short] == Prompter(prompter.tokenizer, 999, "drop").encode([EXAMPLE])
    counts = prompter.measure(task(LONG, EXAMPLE))
    assert (counts.total, counts.truncated, counts.dropped) == (2, 1, 0)
    assert counts.longest == max(len(long.token_ids), len(short.token_ids))


def test_longest_prompt_that_fits_is_kept_whole(plain_tokenizer):
    (whole,) = Prompter(plain_tokenizer, 999, "drop").encode([EXAMPLE])
    size = len(whole.token_ids)
    assert Prompter(plain_tokenizer, size, "drop").encode([EXAMPLE]) == [whole]
    assert Prompter(plain_tokenizer, size - 1, "drop").encode([EXAMPLE]) == [None]


def test_dropping_is_counted_over_all_splits(plain_tokenizer):
    prompter = Prompter(plain_tokenizer, 180, "drop")
    mixed = task(LONG, EXAMPLE, LONG, validation=[EXAMPLE], test=[EXAMPLE, LONG])
    counts = prompter.measure(mixed)
    assert (counts.total, counts.truncated, counts.dropped) == (6, 0, 3)
    assert counts.loss("t", 180) == "t: of 6 prompts 0 truncated and 3 dropped at 180 tokens"
    assert prompter.measure(mixed, Limits(train=0, test=0)).loss("t", 180) == ""


def test_what_cannot_be_truncated_is_dropped(plain_tokenizer):
    wide = Example("?" * 50, ("y" * 200, "n"), "n")
    prompter = Prompter(plain_tokenizer, 180, "truncate")
    assert [example is None for example in prompter.encode([wide, LONG, EXAMPLE])] == [True, False, False]
    counts = prompter.measure(task(wide, LONG, EXAMPLE))
    assert (counts.total, counts.truncated, counts.dropped) == (3, 1, 1)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_split_left_empty_names_the_remedy(split, plain_tokenizer):
    splits = {"train": [EXAMPLE], "validation": [EXAMPLE], "test": [EXAMPLE], split: [LONG]}
    with pytest.raises(
        ValueError, match=rf"task t: none of its 1 {split} prompts fits in tasks\.max_tokens: 180; raise it"
    ):
        Prompter(plain_tokenizer, 180, "drop").prompt_task(
            Task("t", **{name: tuple(rows) for name, rows in splits.items()})
        )


def test_limits_draw_the_same_examples(plain_tokenizer):
    rows = [Example(f"{number:03}", ("a", "b"), "ab"[number % 2]) for number in range(100)]
    prompter = Prompter(plain_tokenizer, 1024, "drop")

    def drawn(limits):
        prompted = prompter.prompt_task(task(*rows, test=rows), limits)
        return prompted.train.take(range(len(prompted.train))), list(prompted.test)

    train, test = drawn(Limits(train=10, test=20))
    assert (len(train), len(test)) == (10, 20)
    assert (train, test) == drawn(Limits(train=10, test=20))
    whole, _ = drawn(Limits())
    assert [example for example in whole if example in train] == train
    assert train != whole[:10]  # a file sorted by label must not give one label only
    assert drawn(Limits(test=0))[1] == []


@pytest.mark.demo
def test_demo_tokenizer(smollm2_tokenizer):
    prompter = Prompter(smollm2_tokenizer, 1024, "drop")
    (example,) = prompter.encode([EXAMPLE])
    text = smollm2_tokenizer.decode(list(example.token_ids))
    assert text == prompter.prompt(EXAMPLE)
    assert text.endswith(f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n")
    assert [smollm2_tokenizer.decode([token]) for token in prompter.letter_ids] == list(LETTERS)
    message = [{"role": "user", "content": TEXT}]
    whole = smollm2_tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert list(example.token_ids) == list(whole)


@pytest.mark.demo
@pytest.mark.crossfit
def test_real_prompts_have_sane_lengths(smollm2_tokenizer, crossfit):
    names = sorted(path.name for path in crossfit.iterdir() if path.is_dir())
    prompter = Prompter(smollm2_tokenizer, 1024, "drop")
    tasks = load_jsonl_tasks(crossfit, names).tasks.values()
    assert len(tasks) == 59
    for loaded in tasks:
        assert min(len(example.token_ids) for example in prompter.encode(loaded.train[:50])) > 50
        counts = prompter.measure(loaded, Limits(train=50, test=50))
        # inputs have at most 1,500 characters: nothing should come near the default limit
        assert counts.dropped == 0 and 60 < counts.longest < 900
