"""Builds `prefuse.kernels._C`: csrc/*.cpp always, csrc/*.cu where nvcc is on PATH."""

import os
import platform
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

NVCC = shutil.which("nvcc") if os.environ.get("PREFUSE_CUDA", "1") != "0" else None
ARCHS = ("80", "90", "100")
FOLDERS = ("engines", "feedback", "learners", "page", "plan")
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []


def cuda_options() -> dict:
    """Static cudart, so that the module imports on a machine without CUDA."""
    if NVCC is None:
        return {}
    dryrun = subprocess.run([NVCC, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", dryrun)
    root = Path(top.group(1)) if top else Path(NVCC).resolve().parents[1]
    return dict(
        define_macros=[("PREFUSE_CUDA", "1")],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        library_dirs=[str(p) for p in (root / "lib64", root / "lib") if p.exists()],
    )


class BuildExt(build_ext):
    """build_ext that compiles csrc/*.cu with nvcc and links the objects in."""

    def build_extension(self, ext):
        for src in sorted(glob("csrc/*.cu")) if NVCC else ():
            obj = Path(self.build_temp, src).with_suffix(".cu.o")  # not the .cpp of the same name
            obj.parent.mkdir(parents=True, exist_ok=True)
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
            gencode += [f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"]
            flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "--threads=0", *gencode]
            subprocess.check_call([NVCC, *flags, "-c", src, "-o", str(obj)])
            ext.extra_objects.append(str(obj))
        super().build_extension(ext)


setup(
    packages=[
        "prefuse.kernels",
        "prefuse.trainer",
        *(f"prefuse.trainer.{name}" for name in FOLDERS),
    ],
    package_dir={"prefuse.kernels": "kernels", "prefuse.trainer": "trainer"},
    package_data={"prefuse.kernels": ["*.pyi"]},
    ext_modules=[
        Pybind11Extension(
            "prefuse.kernels._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*")),  # also puts .cu and .h in the sdist
            cxx_std=17,
            # without these two, comparisons and roundings keep loops from becoming SIMD
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", *OPENMP],
            extra_link_args=OPENMP,
            **cuda_options(),
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
