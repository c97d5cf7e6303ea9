"""Builds the compiled operators with CMakeLists.txt: ssmtune/_C.so and, for GPUs, ssmtune/_C_cuda.so.

SSMTUNE_BUILD       auto (default): compile where possible, else install without; require: fail instead; off
SSMTUNE_CUDA        auto (default): for GPUs too where torch is built with CUDA and nvcc is found; 1: do, or fail; 0
SSMTUNE_CUDA_ARCHS  compute capabilities to compile for; 80;90;100 by default, and later ones from the last
SSMTUNE_TORCH_DIR   the installed torch package, where it cannot be found from here (uv's build isolation)
MAX_JOBS            compilers run at once

Everything else is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("SSMTUNE_BUILD", "auto").lower()
CUDA = os.environ.get("SSMTUNE_CUDA", "auto").lower()
FIND_TORCH = (
    "from importlib.util import find_spec; s = find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
)


@cache
def torch_dir():
    """Directory of the torch to build against, or None. torch is never imported: that takes seconds.

    pip's build isolation hides torch from this process through PYTHONPATH; the same interpreter started with -I, which
    ignores that variable, sees the environment being installed into.
    """
    if os.environ.get("SSMTUNE_TORCH_DIR"):
        return os.environ["SSMTUNE_TORCH_DIR"]
    interpreters = [sys.executable]
    if os.environ.get("VIRTUAL_ENV"):
        # `python -m build` isolates with an environment of its own
        interpreters.append(str(Path(os.environ["VIRTUAL_ENV"], "bin", "python")))
    for interpreter in interpreters:
        answer = subprocess.run([interpreter, "-I", "-c", FIND_TORCH], capture_output=True, text=True, cwd="/")
        found = answer.stdout.strip()
        if answer.returncode == 0 and found and Path(found, "include", "torch", "csrc", "stable").is_dir():
            return found
    return None


def tool(name):
    """Path of a program, also when its environment is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def why_not():
    """What is missing for a build, or None."""
    if MODE not in ("auto", "require", "off"):
        raise SystemExit(f"SSMTUNE_BUILD={MODE}: expected auto, require or off")
    if MODE == "off":
        return "SSMTUNE_BUILD=off"
    if os.name == "nt":
        return "the compiled kernels are not supported on Windows"
    if not any((ROOT / "csrc").glob("*.cpp")):
        return "no sources in csrc"
    if not tool("cmake"):
        return "no cmake on PATH (pip install cmake ninja)"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler on PATH (Debian and Ubuntu: apt install g++)"
    if torch_dir() is None:
        return "torch >= 2.10 is not installed (pip install torch, then ssmtune again)"
    return None


def nvcc():
    """Path of the CUDA compiler, or None: in $CUDACXX, on the PATH, of an installed toolkit, or of pip's packages."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += sorted(Path(torch_dir() or "/").parent.glob("nvidia/cu*"), reverse=True)
    found = (shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes if home)
    return os.environ.get("CUDACXX") or tool("nvcc") or next(filter(None, found), None)


def why_not_cuda():
    """Why nothing is compiled for GPUs, or None. Only one that was asked for and cannot be had is an error."""
    if CUDA not in ("auto", "1", "0"):
        raise SystemExit(f"SSMTUNE_CUDA={CUDA}: expected auto, 1 or 0")
    if CUDA == "0":
        return "SSMTUNE_CUDA=0"
    if CUDA == "auto" and not Path(torch_dir() or "/", "lib", "libtorch_cuda.so").is_file():
        return "torch is built without CUDA"
    if nvcc() is None:
        return "no nvcc (install the CUDA toolkit, or name its compiler with CUDACXX)"
    return None


class BuildNative(build_ext):
    """Runs CMake in place of setuptools' own compiler calls."""

    def get_ext_filename(self, fullname):
        # no Python version in the name: the library has no Python symbols
        return fullname.replace(".", "/") + ".so"

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def run(self):
        self.build("_C", "the compiled kernels", "cmake", [], MODE == "require", "SSMTUNE_BUILD=require")
        reason = why_not_cuda()
        if reason is None:
            options = ["-DSSMTUNE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
            # given even where it is empty: CMake would remember the last one
            options.append(f"-DSSMTUNE_CUDA_ARCHS={os.environ.get('SSMTUNE_CUDA_ARCHS', '')}")
            # in a folder of its own: whatever goes wrong here, _C.so is built
            self.build("_C_cuda", "the CUDA kernels", "cuda", options, CUDA == "1", "SSMTUNE_CUDA=1")
        else:
            # one of an earlier build may not fit the Python code any more
            self.target("_C_cuda").unlink(missing_ok=True)

    def target(self, name):
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib)) / "ssmtune" / f"{name}.so"

    def build(self, name, what, folder, options, is_required, switch):
        try:
            self.compile(name, ROOT / "build" / folder, options)
        except (OSError, subprocess.CalledProcessError) as error:
            self.target(name).unlink(missing_ok=True)
            if is_required:
                raise SystemExit(f"ssmtune: {what} did not build: {error}") from error
            warn(f"{what} did not build ({error})", switch)

    def compile(self, name, build, options):
        # fixed folders, so that every way of installing rebuilds only what changed
        output = build / "out"
        configure = [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(build)),
            *(f"-DSSMTUNE_TORCH_DIR={torch_dir()}", f"-DSSMTUNE_OUTPUT_DIR={output}", *options),
        ]
        if tool("ninja"):
            # given each time: the one remembered may lie in a build environment that is gone
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        if subprocess.run(configure).returncode != 0:
            # settings left by another generator or another place of this folder
            shutil.rmtree(build, ignore_errors=True)
            subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2)
        subprocess.run([tool("cmake"), "--build", str(build), "--target", name, "--parallel", jobs], check=True)

        target = self.target(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # replaced, not overwritten: a running process may have the old one mapped
        shutil.copy2(output / f"{name}.so", target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)


class Wheel(bdist_wheel):
    """Tags a wheel with compiled kernels for its platform and every Python."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def warn(message, switch):
    print(
        f"ssmtune: {message}; installing without them.\n"
        f"  `ssmtune env` says what runs instead, and what is missing; {switch} makes this an error.",
        file=sys.stderr,
    )


def main():
    reason = why_not()
    if reason and MODE == "require":
        raise SystemExit(f"ssmtune: SSMTUNE_BUILD=require, but the compiled kernels cannot be built: {reason}")
    if reason and MODE == "auto":
        warn(f"the compiled kernels cannot be built: {reason}", "SSMTUNE_BUILD=require")
    no_cuda = reason or why_not_cuda()
    if no_cuda and CUDA == "1":
        raise SystemExit(f"ssmtune: SSMTUNE_CUDA=1, but the CUDA kernels cannot be built: {no_cuda}")
    if no_cuda and no_cuda.startswith("no nvcc"):
        warn(f"the CUDA kernels cannot be built: {no_cuda}", "SSMTUNE_CUDA=1")
    setup(
        # triton_kernels/ goes in as a sub-package: the top-level name belongs to another project
        packages=[*find_packages(include=["ssmtune", "ssmtune.*"]), "ssmtune.triton_kernels"],
        package_dir={"ssmtune": "ssmtune", "ssmtune.triton_kernels": "triton_kernels"},
        ext_modules=[] if reason else [Extension("ssmtune._C", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )


if __name__ == "__main__":
    main()
