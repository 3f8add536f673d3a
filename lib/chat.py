"""ChatML, the form in which SmolLM's instruct models read and write a conversation."""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
START = "<|im_start|>"
END = "<|im_end|>"

# The same as a chat template in jinja, for transformers and llama.cpp
TEMPLATE = """{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chat_turn(role: str, content: str) -> str:
    """One contribution to a conversation; role is system, user or assistant."""
    return f"{START}{role}\n{content}{END}\n"


def answer_begins() -> str:
    return f"{START}assistant\n"
