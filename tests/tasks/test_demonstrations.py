"""Demonstrations: exact prompts, what gives way where they are too long, and who is shown to whom."""

import re
from dataclasses import replace

import pytest

from abmll.tasks.checks import LETTERS
from abmll.tasks.episodes import EpisodeSampler, PooledSampler, in_batches, scored_examples, support_examples
from abmll.tasks.examples import Demonstrations
from abmll.tasks.prompt import Prompter
from abmll.tasks.task import Example, Task

INSTRUCTION = "Return the label of the correct answer for the question below.\n\n"
FORMER = (Example("Why?", ("fun", "gain"), "gain"), Example("When?", ("now", "later", "never"), "now"))
EXAMPLE = Example("Who was sued?", ("Jason", "Steven"), "Steven", FORMER)
QUESTIONS = (
    INSTRUCTION + "Question: Why?\n\nChoices:\nA) fun\nB) gain",
    INSTRUCTION + "Question: When?\n\nChoices:\nA) now\nB) later\nC) never",
    INSTRUCTION + "Question: Who was sued?\n\nChoices:\nA) Jason\nB) Steven",
)
TURNS = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] | trim }}</user>"
    "{% else %}<bot>\n{{ m['content'] | trim }}</bot>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>\n{% endif %}"
)
# The rule of Llama-2's: letters behind a space, and a closing piece of its own behind a former answer.
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
VERBATIM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def prompter_of(tokenizer, count=2, max_tokens=2048, too_long="truncate", demonstrate="test"):
    return Prompter(tokenizer, max_tokens, too_long, Demonstrations(count, demonstrate))


def decoded(prompter, example):
    return prompter.tokenizer.decode(list(example.token_ids))


def test_text_without_a_template(plain_tokenizer):
    prompter = prompter_of(plain_tokenizer)
    one, two, last = QUESTIONS
    expected = f"{one}\n\nAnswer: B\n\n{two}\n\nAnswer: A\n\n{last}\n\nAnswer:"
    assert prompter.prompt(EXAMPLE) == expected
    (example,) = prompter.encode([EXAMPLE])
    assert decoded(prompter, example) == "<s>" + expected
    assert (example.label, example.num_options, example.truncated, example.left_out) == (1, 2, False, 0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS, "<s><user>{}</user><bot>\nB</bot><user>{}</user><bot>\nA</bot><user>{}</user><bot>\n"),
        (SPACED, "[INST] {} [/INST] B </s>[INST] {} [/INST] A </s>[INST] {} [/INST]"),
        (VERBATIM, "[INST] {} [/INST] B</s>[INST] {} [/INST] A</s>[INST] {} [/INST]"),
    ],
)
def test_text_through_a_template(template, expected, make_tokenizer):
    prompter = prompter_of(make_tokenizer(template))
    (example,) = prompter.encode([EXAMPLE])
    assert decoded(prompter, example) == prompter.prompt(EXAMPLE) == expected.format(*QUESTIONS)
    assert list(example.token_ids).count(prompter.tokenizer.bos_token_id) == expected.count("<s>")


