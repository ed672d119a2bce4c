"""Compiles the simulated accelerator once for each version of its source, of torch and of Python."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Final

import torch

_SOURCE: Final = Path(__file__).parent / "simulation.cpp"
_FLAGS: Final = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w")


def load() -> ModuleType:
    """Return the extension module, compiled if need be; importing it registers the backend with torch."""
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((torch.__version__, sys.version, _FLAGS)).encode()).hexdigest()
    name = f"gradwatch_sim_{key[:16]}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / f"gradwatch-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    built = folder / f"{name}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of one test run: one compiles
        if not built.exists():
            _compile(name, built)
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(name: str, built: Path) -> None:
    root = Path(torch.__file__).parent
    include = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    unfinished = built.with_suffix(".part")
    command = [
        os.environ.get("CXX", "g++"),
        *_FLAGS,
        *(f"-I{path}" for path in include),
        f"-DSIM_NAME={name}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        str(_SOURCE),
        *("-o", str(unfinished)),
        *(f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    unfinished.rename(built)
