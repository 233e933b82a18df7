"""`prefuse demo`: the whole road on a task small enough for a laptop.

The task: a list of letters is to be sorted. SFT sees answers in rising and in falling order, half
and half; the preference pairs always prefer rising. So before DPO held-out reward accuracy is 0.5
by construction, and after it tells whether the preference was learned for lists never seen. GRPO
then samples answers to new lists and is rewarded for those that are sorted rightly.
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
from .online_config import GRPOConfig

STAGES = ("sft", "dpo", "grpo")
LETTERS = "abcdefghijklmnopqrst"


REWARD = '''"""Whether the letters of the prompt came back in rising order."""


def sorted_rightly(prompts, completions, **columns):
    wanted = [sorted(prompt.split()[1:-1]) for prompt in prompts]
    return [float(text.split() == letters) for text, letters in zip(completions, wanted)]
'''


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo's files go, and how long it trains."""

    output_dir: str = flag(default="runs/demo", help="Where its files go; written over.")
    sft_steps: int = flag(default=400, help="Optimizer steps of SFT.")
    dpo_steps: int = flag(default=100, help="Optimizer steps of DPO.")
    grpo_steps: int = flag(default=60, help="Optimizer steps of GRPO.")
    seed: int = flag(default=0, help="Draws the task and the model.")


def run_demo(config: DemoConfig) -> None:
    """Builds a model and a task, runs SFT, DPO and GRPO as the commands do, shows what changed."""
    from .flags import parse
    from .offline import run_dpo, run_sft
    from .online import run_online

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
    grpo = [
        *("--model_name_or_path", f"{folder}/dpo", "--dataset_name", f"{folder}/prompts.jsonl"),
        *("--reward_funcs", f"{folder}/reward.py:sorted_rightly", "--max_completion_length", "10"),
        *("--output_dir", f"{folder}/grpo", "--overwrite_output_dir", *common),
        *("--max_steps", str(config.grpo_steps), "--learning_rate", "3e-4", "--beta", "0.02"),
        *("--logging_steps", "5", "--loss_type", "grpo"),
    ]
    print("\n$ prefuse sft " + " ".join(sft))
    run_sft(parse(SFTConfig, sft))
    print("\n$ prefuse dpo " + " ".join(dpo))
    run_dpo(parse(DPOConfig, dpo))
    print("\n$ prefuse grpo " + " ".join(grpo))
    run_online(parse(GRPOConfig, grpo), "grpo")
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
    write("prompts.jsonl", [{"prompt": draw()[0]} for _ in range(4096)])
    (folder / "reward.py").write_text(REWARD)


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

    lines = _metrics(folder, "dpo")
    held_out = [x for x in lines if "eval_loss" in x]
    before, after = held_out[0], held_out[-1]
    sampled = [x["reward"] for x in _metrics(folder, "grpo") if "reward" in x]
    rows = [json.loads(x) for x in (folder / "held_out.jsonl").read_text().splitlines()]
    shares = [rising_share(folder / stage, rows) for stage in STAGES]
    table = Table(title="After each stage, on lists never seen")
    for heading in ("", "SFT", "DPO", "GRPO"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, key, digits in (
        ("reward accuracy on pairs", "eval_rewards/accuracies", 3),
        ("reward margin on pairs", "eval_rewards/margins", 3),
        ("DPO's loss on pairs", "eval_loss", 4),
    ):
        table.add_row(name, f"{before[key]:.{digits}f}", f"{after[key]:.{digits}f}", "")
    table.add_row("lists sorted rightly, greedily", *(f"{share:.3f}" for share in shares))
    table.add_row("the same of sampled answers", "", f"{sampled[0]:.3f}", f"{sampled[-1]:.3f}")
    speeds = [_speed(_metrics(folder, stage)) for stage in STAGES]
    table.add_row("training tokens/s", *(f"{speed:.0f}" for speed in speeds))
    console = Console()
    console.print(table)
    result = {"before": before, "after": after, "sorted_as_preferred": shares}
    result["reward"] = [sampled[0], sampled[-1]]
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    console.print(f"plot: {_plot(folder, lines)}", highlight=False)


def _metrics(folder: Path, stage: str) -> list[dict]:
    return [json.loads(x) for x in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def _speed(lines: list[dict]) -> float:
    speeds = sorted(x["tokens_per_second"] for x in lines if "tokens_per_second" in x)
    return speeds[len(speeds) // 2]


def _plot(folder: Path, lines: list[dict]) -> Path | str:
    """Losses, held-out accuracy, reward against the step, and against the KL it cost."""
    try:
        import matplotlib
    except ImportError:
        return "none, because matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    grpo = _metrics(folder, "grpo")
    panels = [
        ("SFT loss, nats a token", _metrics(folder, "sft"), "loss", None),
        ("DPO loss", lines, "loss", "eval_loss"),
        ("DPO reward accuracy", lines, "rewards/accuracies", "eval_rewards/accuracies"),
        ("GRPO reward", grpo, "reward", None),
    ]
    figure, axes = plt.subplots(1, 5, figsize=(18, 3.2), layout="constrained")
    for axis, (title, rows, train, held_out) in zip(axes, panels, strict=False):
        for key, label in ((train, "train"), (held_out, "held out")):
            points = [(r["step"], r[key]) for r in rows if key in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=".")
        axis.set(title=title, xlabel="step")
        axis.legend()
    axes[-1].plot([x["kl"] for x in grpo], [x["reward"] for x in grpo], marker=".")
    axes[-1].set(title="GRPO reward against KL", xlabel="KL to the reference, nats a token")
    path = folder / "demo.png"
    figure.savefig(path, dpi=120)
    return path