@pytest.mark.parametrize("template", [None, TURNS, SPACED, VERBATIM])
def test_a_former_answer_is_the_token_that_the_model_would_write(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    prompter = prompter_of(tokenizer, 1)
    assert prompter.letter_ids == Prompter(tokenizer, 999, "drop").letter_ids
    options = tuple(f"option {letter}" for letter in LETTERS)
    prompts = [Example("?", ("x", "y"), "x", (Example("!", options, right),)) for right in options]
    ids = [example.token_ids for example in prompter.encode(prompts)]
    differing = [column for column in zip(*ids, strict=True) if len(set(column)) > 1]
    assert differing == [prompter.letter_ids]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}\n",
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}\n",
        TURNS.replace("{{ m['content'] | trim }}</bot>", "{{ m['content'] | lower }}</bot>"),
        # as templates that shorten the history: only so many turns are kept
        TURNS.replace("in messages %}{% if", "in messages[-3:] %}{% if"),
    ],
)
def test_a_template_that_cannot_repeat_answers_names_the_remedy(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    Prompter(tokenizer, 999, "drop")
    with pytest.raises(ValueError, match=r"tokenizer bytes: .*former questions.*; set tasks\.demonstrations=0"):
        prompter_of(tokenizer, 2)


def test_a_template_is_held_to_as_many_answers_as_are_asked_for(make_tokenizer):
    """One answered question is what this one keeps: one demonstration passes, two do not (see above)."""
    prompter = prompter_of(make_tokenizer(TURNS.replace("in messages %}{% if", "in messages[-3:] %}{% if")), 1)
    assert prompter.prompt(Example("?", ("x", "y"), "x", FORMER[:1])).count("<bot>\n") == 2


def test_the_farthest_demonstration_gives_way_first(plain_tokenizer):
    whole = prompter_of(plain_tokenizer)
    size = len(whole.encode([EXAMPLE])[0].token_ids)
    long = Example("Who " + "was " * 90 + "sued?", EXAMPLE.options, EXAMPLE.output, FORMER)
    shorter = Example(long.input, long.options, long.output, FORMER[1:])
    with_one, alone = (len(whole.encode([one])[0].token_ids) for one in (shorter, Example(*question(long))))
    assert size < with_one
    for limit, kept, truncated in ((with_one, [1], False), (with_one - 1, [], False), (alone - 1, [], True)):
        prompter = prompter_of(plain_tokenizer, max_tokens=limit)
        (example,) = prompter.encode([long])
        assert (example.left_out, example.truncated) == (2 - len(kept), truncated)
        assert len(example.token_ids) <= limit
        text = decoded(prompter, example)
        assert [former for former in FORMER if f"Question: {former.input}\n" in text] == [FORMER[at] for at in kept]
        assert truncated or text.endswith(f"Question: {long.input}\n\nChoices:\nA) Jason\nB) Steven\n\nAnswer:")
    (cut,) = Prompter(plain_tokenizer, alone - 1, "truncate").encode([Example(*question(long))])
    assert prompter_of(plain_tokenizer, max_tokens=alone - 1).encode([long]) == [replace(cut, left_out=2)]


def question(example):
    return example.input, example.options, example.output


def test_a_long_demonstration_is_cut_to_its_share_or_left_out(plain_tokenizer):
    long = Example("start " + "x" * 800 + " end", ("yes", "no"), "no")
    asked = Example("Who?", ("Jason", "Steven"), "Jason", (long, FORMER[0]))
    cutting = prompter_of(plain_tokenizer, max_tokens=600)  # a share of 200 bytes, BOS included
    (example,) = cutting.encode([asked])
    text = decoded(cutting, example)
    first, rest = text.split("\n\nAnswer: B\n\n", 1)
    assert 195 <= len(f"{first.removeprefix('<s>')}\n\nAnswer:") + 1 <= 200
    assert re.search(r"Question: start x+ \.\.\. x+ end\n\nChoices:\nA\) yes\nB\) no$", first)
    assert rest.startswith(QUESTIONS[0])
    assert (example.left_out, example.truncated) == (0, False), "of the question nothing is lost"
    (example,) = prompter_of(plain_tokenizer, max_tokens=600, too_long="drop").encode([asked])
    assert example.left_out == 1
    assert decoded(cutting, example) == "<s>" + cutting.prompt(Example(*question(asked), (FORMER[0],)))


def test_no_room_for_demonstrations_is_an_error(plain_tokenizer):
    bare = len("<s>") - 2 + len(INSTRUCTION + "Question: \n\nChoices:\nA) yes\nB) no\n\nAnswer:")
    remedy = rf"tasks\.demonstrations: 3: .*tasks\.max_tokens: {4 * bare}, .*takes {bare}; .* at least {4 * (bare + 1)}"
    with pytest.raises(ValueError, match=remedy):
        prompter_of(plain_tokenizer, 3, 4 * bare)
    prompter_of(plain_tokenizer, 3, 4 * (bare + 1))


def rows(name, count, first=0):
    return tuple(Example(f"{name}-{number}", ("a", "b"), "ab"[number % 2]) for number in range(first, first + count))


def support_of(prompter, prompted, count, seed=0):
    """The batches of an adaptation, two examples each."""
    return in_batches(support_examples(prompted, count, seed), prompter.letter_ids, 2)


def shown(prompter, batches):
    """Of every prompt: the questions in it, the scored one last."""
    prompts = [prompt.tolist() for batch in batches for prompt in batch.input_ids.split(batch.prompts.sizes)]
    return [re.findall(r"Question: (\S+)", prompter.tokenizer.decode(prompt)) for prompt in prompts]


def prompts_of(episode):
    return (*episode.support, *([episode.query] if episode.query else []))


def test_adaptation_leaves_one_out(plain_tokenizer):
    task = Task("t", rows("t", 40), (), rows("t", 5, 100))
    lists = {}
    for count, demonstrate in ((3, "adaptation"), (9, "always"), (3, "test")):
        prompter = prompter_of(plain_tokenizer, count, 4096, demonstrate=demonstrate)
        found = lists[count, demonstrate] = shown(prompter, support_of(prompter, prompter.prompt_task(task), 6))
        support = {questions[-1] for questions in found}
        assert len(found) == len(support) == 6
        for questions in found:
            assert len(set(questions)) == len(questions) == 1 + (0 if demonstrate == "test" else min(count, 5))
            assert set(questions) <= support
    assert [q[-1] for q in lists[3, "adaptation"]] == [q[-1] for q in lists[3, "test"]], "adapts to the same examples"
    assert len({tuple(q[:-1]) for q in lists[3, "adaptation"]}) == 6, "drawn anew for each"


def test_examples_that_come_back_are_not_shown_to_themselves(plain_tokenizer):
    """Two rows for six places; one is written twice in the file."""
    task = Task("t", (*rows("t", 2), *rows("t", 1)), (), ())
    prompter = prompter_of(plain_tokenizer, 4, 4096, demonstrate="adaptation")
    found = shown(prompter, support_of(prompter, prompter.prompt_task(task), 6))
    others = {"t-0": {"t-1"}, "t-1": {"t-0"}}
    assert all(set(questions[:-1]) == others[questions[-1]] for questions in found) and len(found) == 6


@pytest.mark.parametrize("demonstrate", ["test", "adaptation", "always"])
def test_all_questions_of_a_task_have_the_same_demonstrations(demonstrate, plain_tokenizer):
    twin = rows("t", 40)
    task = Task("t", twin, rows("t", 4, 100), (*rows("t", 6, 200), *twin))
    prompter = prompter_of(plain_tokenizer, 3, demonstrate=demonstrate)

    def scored(split, seed, steps=3):
        prompted = prompter.prompt_task(task)
        support = [q[-1] for q in shown(prompter, support_of(prompter, prompted, 2 * steps, seed))]
        texts = [decoded(prompter, example) for example in scored_examples(prompted, split, 2 * steps, seed)]
        return support, [re.findall(r"Question: (\S+)", text) for text in texts]

    support, found = scored("test", 0)
    first = support[:3]
    assert [questions[:-1] for questions in found[:6]] == [first] * 6
    for questions in found:  # a training example among the scored ones does not see its own answer
        assert questions[:-1] == [name for name in first if name != questions[-1]]
    assert [questions[-1] for questions in found] == [row.input for row in task.test]
    assert scored("test", 0)[1] == found
    assert [questions[:-1] for questions in scored("validation", 0)[1]] == [first] * 4
    assert scored("test", 0, steps=5)[1] == found, "more steps keep the demonstrations"
    assert scored("test", 1)[1][0][:-1] != first


def test_scored_prompts_are_made_once(plain_tokenizer, monkeypatch):
    prompter = prompter_of(plain_tokenizer, 3)
    task = prompter.prompt_task(Task("t", rows("t", 20), (), rows("t", 30, 100)))
    texts, encode = [], prompter._encode
    monkeypatch.setattr(prompter, "_encode", lambda more: texts.extend(more) or encode(more))
    for _ in range(3):
        assert len(scored_examples(task, "test", 6, 0)) == 30
    assert len(texts) == 3 * 2 + 3 + 30, "the support set, the demonstrations cut to their shares, the prompts"


@pytest.mark.parametrize("query", [False, True])
def test_training_shows_an_episodes_own_support(query, plain_tokenizer):
    def sampler(demonstrate, seed=0):
        prompter = prompter_of(plain_tokenizer, 2, demonstrate=demonstrate)
        tasks = [prompter.prompt_task(Task(name, rows(name, 30), (), ())) for name in ("one", "two")]
        return prompter, EpisodeSampler(tasks, prompter.letter_ids, seed, 2, 3, query)

    prompter, always = sampler("always")
    _, plain = sampler("adaptation")
    episodes = [always.episode(index) for index in range(6)]
    for index, episode in enumerate(episodes):
        found = shown(prompter, prompts_of(episode))
        support = {questions[-1] for questions in found[:6]}
        assert len(support) == 6 and len(found) == 6 + 3 * query
        for questions in found:
            assert len(set(questions)) == 3 and set(questions[:-1]) <= support
        without = shown(prompter, prompts_of(plain.episode(index)))
        assert without == [[questions[-1]] for questions in found], "the same episodes; demonstrations only in always"
        assert always.num_tokens(index) == episode.num_tokens > plain.episode(index).num_tokens
    # the same whoever asks, in whatever order
    _, other = sampler("always")
    assert [shown(prompter, prompts_of(other.episode(i))) for i in (5, 2)] == [
        shown(prompter, prompts_of(episodes[i])) for i in (5, 2)
    ]
    assert shown(prompter, prompts_of(sampler("always", 1)[1].episode(0))) != shown(prompter, prompts_of(episodes[0]))


def test_the_pool_shows_examples_of_the_same_task(plain_tokenizer):
    def sampler(demonstrate):
        prompter = prompter_of(plain_tokenizer, 2, demonstrate=demonstrate)
        tasks = [prompter.prompt_task(Task(name, rows(name, size), (), ())) for name, size in (("one", 30), ("two", 2))]
        return prompter, PooledSampler(tasks, prompter.letter_ids, 0, 2, 4, False)

    prompter, always = sampler("always")
    found = [shown(prompter, always.episode(index).support) for index in range(4)]
    for questions in (questions for episode in found for questions in episode):
        kind = questions[-1].partition("-")[0]
        assert {name.partition("-")[0] for name in questions} == {kind}
        assert len(questions) == len(set(questions)) == (3 if kind == "one" else 2)
    assert {questions[-1] for episode in found for questions in episode} == {
        row.input for name, size in (("one", 30), ("two", 2)) for row in rows(name, size)
    }
    assert [shown(prompter, sampler("always")[1].episode(index).support) for index in (3, 1)] == [found[3], found[1]]
    plain = [shown(prompter, sampler("test")[1].episode(index).support) for index in range(4)]
    assert plain == [[questions[-1:] for questions in episode] for episode in found]


def test_what_was_left_out_is_counted(plain_tokenizer):
    """Three test questions, of which the long one has no room for any of its two demonstrations."""
    long = Example("y" * 460, ("a", "b"), "a")
    task = Task("t", rows("t", 5), (), (*rows("t", 2, 10), long))
    prompter = prompter_of(plain_tokenizer, max_tokens=600)
    counts = prompter.measure(task, before_scored=2)
    assert (counts.total, counts.truncated, counts.dropped, counts.left_out) == (8, 0, 0, 2)
    told = "t: of 8 prompts 0 truncated and 0 dropped at 600 tokens; 2 demonstrations were left out"
    assert counts.loss("t", 600) == told
    alone, behind = (prompter.measure(Task("t", task.train, (), ()), before_train=count) for count in (0, 2))
    assert (alone.left_out, behind.left_out) == (0, 0)
    block = len(INSTRUCTION + "Question: t-0\n\nChoices:\nA) a\nB) b\n\nAnswer: A\n\n") - 1  # " A" is one token
    assert behind.longest == alone.longest + 2 * block


@pytest.mark.demo
def test_demo_tokenizer(smollm2_tokenizer):
    prompter = prompter_of(smollm2_tokenizer)
    (example,) = prompter.encode([EXAMPLE])
    one, two, last = QUESTIONS
    roles = ("user", one), ("assistant", "B"), ("user", two), ("assistant", "A"), ("user", last)
    messages = [{"role": role, "content": content} for role, content in roles]
    whole = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(example.token_ids) == list(whole)
    assert prompter.letter_ids == Prompter(smollm2_tokenizer, 999, "drop").letter_ids
