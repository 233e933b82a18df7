"""An estimate in words, and what would make it smaller."""

from __future__ import annotations

from collections.abc import Callable

from ..config import updated
from ..estimate import Estimate, Run, estimate, models_of, seconds

SPARE = 0.9  # of a device's memory: contexts, communication buffers and fragments take the rest


def told(run: Run, found: Estimate) -> str:
    size = _in_gib if found.peak.total >= 2**30 else _in_mib
    lines = [*_memory(run, found, size), "", *_step(run, found)]
    remedies = _remedies(run, found, size)
    return "\n".join([*lines, *([""] if remedies else []), *remedies])


def _memory(run: Run, found: Estimate, size: Callable[[float], str]) -> list[str]:
    world = f", {run.ranks} ranks, --fsdp {run.config.fsdp}" if run.ranks > 1 else ""
    lines = [f"memory of a rank (device {run.device.name}{world}):"]
    for phase in found.phases:
        lines.append(f"  {phase.name:<24}{size(phase.total):>12}")
        for kind, held in sorted(phase.held.items(), key=lambda item: -item[1]):
            if held >= 0.0005 * found.peak.total:
                lines.append(f"    {kind:<22}{size(held):>12}")
    if run.config.activation_offloading:
        lines.append("  --activation_offloading is not counted: activations as if they stayed")
    peak = f"peak: {size(found.peak.total)}, in {found.peak.name}"
    limit = run.device.memory
    if limit is not None:
        verdict = "fits" if fits(run, found) else "does not fit"
        peak += f"; {verdict} {size(limit)}, of which {SPARE:.0%} are for it"
    return [*lines, peak]


def fits(run: Run, found: Estimate) -> bool:
    return run.device.memory is None or found.peak.total <= SPARE * run.device.memory


def _step(run: Run, found: Estimate) -> list[str]:
    cost, parts = found.cost, seconds(found, run.device, run.config)
    total = sum(parts.values())
    inside = ", ".join(f"{name} {value:.3g} s" for name, value in parts.items())
    lines = [
        f"a step of a rank: {found.micro_batches} micro-batches, {cost.real_tokens} real tokens "
        f"({cost.packed_tokens} laid out, {cost.scored_tokens} trained on)",
        f"model FLOPs {cost.useful:.3g}: 6 N a real token (N without the embedding), attention's",
        f"computed FLOPs {cost.done:.3g}: shared prefixes once, the head on trained tokens alone, "
        "reference and recomputation",
        f"at the device's ceilings {total:.3g} s ({inside}), "
        f"{run.ranks * cost.real_tokens / total:.0f} tokens/s; sampling and rewards not counted",
    ]
    if cost.sent:
        lines.append(f"sent and received by a rank: {cost.sent / 1e9:.3g} GB a step")
    return lines


def _remedies(run: Run, found: Estimate, size: Callable[[float], str]) -> list[str]:
    """Flags by what they free, and whether they do together."""
    if fits(run, found):
        return []
    tried = []
    for flag, changes in _changes(run):
        try:
            other = run._replace(config=updated(run.config, **changes))
            tried.append((found.peak.total - estimate(other).peak.total, flag, changes))
        except Exception:  # a flag that does not go with the others is no remedy
            continue
    tried = sorted((t for t in tried if t[0] > 0), key=lambda t: -t[0])
    lines = ["to make it smaller:"]
    lines += [f"  --{flag:<44} frees {size(freed)}" for freed, flag, _ in tried]
    config, chosen = run.config, []
    for _, flag, changes in tried:
        config = updated(config, **changes)
        chosen.append(f"--{flag}")
        least = estimate(run._replace(config=config))
        if fits(run, least):
            lines.append(f"fits with {' '.join(chosen)}: {size(least.peak.total)}")
            return lines
    more = run._replace(ranks=2 * run.ranks)
    lines.append(
        f"all together do not suffice; {more.ranks} ranks with --fsdp full would take "
        f"{size(estimate(more).peak.total)} each"
    )
    return lines


def _changes(run: Run) -> list[tuple[str, dict]]:
    config = run.config
    found: list[tuple[str, dict]] = []
    if not config.gradient_checkpointing:
        found.append(("gradient_checkpointing", {"gradient_checkpointing": True}))
    if models_of(config).reference == "live" and hasattr(config, "precompute_ref_log_probs"):
        cached = {"precompute_ref_log_probs": True}
        found.append(("precompute_ref_log_probs", cached))
    rows, times = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if rows > 1:
        half = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * times}
        found.append((" --".join(f"{k} {v}" for k, v in half.items()), half))
    if config.head_budget_mb is None or config.head_budget_mb > 256:
        found.append(("head_budget_mb 256", {"head_budget_mb": 256}))
    if config.dtype == "float32":
        found.append(("dtype bfloat16", {"dtype": "bfloat16"}))
    if run.ranks > 1 and not config.fsdp_cpu_offload:
        found.append(("fsdp_cpu_offload", {"fsdp_cpu_offload": True}))
    if run.ranks > 1 and config.fsdp != "full":
        found.append(("fsdp full", {"fsdp": "full", "fsdp_group_size": None}))
    return found


def _in_gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _in_mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
