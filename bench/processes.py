"""Worker processes that share the cores: python bench/processes.py [SECONDS]

MiniLM at batch 1 x 128 tokens, in one process and in four, each with torch's default number of threads; requests a
second of all together. Processes that want more threads than there are cores lose speed; ours should lose no more than
float.
"""

import multiprocessing
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WORKERS = 4


def serve(scheme: str, seconds: float, start: object, done: object) -> None:
    import torch
    from minilm import FOLDER
    from transformers import AutoModel

    import lepton_kernels as lk

    model = AutoModel.from_pretrained(FOLDER).eval()
    if scheme != "fp32":
        lk.quantize_(model, scheme)
        lk.fuse_(model)
    tokens = torch.randint(1000, 20000, (1, 128))
    with torch.inference_mode():
        for _ in range(3):
            model(tokens)
        start.wait()
        begin, calls = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            model(tokens)
            calls += 1
    done.put(calls / seconds)


def throughput(scheme: str, workers: int, seconds: float) -> float:
    start, done = multiprocessing.Barrier(workers), multiprocessing.Queue()
    processes = [multiprocessing.Process(target=serve, args=(scheme, seconds, start, done)) for _ in range(workers)]
    for process in processes:
        process.start()
    total = sum(done.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def main() -> None:
    multiprocessing.set_start_method("spawn")
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    print(f"{'':6} {'1 process':>12} {f'{WORKERS} processes':>12}   requests a second")
    for scheme in ("fp32", "w8a8"):
        one, many = (throughput(scheme, workers, seconds) for workers in (1, WORKERS))
        print(f"{scheme:6} {one:12.1f} {many:12.1f}   {many / one:.2f} x")


if __name__ == "__main__":
    main()
