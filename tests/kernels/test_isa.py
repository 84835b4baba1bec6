"""The instruction-set levels: the cap, its error, and objects that can not leak instructions into baseline code."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import INT16_ISAS, ISAS

ROOT = Path(__file__).parents[2]


def test_the_environment_caps_the_level(run_python):
    program = "from lepton_kernels._runtime import C; print(C.isa(), C.isa_of_machine())"
    for isa in ISAS:
        used, machine = run_python(program, LEPTON_MAX_ISA=isa).split()
        # A processor with AVX-512 need not have AVX-VNNI.
        allowed = {min(isa, machine, key=ISAS.index)} | ({"avx2"} if isa == "avxvnni" else set())
        assert used in allowed


def test_the_report_names_the_kernels_of_the_level(run_python):
    program = """
import lepton_kernels as lk
from lepton_kernels._runtime import C
print(C.isa(), *lk.backends()["cpu"].values())
"""
    for isa in ISAS:
        used, *kernels = run_python(program, LEPTON_MAX_ISA=isa).split()
        int16 = used in INT16_ISAS
        names = (
            "gemm_int8",
            "gemm_int16" if int16 else "gemm_int8",
            "gemm_int4",
            "gemm_int16" if int16 else "gemm_int4",
        )
        assert kernels == [f"{name}[{used}]" for name in names]


def test_an_unknown_level_is_an_error_that_lists_the_levels():
    program = "import lepton_kernels._runtime"
    environment = {"LEPTON_MAX_ISA": "avx3", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert f"LEPTON_MAX_ISA is 'avx3'; allowed: {', '.join(ISAS)}\n" in done.stderr


def test_kernel_objects_hold_no_weak_symbol():
    objects = sorted(ROOT.glob("build/cp*/CMakeFiles/*.dir/csrc/**/*.kernel.cpp.o"))
    if not objects:
        pytest.skip("no build folder beside the tests")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        kinds = [line.split()[-2] if len(line.split()) == 2 else line[17] for line in symbols.splitlines()]
        assert not {"W", "V", "u"} & set(kinds), (path, symbols)
