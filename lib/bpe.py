"""A byte-level BPE tokenizer, trained in a process of its own.

The library that trains it answers no Ctrl-C meanwhile, but a process can be killed. This module is
what the process runs; lib/data.py starts it.
"""

import json
import re
import signal
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = [  # the first ids of SmolLM's vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
    "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
    "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
    "<empty_output>"]
# Characters without a space of which training sees at most so many at once. Chinese without
# punctuation is one word of any length, and each merge would search all of it again.
LONGEST_WORD = 100


def split_long_words(text: str) -> list[str]:
    if max(map(len, text.split()), default=0) <= LONGEST_WORD:
        return [text]
    return re.sub(rf"\S{{{LONGEST_WORD}}}", "\\g<0>\0", text).split("\0")


def train(texts, vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """A byte-level BPE as SmolLM's: its special tokens first, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=show_progress,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    pieces = (piece for text in texts for piece in split_long_words(text))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def main():
    """Texts, a JSON string a line, come by stdin; the tokenizer goes to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once
    texts = map(json.loads, sys.stdin)
    sys.stdout.reconfigure(encoding="utf-8")
    print(train(texts, int(sys.argv[1]), sys.stderr.isatty()).to_str())


if __name__ == "__main__":
    main()
