"""Runs a function in several fresh processes that are joined by gloo on 127.0.0.1."""

import datetime
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing

COLLECTIVE_LIMIT = 60.0  # seconds that a process waits for the others
LIMIT = 30.0  # seconds a process, most of them its imports, which take turns on few cores


def _child(rank: int, work: Callable[..., None], processes: int, port: int, arguments: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_LIMIT)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timeout)
    try:
        work(*arguments)
        dist.barrier()
    except RuntimeError as error:
        if "onnection" in str(error):  # another process failed: its own error should be the one that is seen
            time.sleep(2)
        raise
    finally:
        dist.destroy_process_group()


def run(work: Callable[..., None], processes: int, *arguments: object) -> None:
    """work(*arguments) in every process, a function of a module. What fails in one is raised here, with its traceback.

    The processes end in any case: they are killed when one fails, when time is up, and with this process.
    """
    # The store lives here and picks its port itself: no other process can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.spawn(
        _child, (work, processes, store.port, arguments), nprocs=processes, join=False, daemon=True
    )
    limit = LIMIT * processes
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{work.__name__}: {processes} processes were not done in {limit} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
