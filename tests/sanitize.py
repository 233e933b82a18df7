"""compute-sanitizer over the CUDA kernels of csrc/, on small ragged shapes, with their results
checked: `python tests/sanitize.py`. The exit status is 0 if every run is clean.

By hand, a kernel without the sanitizer: `python tests/sanitize.py --run advantage`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if "prefuse" not in sys.modules and find_spec("prefuse") is None:  # a clone, never installed
    sys.modules["prefuse"] = types.ModuleType("prefuse")
    sys.modules["prefuse"].__path__ = [str(ROOT)]

from prefuse.kernels import advantage_scan  # noqa: E402
from prefuse.kernels.advantage_parts import check_packed  # noqa: E402
from prefuse.kernels.launch import HAS_CUDA_EXTENSION  # noqa: E402
from prefuse.kernels.logp import reference, token_logp  # noqa: E402
from prefuse.kernels.token_stats import OUTPUTS  # noqa: E402
from prefuse.kernels.whitening import whitening_statistics  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # the sanitizer's exit status where it found an error
MINUTES = 5  # that one run may take


def agree(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (got.cpu().double() - wanted.double()).abs()
    if not (error <= tolerance * (1 + wanted.double().abs())).all():
        raise SystemExit(f"{what}: differs from the reference by {error.max():.1e}")


def advantage(device: str, impl: str) -> None:
    """Every instance of gae_kernel: with and without values, penalty, statistics, two lambdas."""
    lengths = [1, 3, 0, 4, 127, 0, 129, 1023, 5, 1025, 2300, 2]  # over three chunks
    cu, total, count = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths), len(lengths)
    draw = lambda n: torch.randn(n, dtype=torch.float64)  # noqa: E731
    rewards, values, logp, ref_logp = (draw(total) for _ in range(4))
    mask, bootstrap, lam = torch.rand(total) < 0.6, draw(count), torch.rand(count).double()
    pair = dict(logp=logp, ref_logp=ref_logp, kl_coef=0.3)
    for options, has_values, masked in itertools.product(
        ({}, dict(lam=lam), dict(critic_lam=1.0), pair, pair | dict(critic_lam=lam)),
        (True, False),
        (True, False),
    ):
        if options and not has_values:
            continue  # returns alone take none of them
        given = dict(lam=0.9, mask=mask if masked else None, bootstrap=bootstrap) | options
        given |= dict(rewards=rewards, values=values if has_values else None, cu_seqlens=cu)
        exact = check_packed(**given, gamma=0.97)  # type: ignore[arg-type]
        wanted = advantage_scan.reference(exact)
        moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in given.items()}
        packed = check_packed(**moved, gamma=0.97)  # type: ignore[arg-type]
        for statistics in (False, True) if has_values else (False,):
            found = advantage_scan.scan(packed, impl, statistics)
            if found.advantages is not None:
                agree("advantages", found.advantages, wanted[0], 2e-5)
            agree("returns", found.returns, wanted[1], 2e-5)
            if found.statistics is not None:
                sums = whitening_statistics(wanted[0], exact.mask)
                agree("statistics", found.statistics, sums, 2e-5)


def token_stats(device: str, impl: str) -> None:
    """The folds forward and backward: each dtype, rows of odd lengths and odd strides."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for (n, v), dtype, softcap in itertools.product(
        ((5, 37), (1, 1), (3, 1025), (2, 9001)), dtypes, (None, 5.0)
    ):
        wide = (3 * torch.randn(n, v + 3)).to(dtype)
        targets, upstream = torch.randint(v, (n,)), torch.randn(n)
        results = []
        for op, where, options in ((reference, "cpu", {}), (token_logp, device, dict(impl=impl))):
            logits = (wide.double() if op is reference else wide).to(where).requires_grad_()
            stats = op(
                logits[:, :v], targets.to(where), outputs=OUTPUTS, softcap=softcap, **options
            )
            loss = ((stats.logp + stats.entropy) * upstream.to(where)).sum()
            results.append((stats, *torch.autograd.grad(loss, logits)))
        (exact, wanted), (stats, grad) = results
        for name in OUTPUTS:
            agree(name, getattr(stats, name), getattr(exact, name), 1e-4)
        agree("gradient", grad, wanted, 1e-4 if dtype == torch.float32 else 1e-2)


CASES: dict[str, Callable[[str, str], None]] = {  # a source of csrc/ each
    "advantage": advantage,
    "token_stats": token_stats,
}


def find_sanitizer() -> str | None:
    """On PATH, in CUDA_HOME, or beside nvcc."""
    places = [os.environ.get("PATH", "")]
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places += [f"{home}/bin" for home in homes if home]
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parent))
    places.append("/usr/local/cuda/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def missing() -> list[str]:
    """What there has to be before anything can be checked."""
    found = []
    if not torch.cuda.is_available():
        found.append("a GPU: torch.cuda.is_available() is False")
    if not HAS_CUDA_EXTENSION:
        found.append("the CUDA half of prefuse.kernels._C: reinstall prefuse with nvcc on PATH")
    if find_sanitizer() is None:
        found.append("compute-sanitizer: it comes with the CUDA toolkit; put it on PATH")
    return found


def check(name: str, tool: str) -> bool:
    """Whether a case runs clean under a tool."""
    sanitizer = find_sanitizer()
    assert sanitizer is not None
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, __file__, "--run", name]
    # An allocation each: out of bounds is then out of an allocation, not inside torch's pool.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60 * MINUTES
        )
        status, output = run.returncode, run.stdout + run.stderr
    except subprocess.TimeoutExpired:
        status, output = -1, f"stopped after {MINUTES} minutes"
    verdict = {0: "clean", FOUND: "errors"}.get(status, f"failed with status {status}")
    print(f"{tool:<10} {name:<12} {time.perf_counter() - start:6.1f} s  {verdict}", flush=True)
    if status:
        print(output[-4000:], flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS[:2])
    parser.add_argument("--run", choices=CASES, help="run a case here, without the sanitizer")
    asked = parser.parse_args()
    if asked.run:
        torch.manual_seed(0)
        CASES[asked.run]("cuda", "cuda")
        torch.cuda.synchronize()
        return 0
    lacking = missing()
    for what in lacking:
        print(f"missing: {what}", flush=True)
    if lacking:
        return 2
    clean = [check(name, tool) for name in CASES for tool in asked.tools]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
