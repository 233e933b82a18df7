"""A training step of other people's trainers, as they are and with the blocks of docs/drop_in.md.

    PREFUSE_DATA=data python benchmarks/bench_drop_in.py --output benchmarks/results/drop_in_cpu

Forward, loss and backward of one micro-batch of HH-RLHF pairs, padded as TRL pads them; no
optimizer, and for GRPO no generation. The variants of a trainer take turns, and the median counts.
A step during which other processes had over 5 % of the machine is measured again, for at most
`--patience` seconds a trainer; "busy" counts those taken all the same.
Memory is the peak of a step in a process of its own, beyond weights, gradients and the batch.

"stock, scored only" tells the kernels' share from that of leaving out prompts and padding: TRL's
head as it runs on a GPU, where it scores the completions alone, and for a loop the usual code on
the hidden states of the completions.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bench_dpo_vs_trl import HEADS, MODEL, make_model
from common import ROOT, machine, peak_memory_mb, publish, reset_peak_memory

TOKENIZERS = {50257: "gpt2", 151936: "qwen2"}
PLAIN: dict[str, Any] = dict(
    report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False
)
TRL: dict[str, Any] = dict(PLAIN, gradient_checkpointing=False)
SCORED_ONLY = "stock, scored only"
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]


@functools.cache
def blocks() -> dict[str, Any]:
    """Everything that the document defines."""
    namespace: dict[str, Any] = {}
    text = (ROOT / "docs" / "drop_in.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(block, namespace)
    return namespace


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def labels_of(batch: Batch) -> torch.Tensor:
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def of_scored_alone(step: Step, name: str) -> Step:
    """TRL's head leaves out what is not scored on devices with Triton; here, on any."""
    if name != SCORED_ONLY:
        return step

    def narrowed(batch: Batch) -> torch.Tensor:
        with patch("trl.trainer.utils._use_triton", lambda device: True):
            return step(batch)

    return narrowed


def dpo_trainer(folder: Path, name: str) -> Step:
    import trl
    from datasets import Dataset

    kind = blocks()["FusedDPOTrainer"] if name == "fuse_head" else trl.DPOTrainer
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = kind(
        model=load(folder),
        args=trl.DPOConfig(output_dir=str(folder / "out"), **TRL),
        train_dataset=rows,
        processing_class=tokenizer_of(folder),
    )
    trainer.current_gradient_accumulation_steps = 1
    return of_scored_alone(lambda b: trainer.training_step(trainer.model, dict(b)), name)


def grpo_trainer(folder: Path, name: str) -> Step:
    import trl
    from datasets import Dataset

    kind = blocks()["FusedGRPOTrainer"] if name == "fuse_head" else trl.GRPOTrainer
    model = load(folder).train()
    trainer = kind(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(output_dir=str(folder / "out"), loss_type="grpo", **TRL),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=tokenizer_of(folder),
    )
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: Batch) -> torch.Tensor:
        loss = trainer._compute_loss(model, rollouts(batch))
        loss.backward()
        return loss.detach()

    return of_scored_alone(step, name)


def rollouts(batch: Batch) -> Batch:
    """The batch as GRPO has it: prompts padded on the left, completions on the right."""
    prompts, completions = [], []
    for ids, mask, seen in zip(
        batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True
    ):
        prompts.append(ids[(mask == 0) & (seen == 1)].flip(0))
        completions.append(ids[mask == 1])
    stack = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ones = [[torch.ones_like(x) for x in side] for side in (prompts, completions)]
    rows = len(prompts)
    return {
        "prompt_ids": stack(prompts).flip(1),
        "prompt_mask": stack(ones[0]).flip(1),
        "completion_ids": stack(completions),
        "completion_mask": stack(ones[1]),
        "advantages": torch.linspace(-1, 1, rows),
    }


