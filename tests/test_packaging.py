"""One wheel for every torch and every x86-64 CPU: what the native module links, requires and executes."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_kernels._runtime import C

ROOT = Path(__file__).parents[1]
SYSTEM = {"libgomp.so.1", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
LEVEL = re.compile(r"lepton::(avx2|avxvnni|avx512vnni|avx512vbmi2|amx)::")


def test_the_native_module_links_the_system_alone():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    out = subprocess.run(["readelf", "-d", C.__file__], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", out))
    assert needed <= SYSTEM, needed - SYSTEM


def test_the_package_alone_requires_neither_torch_nor_cuda():
    requirements = importlib.metadata.requires("lepton-kernels") or []
    core = {re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" not in line}
    assert core == {"numpy", "xxhash"}
    torch = [line for line in requirements if re.match(r"torch\b", line)]
    assert torch
    assert all("<" not in line and "==" not in line.split(";")[0] for line in torch)


def test_wide_registers_stay_inside_their_levels():
    """Baseline code that holds an AVX instruction is an illegal instruction on an old CPU."""
    modules = sorted(ROOT.glob("build/cp*/_C*.so"))  # the installed copy has no symbols
    if shutil.which("objdump") is None or not modules:
        pytest.skip("objdump (binutils) is not installed, or no build folder stands beside the tests")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", modules[-1]]
    function, wide, seen = "", set(), False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        for line in listing.stdout:
            if line.endswith(">:\n"):
                function = line
                seen = seen or bool(LEVEL.search(function))
            elif ("%ymm" in line or "%zmm" in line) and not LEVEL.search(function):
                wide.add(function.strip())
    assert seen
    assert not wide


def test_importing_is_quick_and_touches_neither_network_nor_gpu(run_python):
    program = """
import socket, sys, time
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket = refuse
start = time.perf_counter()
import lepton_kernels
lepton_kernels.backends()
print(time.perf_counter() - start < 1.0, [name for name in ("torch", "triton", "transformers") if name in sys.modules])
"""
    assert run_python(program, CUDA_VISIBLE_DEVICES="") == "True []\n"


def test_python_version_is_supported():
    assert sys.version_info >= (3, 10)
