"""Every Triton kernel compiles for four GPUs on a machine with none, without spilling."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
MODULES = ("fold", "gemm_fold", "segments", "advantage_scan", "surrogate")
MODULES += ("divergence_triton", "attention_merge")

COMPILE = """
import importlib.util, inspect, json, re, subprocess, sys, tempfile, types
from pathlib import Path
if importlib.util.find_spec("prefuse") is None:
    sys.modules["prefuse"] = types.ModuleType("prefuse")
    sys.modules["prefuse"].__path__ = [sys.argv[3]]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def nvidia(compiled):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"]); file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}

def amd(compiled):
    text = compiled.asm["amdgcn"]
    read = lambda key: int(re.search(rf"\\.{key}:\\s+(\\d+)", text).group(1))
    return {"registers": read("vgpr_count"),
            "spills": read("vgpr_spill_count") + read("sgpr_spill_count")
            + read("private_segment_fixed_size")}

target = GPUTarget(*json.loads(sys.argv[1]))
for name in json.loads(sys.argv[2]):
    module = importlib.import_module(f"prefuse.kernels.{name}")
    if target.arch not in getattr(module, "AOT_ARCHITECTURES", [target.arch]):
        continue
    for kernel, types_, constants, warps in module.AOT:
        names = list(inspect.signature(kernel.fn).parameters)
        signature = {n: "constexpr" if n in constants else types_.get(n, "i32") for n in names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": warps} | getattr(module, "AOT_OPTIONS", {})
        compiled = triton.compile(source, target=target, options=options)
        report = (nvidia if target.backend == "cuda" else amd)(compiled)
        report |= {"kernel": kernel.fn.__name__, "shared": compiled.metadata.shared}
        print(json.dumps(report))
"""


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}-{t[1]}")
def test_compiles_without_spills(target, capsys):
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE]
        + [json.dumps(target), json.dumps(MODULES), str(root)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) >= len(MODULES) - 1  # gemm_fold's are for Hopper
    with capsys.disabled():
        print()
        for row in rows:
            print(f"  {target[1]:<7} {row['kernel']:<24} {row['registers']:>4} registers  ", end="")
            print(f"{row['spills']} bytes spilled  {row['shared']} bytes shared")
    for row in rows:
        assert row["spills"] == 0, row


def test_every_triton_module_is_compiled():
    kernels = Path(__file__).parents[1] / "kernels"
    with_triton = {p.stem for p in kernels.glob("*.py") if "@triton.jit" in p.read_text()}
    assert with_triton == {*MODULES, "logit_block"}  # which fold and divergence_triton inline