def sft_trainer(folder: Path, name: str) -> Step:
    import transformers

    model, others = load(folder), {}
    if name == "fuse_loss":
        blocks()["fuse_loss"](model)
    if name == "compute_loss_func":
        others["compute_loss_func"] = blocks()["compute_loss_func"]
    arguments = transformers.TrainingArguments(output_dir=str(folder / "out"), **PLAIN)
    trainer = transformers.Trainer(model, arguments, **others)
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: Batch) -> torch.Tensor:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")} | {
            "labels": labels_of(batch)
        }
        return trainer.training_step(model, inputs, batch["completion_mask"].sum())

    return step


def plain_sums(model, batch: Batch, name: str) -> torch.Tensor:
    """Log-probs of the completions [B], the usual code."""
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    if name == "stock":
        logits = model(**inputs).logits[:, :-1]
        logp = logits.float().log_softmax(-1).gather(-1, ids[:, :, None]).squeeze(-1)
        return (logp * mask).sum(1)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][mask]
    logits = model.lm_head(hidden).float()
    logp = logits.log_softmax(-1).gather(-1, ids[mask][:, None]).squeeze(-1)
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp).sum(1)


def own_sft(folder: Path, name: str) -> Step:
    model = load(folder)
    scored = blocks()["Scored"](model)

    def step(batch: Batch) -> torch.Tensor:
        if name == "Scored":
            loss = scored(batch, blocks()["nll"]).mean()
        else:
            loss = -plain_sums(model, batch, name).sum() / batch["completion_mask"].sum()
        loss.backward()
        return loss.detach()

    return step


def own_dpo(folder: Path, name: str) -> Step:
    from prefuse.kernels.preference import preference_loss
    from prefuse.kernels.segments import segment_sum

    models = load(folder), load(folder)
    scored = [blocks()["Scored"](model) for model in models]

    def sums(index: int, batch: Batch) -> tuple[torch.Tensor, ...]:
        if name != "Scored":
            return plain_sums(models[index], batch, name).chunk(2)
        ends = batch["completion_mask"][:, 1:].sum(1).cumsum(0)
        return segment_sum(scored[index](batch), F.pad(ends, (1, 0)).int()).chunk(2)

    def step(batch: Batch) -> torch.Tensor:
        chosen, rejected = sums(0, batch)
        with torch.no_grad():
            reference = sums(1, batch)
        if name == "Scored":
            loss = preference_loss(chosen, rejected, *reference, beta=0.1).loss.mean()
        else:
            margin = chosen - rejected - reference[0] + reference[1]
            loss = -F.logsigmoid(0.1 * margin).mean()
        loss.backward()
        return loss.detach()

    return step


CASES: dict[str, tuple[Callable[[Path, str], Step], tuple[str, ...]]] = {
    "TRL DPOTrainer": (dpo_trainer, ("stock", SCORED_ONLY, "fuse_head")),
    "TRL GRPOTrainer": (grpo_trainer, ("stock", SCORED_ONLY, "fuse_head")),
    "transformers.Trainer, SFT": (sft_trainer, ("stock", "compute_loss_func", "fuse_loss")),
    "own loop, SFT": (own_sft, ("stock", SCORED_ONLY, "Scored")),
    "own loop, DPO": (own_dpo, ("stock", SCORED_ONLY, "Scored")),
}


