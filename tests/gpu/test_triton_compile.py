"""The Triton kernels compile for sm_80 and sm_90 without a GPU, use the tensor cores, and spill no register."""

import json
import os

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, re, subprocess, tempfile
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from lepton_kernels._backends import triton as backend

kernels = backend._kernels()


def compiled(kernel, pointers, constants, config, architecture):
    names = kernel.arg_names
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
        if name in pointers or name in ("k", "x_stride", "pairs", "n")
    }
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False)
    out = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = out.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"^\\.target (sm_\\w+)", ptx, re.M)[1]
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    report = report.stderr
    spills = sum(int(n) for n in re.findall(r"(\\d+) bytes spill", report))
    dot = sorted(set(re.findall(r"(?:wgmma\\.mma_async|mma)\\.sync\\.aligned[\\w.]*", ptx)))
    return dict(spills=spills, registers=int(re.search(r"Used (\\d+) registers", report)[1]), dot=dot,
                copies="cp.async" in ptx)


results = {}
for architecture in (80, 90):
    one = backend.Config(0, 0, 0, 4, 3)
    results[f"quantize_rows sm_{architecture}"] = compiled(
        kernels.quantize_rows, dict(x_ptr="*bf16", q_ptr="*i8", scale_ptr="*fp32", zero_ptr="*i32"),
        dict(BLOCK=backend._QUANTIZE_BLOCK), one, architecture)
    for integer in (True, False):
        for m in (1, 64, 256, 4096):
            operand = torch.int8 if integer else torch.bfloat16
            config = backend.choose(m, operand, None, architecture // 10)
            extra = dict(row_scale_ptr="*fp32", row_zero_ptr="*i32") if integer else {}
            absent = {} if integer else dict(row_scale_ptr=None, row_zero_ptr=None)
            tile = dict(INTEGER=integer, ACTIVATION="gelu" if m == 64 else "none",
                        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k)
            shared = dict(x_ptr="*i8" if integer else "*bf16", bias_ptr="*fp32", y_ptr="*bf16", **extra)
            results[f"gemm_int8 {'w8a8' if integer else 'w8a16'} m={m} sm_{architecture}"] = compiled(
                kernels.gemm_int8,
                dict(shared, w_ptr="*i8", w_scale_ptr="*fp32", **(dict(column_sum_ptr="*i32") if integer else {})),
                dict(tile, **absent, **({} if integer else dict(column_sum_ptr=None))), config, architecture)
            config = backend.choose(m, operand, 128, architecture // 10)
            tile.update(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k)
            results[f"gemm_int4 {'w4a8' if integer else 'w4a16'} m={m} sm_{architecture}"] = compiled(
                kernels.gemm_int4,
                dict(shared, w_ptr="*u8", scale_ptr="*bf16", zero_ptr="*i8",
                     **(dict(column_sum_ptr="*fp32") if integer else {})),
                dict(tile, GROUP=128, **absent, **({} if integer else dict(column_sum_ptr=None))),
                config, architecture)
print(json.dumps(results))
"""


def test_every_kernel_compiles_uses_tensor_cores_and_spills_nothing(run_python, tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    results = json.loads(run_python(COMPILE, **environment).splitlines()[-1])
    assert len(results) == 2 * (1 + 2 * 2 * 4)
    if os.environ.get("LEPTON_SHOW"):
        print(*(f"{name}: {found}" for name, found in results.items()), sep="\n")
    for name, found in results.items():
        assert found["spills"] == 0, (name, found)
        if name.startswith("gemm"):
            integer = "a8" in name
            assert found["copies"], name
            assert any(("s8" if integer else "bf16") in instruction for instruction in found["dot"]), (name, found)
