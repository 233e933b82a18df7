"""Tiny models, tokenizers and rows that the system tests make on the fly."""

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed import TCPStore

from prefuse.trainer.attention import ATTENTION
from prefuse.trainer.data import Example, Sequence
from prefuse.trainer.scores import Scorer

HERE = Path(__file__).parent
WORDS = ["<pad>", "</s>", "<unk>", "user", "assistant", ":", *(f"w{i}" for i in range(42))]
PLAIN = ["the", "cat", "sat", "on", "\n", "return", "a"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %} "
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    """Skips a test where an optional package is not installed."""
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"needs {package}: pip install 'prefuse[{extra}]'")


def tiny_model(family: str = "Llama", *, tie: bool = False, seed: int = 0, **changes):
    """A random model of two layers with grouped-query attention."""
    shape = dict(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=tie,
    )
    config = getattr(transformers, f"{family}Config")(**shape | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        torch.nn.init.normal_(p, mean, 0.1, generator=generator)
    return model


def scorer_of(model, layout: str = "shared") -> Scorer:
    model.set_attn_implementation("sdpa" if layout == "padded" else ATTENTION)
    return Scorer(model, layout)


def tiny_tokenizer(*, eos: str | None = "</s>", chat_template: str | None = CHAT, words=WORDS):
    """One token a word; `words` are a list, or a dict with their ids."""
    ids = words if isinstance(words, dict) else {w: i for i, w in enumerate(words)}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=eos, pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def byte_tokenizer(size: int = 300):
    """Byte-level BPE of a few words: a character of several bytes is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    rng = random.Random(0)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(rng.choices(PLAIN, k=20)) for _ in range(99)], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>"
    )


def write_model(folder: Path, model=None, tokenizer=None) -> str:
    """A model folder as `--model_name_or_path` takes it."""
    (tiny_model() if model is None else model).save_pretrained(folder)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(6, len(WORDS), rng.integers(low, high)))


def pair_rows(n: int, seed: int = 0) -> list[dict]:
    """Preference rows of text, 3 to 24 tokens long."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": words(rng, 1, 9),
            "chosen": " " + words(rng, 1, 14),
            "rejected": " " + words(rng, 1, 14),
        }
        for _ in range(n)
    ]


def sft_rows(n: int, seed: int = 0) -> list[dict]:
    return [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(n, seed)]


def sequence(tokens: np.ndarray, start: int) -> Sequence:
    scored = np.arange(len(tokens)) >= max(start, 1)
    return Sequence(tokens, scored)


def ragged_pairs(n: int = 9, seed: int = 0, judged: bool = False) -> list[Example]:
    """Pairs of very different lengths, with a number each if `judged`: common prefixes that run
    into the completions, prompts of one token, no prompt at all, and a completion that continues
    the other."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(n):
        draw = lambda low, high: rng.integers(2, len(WORDS), rng.integers(low, high))  # noqa: E731
        prompt = [draw(4, 24), draw(1, 2), draw(0, 1), draw(2, 9), draw(2, 9)][index % 5]
        chosen, rejected = draw(2, 28), draw(2, 7)
        if index % 5 == 2:  # not one token in common
            chosen[0], rejected[0] = 2, 3
        if index % 5 == 3:  # the completions begin alike
            rejected = np.concatenate([chosen[:2], rejected])
        if index % 5 == 4:  # rejected is where chosen begins
            rejected = chosen[: len(chosen) // 2 + 1]
        pair = [np.concatenate([prompt, c]).astype(np.int64) for c in (chosen, rejected)]
        sequences = tuple(sequence(t, len(prompt)) for t in pair)
        examples.append(Example(index, sequences, judged=(index / n,) if judged else ()))
    return examples


def in_float64(model):
    """The model wholly in float64, its norms too, which transformers would round to float32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = getattr(p.grad, "full_tensor", lambda g=p.grad: g)().double().clone()
    return found


def assert_same_gradients(got: dict, wanted: dict, tolerance: float) -> None:
    """Every element, to `tolerance` of the largest of its parameter's gradient."""
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale, difference = float(grad.abs().max()), float((got[name] - grad).abs().max())
        assert difference <= tolerance * scale, f"{name}: {difference:.2g} of {scale:.2g}"


def relative_error(got: dict, wanted: dict) -> float:
    """Of the whole gradient as one vector. In float32 a key projection's own gradient, the small
    remainder of large terms, has their error: torch's own padded path is off by 4e-6 of it."""
    square = lambda grads: sum(float(g.square().sum()) for g in grads)  # noqa: E731
    assert got.keys() == wanted.keys()
    return (square(got[n] - g for n, g in wanted.items()) / square(wanted.values())) ** 0.5


def command(*argv: str, env: dict | None = None, **options) -> subprocess.Popen:
    """`prefuse ...` in its own process, in a clone that need not be installed."""
    code = "import conftest; from prefuse.trainer.cli import main; main()"
    return python("-c", code, *argv, env=env, **options)


def python(*argv: str, env: dict | None = None, **options) -> subprocess.Popen:
    path = os.pathsep.join(p for p in (str(HERE), os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, *argv],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})},
        text=True,
        **options,
    )


STORES: list[TCPStore] = []  # open until the tests end, as the ranks that use them may


def each_rank(world: int) -> list[dict[str, str]]:
    """The environment of each of `world` gloo ranks, as torchrun's agent makes it: this process
    has the store, at a port that was never free for others."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    shared = dict(
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        CUDA_VISIBLE_DEVICES="",
    )
    return [shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]


def launch(world: int, script: str, folder: Path) -> list[subprocess.Popen]:
    """`script` on each of `world` ranks, which write to `folder` and to logs in it."""
    started = []
    for env in each_rank(world):
        with (folder / f"{world}-{env['RANK']}.log").open("w") as log:
            argv = (str(HERE / script), str(folder))
            started.append(python(*argv, env=env, stdout=log, stderr=log))
    return started


def told(folder: Path) -> str:
    """The ends of the logs, for a message."""
    logs = sorted(folder.glob("**/*.log"))
    return "".join(f"\n{log}:\n{log.read_text()[-3000:]}" for log in logs)


def alone_and_on_two(argv: list[str], folder: Path) -> list[list[dict]]:
    """Lines of metrics.jsonl of a command that ends in --output_dir: of one process that
    accumulates twice, and of two ranks."""
    both = [command(*argv, str(folder / "two"), env=env) for env in each_rank(2)]
    alone = command(*argv, str(folder / "one"), "--gradient_accumulation_steps", "2")
    assert finish([*both, alone]) == [0, 0, 0]
    return [
        [json.loads(line) for line in (folder / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[int]:
    """Their exit statuses; where one fails, the others would wait for it in vain."""
    deadline = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.returncode for p in processes):
                break
            time.sleep(0.05)
    finally:
        for p in processes:
            p.kill()
    return [p.wait() for p in processes]