def take_batch(data: Path, folder: Path, pairs: int, max_length: int) -> Batch:
    """The first pairs of a shuffle: chosen rows, then rejected ones, padded on the right."""
    from prefuse.trainer.data import pair_examples
    from prefuse.trainer.rows import load_rows

    rows = load_rows(str(data / "prefs" / "hh_rlhf_train.jsonl"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    kept, _ = pair_examples([rows[i] for i in order[: 2 * pairs]], tokenizer_of(folder), max_length)
    sequences = [e.sequences[side] for side in (0, 1) for e in kept[:pairs]]
    stack = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tokens = [torch.from_numpy(s.tokens).long() for s in sequences]
    return {
        "input_ids": stack(tokens),
        "attention_mask": stack([torch.ones_like(x) for x in tokens]),
        "completion_mask": stack([torch.from_numpy(s.scored).long() for s in sequences]),
    }


def memory_of(case: str, name: str, folder: Path, batch: Batch) -> float:
    """In this process: MB at the peak of a step whose gradients are added to existing ones."""
    step = CASES[case][0](folder, name)
    shape = (len(batch["input_ids"]), 16)
    ones = torch.ones(shape, dtype=torch.int64)
    scored = (ones.cumsum(1) > 8).long()
    step({"input_ids": ones, "attention_mask": ones, "completion_mask": scored})
    before = reset_peak_memory()
    step(batch)
    return peak_memory_mb() - before


def cpu_seconds() -> tuple[float, float]:
    """Of all processes, and of this one."""
    fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]))
    busy = sum(fields[:3]) + sum(fields[5:8])  # not idle, not waiting for a disk
    return busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds, and the share of the machine that other processes had meanwhile."""
    everyone, own = cpu_seconds()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    everyone, own = cpu_seconds()[0] - everyone, cpu_seconds()[1] - own
    return seconds * 1000, (everyone - own) / (seconds * (os.cpu_count() or 1))


def measure(args, vocab: int, folder: Path, batch: Batch) -> list[dict]:
    rows = []
    for case in args.cases:
        factory, names = CASES[case]
        steps = {name: factory(folder, name) for name in names}
        losses = {name: float(step(batch)) for name, step in steps.items()}
        spread = max(losses.values()) - min(losses.values())
        assert spread <= 2e-5 * max(1.0, max(map(abs, losses.values()))), (case, losses)
        times: dict[str, list[float]] = {name: [] for name in names}
        busy = 0
        deadline = time.perf_counter() + args.patience
        while min(map(len, times.values())) < args.repeats:
            for name, step in steps.items():
                ms, others = timed(lambda step=step: step(batch))
                while others > 0.05 and time.perf_counter() < deadline:
                    if timed(lambda: time.sleep(1))[1] < 0.05:
                        ms, others = timed(lambda step=step: step(batch))
                busy += others > 0.05
                times[name].append(ms)
        del steps
        for name in names:
            child = [sys.executable, __file__, "--child", case, name, str(folder)]
            out = subprocess.run(child, capture_output=True, text=True, check=True).stdout
            middle = sorted(times[name])
            rows.append(
                {
                    "V": vocab,
                    "trainer": case,
                    "with": name,
                    "ms": middle[len(middle) // 2],
                    "fastest ms": middle[0],
                    "slowest ms": middle[-1],
                    "extra MB": float(out.splitlines()[-1]),
                    "busy": busy,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFUSE_DATA"))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for quiet")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[*TOKENIZERS])
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if args.child:
        case, name, folder = args.child
        batch = torch.load(Path(folder) / "batch.pt")
        print(memory_of(case, name, Path(folder), batch))
        return
    if args.data is None:
        parser.error("--data or PREFUSE_DATA must name the folder of data")
    info, rows, shapes = machine(), [], []
    for vocab in args.vocabularies:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            millions = make_model(folder, args.data / "tokenizers" / TOKENIZERS[vocab]) / 1e6
            batch = take_batch(args.data, folder, args.pairs, args.max_length)
            torch.save(batch, folder / "batch.pt")
            real, scored = (int(batch[k].sum()) for k in ("attention_mask", "completion_mask"))
            shape = "x".join(map(str, batch["input_ids"].shape))
            shapes.append(
                f"V={vocab}: {millions:.1f}M parameters, batch {shape}, {real} tokens of which "
                f"{scored} scored"
            )
            rows += measure(args, vocab, folder, batch)
    info |= {"peers": "trl 1.16.0, transformers 5.23.0", "model": f"Llama {MODEL | HEADS}"}
    info |= {"batches": "; ".join(shapes), "repeats": args.repeats, "dtype": "float32"}
    publish("Steps of other trainers, with prefuse and without", info, rows, args.output)


if __name__ == "__main__":
    main()
