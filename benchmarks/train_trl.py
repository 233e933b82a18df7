"""TRL's trainers as the whole-step benchmarks run them: several in one process, nothing from the
hub, no tokenizer on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from train_common import Clock


@dataclass(frozen=True)
class TRL:
    """A setting: rows of a micro-batch, and what else is searched."""

    micro: int
    checkpointing: bool = False
    liger: bool = False
    attention: str = "sdpa"
    compiled: bool = False

    def __str__(self) -> str:
        told = [f"micro-batch {self.micro}", self.attention]
        told += ["gradient checkpointing"] if self.checkpointing else []
        told += ["use_liger_kernel"] if self.liger else []
        return ", ".join(told + (["torch_compile"] if self.compiled else []))


def stages(batch: int, micros: list[int], compiled: bool) -> list[Callable[[TRL | None], list]]:
    """The first micro-batch, other attention and layers, other micro-batches, then larger ones with
    less kept of each row."""
    on_gpu = torch.cuda.is_available()

    def layers(best: TRL | None) -> list[TRL]:
        best = best or TRL(micros[0], checkpointing=True)
        more = [best]
        if on_gpu and _has("liger_kernel"):
            more.append(replace(best, liger=True))
        if on_gpu and _has("flash_attn"):
            more.append(replace(more[-1], attention="flash_attention_2"))
        return more

    def sizes(best: TRL | None) -> list[TRL]:
        best = best or TRL(1)
        return [replace(best, micro=m) for m in micros[1:] if m <= batch]

    def leaner(best: TRL | None) -> list[TRL]:
        best = best or TRL(1)
        more = [m for m in (2 * best.micro, 4 * best.micro) if m <= batch]
        return [replace(best, micro=m, checkpointing=True) for m in more or [best.micro]]

    def compiler(best: TRL | None) -> list[TRL]:
        return [replace(best, compiled=True)] if best and compiled else []

    return [lambda _: [TRL(micros[0])], layers, sizes, leaner, compiler]


def _has(package: str) -> bool:
    return find_spec(package) is not None


def load(trainer: str) -> None:
    """Imports it, which takes seconds, before the first setting's time begins; if it cannot be,
    every setting fails and says so."""
    with contextlib.suppress(ImportError, RuntimeError):
        getattr(import_module("trl"), trainer)


def options(folder: str, setting: TRL, batch: int, clock: Clock, autocast: bool) -> dict[str, Any]:
    """Arguments that DPOConfig and GRPOConfig share; those that prefuse has too are its defaults.

    logging_nan_inf_filter: would wait for the GPU at every step.
    """
    if batch % setting.micro:
        raise ValueError(f"micro-batch: wanted a divisor of {batch}; got {setting.micro}")
    return dict(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=autocast,
        gradient_checkpointing=setting.checkpointing,
        use_liger_kernel=setting.liger,
        torch_compile=setting.compiled,
        per_device_train_batch_size=setting.micro,
        gradient_accumulation_steps=batch // setting.micro,
        max_steps=clock.total,
        learning_rate=1e-6,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        beta=0.1,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def tokenizer() -> Any:
    """Of three words; the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Afterwards nothing is left of a trainer that would reach the next one, or prefuse: Liger
    replaces functions of transformers' Qwen2 module, accelerate keeps its first precision."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.models.qwen2 import modeling_qwen2

    before = dict(vars(modeling_qwen2))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_qwen2, name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def train(trainer: Any, clock: Clock) -> float:
    """Optimizer steps until the clock has enough; the first one's gradient norm."""
    from transformers import PrinterCallback, TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = clock.mark() or control.should_training_stop

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Ends())
    trainer.train()
    norms = [float(x["grad_norm"]) for x in trainer.state.log_history if "grad_norm" in x]
    return norms[0]
