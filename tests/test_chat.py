"""Conversations: written as the model's own chat template says, token for token as transformers
writes them, at the cost of the new tokens only."""

import io
import itertools
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import sample
from lib import chat, hf_files, models
from smollm import InputError
from tests.helpers import TINY_1000, greedy

# ---- Templates of five families, with what marks them out

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are Bob the pirate<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# the end of a text ends a turn; blocks on lines of their own, which must leave no trace
ZEPHYR = """
{% for message in messages %}
    {% if message.role == 'user' %}
{{ '<|user|>\\n' ~ message.content ~ eos_token }}
    {% elif message.role == 'system' %}
{{ '<|system|>\\n' ~ message.content ~ eos_token }}
    {% elif message.role == 'assistant' %}
{{ '<|assistant|>\\n'  ~ message.content ~ eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}
"""

# no role but by turns, each text trimmed; the system's words stand inside of the first question
INST = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}\
{% set turns = messages[1:] %}{% else %}{% set system = none %}{% set turns = messages %}\
{% endif %}\
{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must take turns: user, assistant, user, assistant, ...') }}{% endif %}\
{% if loop.index0 == 0 and system is not none %}\
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + turn['content'] %}\
{% else %}{% set content = turn['content'] %}{% endif %}\
{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

# a header for each turn, and a system turn that tells the date
HEADERS = """{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday is ' + date + '.\\n' + system }}
{{- '<|eot_id|>' }}
{%- if tools is not none %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- for message in messages %}
    {%- if message.content is not string %}{%- continue %}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# thoughts are asked for by a variable or a word of the system's, and are not shown again
THINKING = """{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{%- set ns = namespace(mode='/think' if enable_thinking else '/no_think', custom='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.custom = messages[0].content %}
    {%- if '/no_think' in ns.custom %}{%- set ns.mode = '/no_think' %}{%- endif %}
    {%- set ns.custom = ns.custom.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' ~ strftime_now('%d %B %Y') }}
{{- '\\nReasoning Mode: ' ~ ns.mode ~ '\\n\\n## Custom Instructions\\n\\n' }}
{{- ns.custom or 'You are a helpful AI assistant.' }}
{{- '\\n<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- generation %}
        {%- if ns.mode == '/think' %}
            {{- '<|im_start|>assistant\\n' ~ content ~ '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' ~ content ~ '<|im_end|>\\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if ns.mode == '/no_think' %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}
{%- endif %}
"""

TEMPLATES = {"ChatML": CHATML, "Zephyr": ZEPHYR, "INST": INST, "headers": HEADERS,
             "thinking": THINKING}
EVERY_TEMPLATE = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
TALK = ["  What is\n gravity? ", "<think>\nhm\n</think>\nA <force> & \"more\"…", "{{ messages }} ü",
        "<|im_end|> 漢字 🙂", ""]
SYSTEMS = {"no system": None, "system": "Be <b>brief</b>.\n", "no thoughts": "/no_think Rhyme."}


def write_template(folder: Path, template, where: str = "chat_template.jinja"):
    """Give the directory a template, and the names of tokens that it may use."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
                "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False,
                              "normalized": False, "rstrip": False, "single_word": False}}
    if where == "chat_template.jinja":
        (folder / where).write_text(template)
    else:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def template_of(folder: Path) -> chat.ChatTemplate:
    bundle = models.load(folder)
    return chat.load(bundle.tokenizer, bundle.model.config, bundle.files, folder)[0]


def conversation(*said: str, system: str | None = None) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for role, content in zip(itertools.cycle(["user", "assistant"]), said, strict=False):
        messages.append({"role": role, "content": content})
    return messages


@EVERY_TEMPLATE
@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_a_conversation_is_written_as_transformers_writes_it(template, system, valid):
    write_template(valid, template)
    ours = template_of(valid)
    tokenizer = models.load(valid).tokenizer
    theirs = AutoTokenizer.from_pretrained(valid)
    for length in range(1, len(TALK) + 1):
        messages = conversation(*TALK[:length], system=system)
        for how in ({"add_generation_prompt": True}, {"add_generation_prompt": False},
                    {"add_generation_prompt": True, "enable_thinking": False}):
            text = ours.render(messages, **how)
            assert text == theirs.apply_chat_template(messages, tokenize=False, **how)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            expected = theirs.apply_chat_template(messages, **how)["input_ids"]
            assert ids == expected, text


WHERE = {
    "a file": (CHATML, "chat_template.jinja"),
    "a string": (CHATML, "tokenizer_config.json"),
    "the default of several": ([{"name": "tool_use", "template": "other"},
                                {"name": "default", "template": CHATML}], "tokenizer_config.json"),
    "the default in a dict": ({"default": CHATML}, "tokenizer_config.json"),
}


@pytest.mark.parametrize(("template", "where"), WHERE.values(), ids=WHERE)
def test_a_template_is_found_where_transformers_finds_it(template, where, valid):
    write_template(valid, template, where)
    messages = conversation("Hi")
    text = template_of(valid).render(messages)
    assert "Bob the pirate" in text
    theirs = AutoTokenizer.from_pretrained(valid)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_file_comes_before_a_string(valid):
    write_template(valid, "of the string", "tokenizer_config.json")
    (valid / "chat_template.jinja").write_text("of the file")
    assert template_of(valid).render(conversation("Hi")) == "of the file"
    theirs = AutoTokenizer.from_pretrained(valid)
    assert theirs.apply_chat_template(conversation("Hi"), tokenize=False) == "of the file"


# ---- Without a template, and templates that can't be used


def test_without_a_template_it_is_chatml_which_ends_with_its_own_token(tokenizer):
    template, ends = chat.load(tokenizer, TINY_1000, {}, "it")
    text = template.render(conversation("Hi", "Ho", "Hm", system="Sing."))
    assert text == ("<|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                    "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nHm<|im_end|>\n"
                    "<|im_start|>assistant\n")
    assert ends == [0, tokenizer.token_to_id("<|im_end|>")]
    assert template.render(conversation("Hi")).startswith("<|im_start|>user\n")


REFUSED = {
    "the chat template: can't be read": "{% if %}",
    "the chat template: can't be rendered: Roles must take turns":
        "{{ raise_exception('Roles must take turns') }}",
    "'dict object' has no attribute 'nothing'": "{{ messages[0].nothing.more }}",
    "attribute '__class__' of 'str' object": "{{ ''.__class__.__mro__ }}",
    "named 'a/b'": [{"name": "a/b", "template": "x"}],
    "tool_use, but none that is the default": [{"name": "tool_use", "template": "x"}],
    "neither a string nor a list": [{"name": "default"}],
    "names and templates": [{"name": "default", "template": 3}],
}


@pytest.mark.parametrize(("message", "template"), REFUSED.items(), ids=REFUSED)
def test_a_template_that_cannot_be_used_is_one_line(message, template, valid):
    write_template(valid, template, "tokenizer_config.json")
    with pytest.raises(InputError) as error:
        template_of(valid).render(conversation("Hi"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_sees_no_file_and_changes_no_message():
    messages = conversation("Hi")
    for attack in ("{% include 'requirements.txt' %}", "{{ messages.append(1) }}",
                   "{{ messages[0].update(content='x') }}"):
        with pytest.raises(InputError):
            chat.ChatTemplate(attack, {}).render(messages)
    assert messages == conversation("Hi")


EXTENSIONS = [
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{{ messages | tojson(false, 2) }}", "{{ messages | tojson }}",
    "{% for message in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}"]


@pytest.mark.parametrize("template", EXTENSIONS)
def test_what_transformers_adds_to_jinja_does_the_same(template, valid):
    write_template(valid, template)
    messages = conversation("<é>", "ü")
    theirs = AutoTokenizer.from_pretrained(valid)
    assert template_of(valid).render(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True)


# ---- What a conversation begins with


def test_a_system_message_is_taken_where_the_template_takes_it():
    names = {"bos_token": "", "eos_token": ""}
    for template in TEMPLATES.values():
        opening = chat.ChatTemplate(template, names).opening("Be brief.")
        assert opening == conversation(system="Be brief.")
        assert chat.ChatTemplate(template, names).opening(None) == []
    assert chat.ChatTemplate(CHATML, names).opening("") == conversation(system="")
    same = "You are Bob the pirate"  # as the template says by itself
    assert chat.ChatTemplate(CHATML, names).opening(same) == conversation(system=same)


IGNORED = {
    "no system": "{% for message in messages if message.role != 'system' %}{{ message.content }}"
                 "{% endfor %}",
    "its own, if empty": "{{ messages[0].content if messages[0].role == 'system' and "
                         "messages[0].content else 'Bob' }}",
}


def test_a_system_message_that_a_template_ignores_is_refused():
    with pytest.raises(InputError, match=r"system is 'Be brief\.', which .* ignores"):
        chat.ChatTemplate(IGNORED["no system"], {}).opening("Be brief.")
    with pytest.raises(InputError, match=r"system is '', which .* ignores"):
        chat.ChatTemplate(IGNORED["its own, if empty"], {}).opening("")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    with pytest.raises(InputError, match="No system"):
        chat.ChatTemplate(refusing, {}).opening("Be brief.")


# ---- Talking


def talk(bundle, lines: list[str], monkeypatch, **options) -> tuple[list[str], list[list[int]]]:
    """A greedy chat that is told these lines: the answers, and the tokens of each forward pass."""
    fed = []
    hook = bundle.model.model.register_forward_pre_hook(
        lambda module, arguments: fed.append(arguments[0].flatten().tolist()))
    told = iter(lines)
    monkeypatch.setattr("sample.read_line", lambda: next(told, None))
    answers = []

    def stream(tokenizer, ids):
        answers.append(tokenizer.decode(list(ids)))

    monkeypatch.setattr("sample.stream", stream)
    with redirect_stdout(io.StringIO()):
        sample.converse(bundle, sample.Options(chat=True, **options), {"temperature": 0})
    hook.remove()
    return answers, fed


LINES = ["Hello", "And again", "Why?", "Go on", "Bye"]


@EVERY_TEMPLATE
def test_answers_are_those_to_the_whole_conversation_at_the_cost_of_its_new_tokens(
        template, valid, monkeypatch):
    write_template(valid, template)
    bundle = models.load(valid)
    bundle.model.config.max_position_embeddings = 4096
    answers, fed = talk(bundle, LINES, monkeypatch, max_new_tokens=5)
    rendering = template_of(valid)
    said = []
    held = []  # what a cache can hold at best
    for line, answer in zip(LINES, answers, strict=True):
        said.append(line)
        text = rendering.render(conversation(*said))
        ids = bundle.tokenizer.encode(text, add_special_tokens=False).ids
        made = greedy(bundle.model, ids, 5, bundle.model.config.eos_token_id)
        assert answer == bundle.tokenizer.decode(made)
        said.append(answer)
        common = [a == b for a, b in zip(ids, held, strict=False)]
        num_held = [*common, False].index(False)
        assert fed.pop(0) == ids[num_held:]
        assert [fed.pop(0) for _ in made[1:]] == [[token] for token in made[:-1]]
        held = ids + made[:-1]
    assert fed == []


def test_a_reset_forgets_the_conversation(valid, monkeypatch):
    write_template(valid, CHATML)
    bundle = models.load(valid)
    answers, _ = talk(bundle, ["One", "Two", "/reset", "Two", " /reset ", "One"], monkeypatch,
                      max_new_tokens=3)
    alone, _ = talk(bundle, ["Two"], monkeypatch, max_new_tokens=3)
    assert answers[2:] == [*alone, answers[0]]


def test_an_answer_ends_at_any_end_of_the_model(valid, monkeypatch):
    """Also where the template's turns end with another token."""
    write_template(valid, CHATML)
    bundle = models.load(valid)
    free, _ = talk(bundle, ["Hello"], monkeypatch, max_new_tokens=6)
    text = template_of(valid).render(conversation("Hello"))
    ids = bundle.tokenizer.encode(text, add_special_tokens=False).ids
    made = greedy(bundle.model, ids, 6)
    bundle.model.config.eos_token_id = [1, made[2]]
    answers, _ = talk(bundle, ["Hello"], monkeypatch, max_new_tokens=6)
    assert answers == [bundle.tokenizer.decode(made[:made.index(made[2])])]
    assert answers != free
    bundle.model.config.eos_token_id = None
    answers, _ = talk(bundle, ["Hello"], monkeypatch, max_new_tokens=6)
    assert answers == free


def test_a_checkpoint_keeps_the_template_and_the_names_of_tokens(valid, tmp_path, monkeypatch):
    write_template(valid, INST)
    expected, _ = talk(models.load(valid), LINES[:2], monkeypatch, max_new_tokens=4)
    for source, target in itertools.pairwise(("hf", "a.pt", "b", "c.gguf", "d")):
        models.write(tmp_path / target, models.load(tmp_path / source), "float32")
        bundle = models.load(tmp_path / target)
        assert hf_files.templates_in(bundle.files) == {"default": INST}
        answers, _ = talk(bundle, LINES[:2], monkeypatch, max_new_tokens=4)
        assert answers == expected, target
