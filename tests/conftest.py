"""Lets pytest run in a clone that was never installed, and Triton kernels run without a GPU."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported

if importlib.util.find_spec("prefuse") is None:
    sys.modules["prefuse"] = types.ModuleType("prefuse")
    sys.modules["prefuse"].__path__ = [str(Path(__file__).parents[1])]

pytest_plugins = ["online_runs", "judge_server"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    """`-m gpu` also runs what asks for `device`: with a GPU there, on the GPU."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where the fast paths run: the GPU if there is one (Triton compiled), else the CPU
    (Triton interpreted)."""
    return DEVICE


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real preference data, tokenizers and a tiny model; PREFUSE_DATA names the folder."""
    path = os.environ.get("PREFUSE_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("PREFUSE_DATA does not name a folder of real data")
    return Path(path)
