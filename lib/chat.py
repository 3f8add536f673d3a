"""Conversations as text. A model's chat template is written in jinja. It is rendered here as
transformers does (utils/chat_template_utils.py)."""

import json
from datetime import datetime

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from lib import hf_files
from lib.cli import reading
from smollm import Config, InputError, id_list

# ChatML, which SmolLM's instruct models use, for a model that has no template
START = "<|im_start|>"
END = "<|im_end|>"
CHATML = """{% for message in messages %}\
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} around what the assistant says: just its contents.
    (transformers can tell by it which tokens to train on.)"""
    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def raise_exception(message: str):
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """In place of jinja's own, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


class ChatTemplate:
    """A template, with what it can see. A sandbox keeps it from all else."""
    def __init__(self, template: str, token_names: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        self.token_names = token_names
        with reading("the chat template"):
            self.template = environment.from_string(template)

    def render(self, messages: list[dict], add_generation_prompt=True, **variables) -> str:
        """The text of messages, [{"role": "user", "content": "Hi"}, ...]; with
        add_generation_prompt, up to where the assistant answers. variables are for the template,
        as enable_thinking=False is for SmolLM3's. InputError if the template can't take them."""
        variables = {"tools": None, "documents": None} | self.token_names | variables
        with reading("the chat template", failed="can't be rendered"):
            return self.template.render(messages=messages, **variables,
                                        add_generation_prompt=add_generation_prompt)

    def opening(self, system: str | None) -> list[dict]:
        """What a conversation begins with: nothing, then the template has its own way, or a system
        message. InputError if the template does not take this one."""
        if system is None:
            return []
        question = {"role": "user", "content": "Hi"}

        def rendered(content):
            return self.render([{"role": "system", "content": content}, question])

        is_ignored = rendered(system) == self.render([question])
        if is_ignored and system:  # it may be the template's own, where another one counts
            is_ignored = rendered(system) == rendered(system + " Rhyme.")
        if is_ignored:
            raise InputError(f"system is {system!r}, which the model's chat template ignores: "
                             "leave it out")
        return [{"role": "system", "content": system}]


def load(tokenizer: Tokenizer, config: Config, files: dict[str, str],
         source) -> tuple[ChatTemplate, list[int]]:
    """A model's chat template, and the ids of the tokens that end an answer: those of its config.
    Without a template it is ChatML, which has an end of its own. InputError, which names source,
    if the tokenizer lacks ChatML's tokens."""
    templates = hf_files.templates_in(files)
    names = hf_files.token_names(files, config, tokenizer)
    eos_ids = id_list(config.eos_token_id)
    if "default" in templates:
        return ChatTemplate(templates["default"], names), eos_ids
    if templates:
        raise InputError(f"{source} has the chat templates {', '.join(templates)}, but none that "
                         "is the default: name one so")
    end_id = tokenizer.token_to_id(END)
    if end_id is None or tokenizer.token_to_id(START) is None:
        raise InputError(f"{source} has no chat template, nor the tokens {START} and {END} to do "
                         "without: take an instruct model")
    return ChatTemplate(CHATML, names), [*eos_ids, end_id]
