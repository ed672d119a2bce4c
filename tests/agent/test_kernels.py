"""The Triton kernels of clipping: interpreted on the CPU in a process of its own, and compiled for CUDA devices."""

import subprocess
import sys
from pathlib import Path

import pytest
from triton import compile as compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradwatch.norms import triton_kernels
from tests.processes import ROOT, environment

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # of Triton 3.9, to whoever compiles


def test_interpreted_they_clip_as_the_oracle_does() -> None:
    """Run their own tests, and those of clipping that are few: a program takes milliseconds here."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/agent/interpreted.py"]
    command += ["tests/agent/test_agc.py", "-k", "not timm and not optax and not idempotent and not equals_the_oracle"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["unit_norms", "scale_units"])
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_they_compile_for_cuda(
    capability: int, name: str, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device is needed for it; the interpreter takes programs that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    kinds = ["*i32", "*i64", "*i64", "*fp64" if double else "*fp32", "constexpr", "constexpr"]
    source = ASTSource(
        kernel,
        dict(zip(kernel.arg_names, kinds, strict=True)),
        constexprs={"double": double, "block": triton_kernels.BLOCK},
    )
    assert compiled(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


CLIP = """
import logging, torch, gradwatch
logging.basicConfig()
parameter = torch.nn.Parameter(torch.ones(3, 4))
for _ in range(3):
    parameter.grad = torch.ones(3, 4)
    gradwatch.adaptive_clip_grad_([parameter], 0.1)
print(parameter.grad.unique().tolist())
"""


def _clip(path: Path | None, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(**variables)
    if path is not None:
        env["PYTHONPATH"] = f"{path}:{env['PYTHONPATH']}"
    return subprocess.run([sys.executable, "-c", CLIP], env=env, capture_output=True, text=True, check=True)


def test_a_triton_that_fails_is_told_once_and_gradients_are_clipped_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    done = _clip(tmp_path, TRITON_INTERPRET="1")
    assert done.stdout == "[0.10000000149011612]\n"
    assert done.stderr.count("WARNING") == 1
    assert "libcuda.so.1: cannot open shared object file" in done.stderr


def test_without_a_device_for_it_triton_is_not_even_loaded(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('loaded')\n")
    done = _clip(tmp_path)
    assert (done.stdout, done.stderr) == ("[0.10000000149011612]\n", "")
