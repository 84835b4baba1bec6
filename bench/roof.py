"""The limits of this machine, measured: python bench/roof.py [--json]

Memory read (as one stream and as four, without and with software prefetch), last-level cache and L2 read in GB/s; int8,
bf16, fp16 and fp32 multiply-add peaks in billions of operations a second. Each for one thread and for all. What the
machine has no instruction for is None.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LABELS = {
    "dram_read_gb_s": "memory read, GB/s",
    "dram_read_prefetch_gb_s": "memory read, prefetch 4 KB ahead, GB/s",
    "dram_read_streams_gb_s": "memory read, 4 streams, GB/s",
    "dram_read_streams_prefetch_gb_s": "memory read, 4 streams, prefetch, GB/s",
    "llc_read_gb_s": "last-level cache read, GB/s",
    "l2_read_gb_s": "L2 read, GB/s",
    "int8_gops": "int8 multiply-add, GOPS",
    "amx_int8_gops": "int8 tiles (AMX), GOPS",
    "amx_bf16_gflops": "bf16 tiles (AMX), GFLOP/s",
    "bf16_gflops": "bf16 dot, GFLOP/s",
    "fp16_gflops": "fp16 multiply-add, GFLOP/s",
    "fp32_gflops": "fp32 multiply-add, GFLOP/s",
}


def cache_kib(level: int) -> int:
    """Size of a unified cache of this level; 1024 for L2 and 16384 for L3 where the system does not say."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level) and (index / "type").read_text().strip() == "Unified":
            return int((index / "size").read_text().strip().removesuffix("K"))
    return {2: 1024, 3: 16384}[level]


def measure() -> dict:
    """The figures by name: [one thread, all threads], or None; and `int8_instruction`."""
    source = Path(__file__).with_name("roof.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "roof"
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-std=c++20", "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
        sizes = [str(cache_kib(2)), str(cache_kib(3))]
        return json.loads(subprocess.run([program, *sizes], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    figures = measure()
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    print(f"{'':42}{'1 thread':>10}{str(figures['threads'][1]) + ' threads':>12}")
    for name, label in LABELS.items():
        if figures[name] is None:
            print(f"{label:42}{'no instruction':>22}")
        else:
            print(f"{label:42}{figures[name][0]:>10.1f}{figures[name][1]:>12.1f}")
    print(f"int8 by {figures['int8_instruction']}")


if __name__ == "__main__":
    main()
