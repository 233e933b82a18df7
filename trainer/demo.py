"""`prefuse demo`: the whole road on a task small enough for a laptop.

The task: a list of letters is to be sorted. SFT sees answers in rising and in falling order, half
and half; the preference pairs always prefer rising. So before DPO held-out reward accuracy is 0.5
by construction, and after it tells whether the preference was learned for lists never seen.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .config import DPOConfig, SFTConfig, flag

LETTERS = "abcdefghijklmnopqrst"


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo's files go, and how long it trains."""

    output_dir: str = flag(default="runs/demo", help="Where its files go; written over.")
    sft_steps: int = flag(default=400, help="Optimizer steps of SFT.")
    dpo_steps: int = flag(default=100, help="Optimizer steps of DPO.")
    seed: int = flag(default=0, help="Draws the task and the model.")


def run_demo(config: DemoConfig) -> None:
    """Builds a model and a task, runs SFT and DPO as the commands do, shows what changed."""
    from .flags import parse
    from .offline import run_dpo, run_sft

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    make_task(folder, config.seed)
    make_model(folder / "base", config.seed)
    common = ["--per_device_train_batch_size", "64", "--logging_steps", "20"]
    sft = [
        *("--model_name_or_path", f"{folder}/base", "--dataset_name", f"{folder}/sft.jsonl"),
        *("--output_dir", f"{folder}/sft", "--overwrite_output_dir", *common),
        *("--max_steps", str(config.sft_steps), "--learning_rate", "3e-3"),
        *("--warmup_steps", "0.05", "--lr_scheduler_type", "cosine"),
    ]
    dpo = [
        *("--model_name_or_path", f"{folder}/sft", "--dataset_name", f"{folder}/pairs.jsonl"),
        *("--output_dir", f"{folder}/dpo", "--overwrite_output_dir", *common),
        *("--max_steps", str(config.dpo_steps), "--learning_rate", "1e-4", "--beta", "0.3"),
        *("--eval_dataset_name", f"{folder}/held_out.jsonl", "--eval_on_start"),
        *("--eval_strategy", "steps", "--eval_steps", str(max(1, config.dpo_steps // 10))),
    ]
    print("\n$ prefuse sft " + " ".join(sft))
    run_sft(parse(SFTConfig, sft))
    print("\n$ prefuse dpo " + " ".join(dpo))
    run_dpo(parse(DPOConfig, dpo))
    show(folder, config)


def make_task(folder: Path, seed: int) -> None:
    """SFT rows in both orders, preference pairs, and held-out pairs of unseen lists."""
    rng = random.Random(seed)
    seen: set[str] = set()

    def draw() -> tuple[str, str, str]:
        while True:
            letters = rng.sample(LETTERS, rng.randint(4, 8))
            prompt = "sort " + " ".join(letters) + " :"
            if prompt not in seen:
                seen.add(prompt)
                rising = " " + " ".join(sorted(letters))
                falling = " " + " ".join(sorted(letters, reverse=True))
                return prompt, rising, falling

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    sft = [draw() for _ in range(8192)]
    write("sft.jsonl", [{"prompt": p, "completion": rng.choice((a, b))} for p, a, b in sft])
    for name, count in (("pairs.jsonl", 4096), ("held_out.jsonl", 256)):
        pairs = [draw() for _ in range(count)]
        write(name, [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs])


def make_model(folder: Path, seed: int) -> None:
    """A Llama of under a million parameters and a tokenizer of one token a letter."""
    words = ["<pad>", "</s>", "sort", ":", *LETTERS]
    words += [" " + w for w in words[3:]]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated")
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(folder)


@torch.no_grad()
def rising_share(model_folder: Path, rows: list[dict]) -> float:
    """How many held-out lists the model, asked greedily, sorts in rising order and rightly."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    right = 0
    by_length: dict[int, list[dict]] = {}
    for row in rows:  # equal lengths need no padding
        by_length.setdefault(len(row["prompt"]), []).append(row)
    for group in by_length.values():
        ids = tokenizer([row["prompt"] for row in group], return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=10, do_sample=False)[:, ids.shape[1] :]
        answers = tokenizer.batch_decode(out, skip_special_tokens=True)
        right += sum(a == row["chosen"] for a, row in zip(answers, group, strict=True))
    return right / len(rows)


def show(folder: Path, config: DemoConfig) -> None:
    """The closing table and the plot."""
    from rich.console import Console
    from rich.table import Table

    lines = [json.loads(x) for x in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()]
    held_out = [x for x in lines if "eval_loss" in x]
    before, after = held_out[0], held_out[-1]
    rows = [json.loads(x) for x in (folder / "held_out.jsonl").read_text().splitlines()]
    speeds = [_speed(folder / stage / "metrics.jsonl") for stage in ("sft", "dpo")]
    table = Table(title="Held-out pairs, before and after DPO")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(
        "reward accuracy",
        f"{before['eval_rewards/accuracies']:.3f}",
        f"{after['eval_rewards/accuracies']:.3f}",
    )
    margin = "eval_rewards/margins"
    table.add_row("reward margin", f"{before[margin]:.3f}", f"{after[margin]:.3f}")
    table.add_row("loss", f"{before['eval_loss']:.4f}", f"{after['eval_loss']:.4f}")
    shares = [rising_share(folder / stage, rows) for stage in ("sft", "dpo")]
    table.add_row("answers sorted as preferred", *(f"{share:.3f}" for share in shares))
    table.add_row("training tokens/s (SFT, DPO)", *(f"{speed:.0f}" for speed in speeds))
    console = Console()
    console.print(table)
    (folder / "result.json").write_text(
        json.dumps({"before": before, "after": after, "sorted_as_preferred": shares}, indent=1)
    )
    console.print(f"plot: {_plot(folder, lines)}", highlight=False)


def _speed(metrics: Path) -> float:
    lines = [json.loads(x) for x in metrics.read_text().splitlines()]
    speeds = sorted(x["tokens_per_second"] for x in lines if "tokens_per_second" in x)
    return speeds[len(speeds) // 2]


def _plot(folder: Path, lines: list[dict]) -> Path | str:
    """Loss, held-out accuracy and margin against the step."""
    try:
        import matplotlib
    except ImportError:
        return "none, because matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sft = [json.loads(x) for x in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    panels = [
        ("SFT loss, nats a token", sft, "loss", None),
        ("DPO loss", lines, "loss", "eval_loss"),
        ("DPO reward accuracy", lines, "rewards/accuracies", "eval_rewards/accuracies"),
        ("DPO reward margin", lines, "rewards/margins", "eval_rewards/margins"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    for axis, (title, rows, train, held_out) in zip(axes, panels, strict=True):
        for key, label in ((train, "train"), (held_out, "held out")):
            points = [(r["step"], r[key]) for r in rows if key in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=".")
        axis.set(title=title, xlabel="step")
        axis.legend()
    path = folder / "demo.png"
    figure.savefig(path, dpi=120)
    return path
