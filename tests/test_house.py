"""The layout of the packages, and what may import what."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_namespace_package_leaves_hugging_face_kernels_alone():
    """transformers imports a package called `kernels`; ours must lose to it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "trainer" / "__init__.py").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from transformers import LlamaForCausalLM"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_kernels_know_neither_trainer_nor_transformers():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports_of(path):
            assert not name.startswith(("transformers", "prefuse", "..")), f"{path.name}: {name}"


def test_kernels_import_without_triton_and_extension():
    code = (
        "import sys, types\n"
        "sys.modules['triton'] = None\n"
        "sys.modules['prefuse.kernels._C'] = None\n"
        f"sys.modules['prefuse'] = types.ModuleType('prefuse')\n"
        f"sys.modules['prefuse'].__path__ = [{str(ROOT)!r}]\n"
        "import importlib, torch\n"
        "for name in sys.argv[1:]: importlib.import_module('prefuse.kernels.' + name)\n"
        "from prefuse.kernels.linear_logp import linear_logp\n"
        "w = torch.randn(9, 4, requires_grad=True)\n"
        "linear_logp(torch.randn(3, 4), w, torch.arange(3)).logp.sum().backward()\n"
        "assert w.grad.abs().sum() > 0\n"
    )
    names = [p.stem for p in (ROOT / "kernels").glob("*.py")]
    subprocess.run([sys.executable, "-c", code, *names], check=True, cwd="/")


def test_an_extra_installs_what_the_code_imports():
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1]
    code = "".join(p.read_text() for x in ("kernels", "trainer") for p in ROOT.glob(f"{x}/**/*.py"))
    for line in extras.split("\n\n")[0].splitlines():
        extra, packages = line.split(" = ")
        if extra not in ("dev", "peers"):
            for name in re.findall(r"[\w-]+", packages):
                assert re.search(rf"(import|from) [\w.]*{name.replace('-', '_')}", code), name


def test_the_source_distribution_is_the_repository():
    """Without them it had the tests alone, and none of the files that these read."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    for folder in ("benchmarks", "docs", "recipes", "tests"):
        assert f"graft {folder}\n" in manifest


def test_the_readme_shows_a_loss_as_it_is():
    block = next(x for x in (ROOT / "README.md").read_text().split("```") if "def hinge" in x)
    assert block.removeprefix("python\n") in (ROOT / "kernels" / "pair_losses.py").read_text()


def test_the_readme_s_numbers_are_those_of_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    readme_table = importlib.import_module("readme_table")
    assert readme_table.in_readme() == readme_table.table(), (
        "python benchmarks/readme_table.py --write"
    )


def test_the_readme_maps_every_file():
    """Each with its lines, right to a tenth."""
    listed = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if match := re.match(r"([\w/]+)/( |$)", line):
            folder = match[1]
        elif match := re.match(r"  (\S+) +(\d+)  \S", line):
            listed[folder, match[1]] = int(match[2])
    lines: dict[tuple[str, str], int] = {}
    inner = [path.parent.name for path in ROOT.glob("trainer/*/*.py")]
    for folder in ("csrc", "kernels", "trainer", *sorted({f"trainer/{name}" for name in inner})):
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".h", ".cpp", ".cu", ".py"):
                name = path.stem if (folder, path.stem) in listed else path.name
                count = len(path.read_text().splitlines())
                lines[folder, name] = lines.get((folder, name), 0) + count
    assert listed.keys() == lines.keys()
    for key, count in lines.items():
        assert abs(listed[key] - count) <= 5 + count / 10, (key, listed[key], count)
