"""llama.cpp, by its Python package, from token ids to token ids: tests and bench/peers.py compare with it."""

import json
import urllib.request
from pathlib import Path

import xllamacpp


class LlamaCpp:
    """A GGUF model, greedy, with room for `streams` texts at once, of up to `context` tokens each."""
    def __init__(self, path: Path, threads: int | None = None, streams: int = 1, context: int = 1024):
        params = xllamacpp.CommonParams()
        params.model.path, params.warmup, params.verbosity = str(path), False, 0
        params.n_ctx, params.n_parallel = context * streams, streams
        if threads:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def post(self, route: str, **body):
        request = urllib.request.Request(self.server.listening_address + route, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def complete(self, prompts: list[list[int]], count: int, ignore_eos: bool = False) -> list[dict]:
        """The answer to each of the prompts, all at once: its `tokens` and `timings`."""
        answers = self.post("/completion", prompt=prompts, n_predict=count, temperature=0, return_tokens=True,
                            cache_prompt=False, ignore_eos=ignore_eos)
        return answers if isinstance(answers, list) else [answers]

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Up to count tokens; it ends with the end of the text."""
        return self.complete([ids], count)[0]["tokens"]
