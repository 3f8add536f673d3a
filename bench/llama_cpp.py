"""llama.cpp, by its Python package: tests and bench/peers.py compare with it.

    python bench/llama_cpp.py my-model.gguf "def __init__(self"      # continues the prompt, greedy
"""

import json
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import xllamacpp
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli
from smollm import InputError


class LlamaCpp:
    """A GGUF model, greedy, with room for `streams` texts at once, of up to `context` tokens
    each."""
    def __init__(self, path: Path, threads: int | None = None, streams: int = 1,
                 context: int = 1024):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.warmup = False
        params.verbosity = 0
        params.n_ctx = context * streams
        params.n_parallel = streams
        if threads is not None:
            params.cpuparams.n_threads = threads
            params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def post(self, route: str, **body):
        """The server's answer."""
        request = urllib.request.Request(self.server.listening_address + route,
                                         json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    def tokenize(self, text: str) -> list[int]:
        answer = self.post("/tokenize", content=text, add_special=False, parse_special=True)
        return answer["tokens"]

    def complete(self, prompts: list[list[int]], count: int,
                 ignore_eos: bool = False) -> list[dict]:
        """The answer to each of the prompts, all at once: its `tokens` and `timings`."""
        answers = self.post("/completion", prompt=prompts, n_predict=count, temperature=0,
                            return_tokens=True, cache_prompt=False, ignore_eos=ignore_eos)
        if not isinstance(answers, list):
            answers = [answers]
        return answers

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Up to count tokens; it ends with the end of the text."""
        return self.complete([ids], count)[0]["tokens"]


@dataclass
class Options:
    gguf: Positional[Path]  # the file
    prompt: Positional[str]
    max_new_tokens: int = 64


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    if not o.gguf.is_file():
        raise InputError(f"{o.gguf} is no file: tools/convert.py makes one")
    try:
        llama = LlamaCpp(o.gguf)
    except RuntimeError:  # it has told why on stderr
        raise InputError(f"llama.cpp can't read {o.gguf}: make it anew with "
                         "tools/convert.py") from None
    answer = llama.post("/completion", prompt=o.prompt, n_predict=o.max_new_tokens, temperature=0)
    print(o.prompt + answer["content"])
