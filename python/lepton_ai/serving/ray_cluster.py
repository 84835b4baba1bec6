"""A Ray cluster of several nodes on this machine, to try what happens when one dies.

    python -m lepton_ai.serving.ray_cluster NODES CPUS

is the process that has the cluster: it prints the address, does what each line of its input says (kill NODE, add),
prints a line when it has, and takes the cluster down when its input ends, as it does when who started it is gone.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import MutableMapping
from typing import Any, TextIO

_STORE = 100 << 20  # bytes of each node's object store; Ray's least is 75 MB
_START_SECONDS, _CHANGE_SECONDS, _LEAVE_SECONDS = 120.0, 60.0, 60.0


def quiet(environment: MutableMapping[str, str]) -> None:
    """For a cluster that this process starts, unless the environment says otherwise."""
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # they would tell Ray's makers
    environment.setdefault("RAY_worker_niceness", "0")  # 15 else: any other program would go first


class LocalCluster:
    """A head that runs no replicas and `nodes` nodes of `cpus` CPUs each, by Ray's count, not by the processor's.

    Use as `async with LocalCluster(...) as cluster`. It is there inside the context only, its files are in a folder of
    its own, and no other cluster of this machine is found or touched by it. Raises RuntimeError where the cluster does
    not come up or does not do what it is told.
    """

    def __init__(self, nodes: int, cpus: int = 1) -> None:
        if nodes < 1 or cpus < 1:
            raise ValueError(f"LocalCluster: nodes is {nodes}, cpus {cpus}; allowed: 1 or more")
        self._arguments = [str(nodes), str(cpus)]
        self._process: Any = None
        self.address = ""  # for ray.init and lepton serve --address

    async def __aenter__(self) -> "LocalCluster":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, *self._arguments, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            self.address = await self._line(_START_SECONDS)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _LEAVE_SECONDS)
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def kill_node(self, node: str) -> None:
        """Ends a node, by Ray's hexadecimal id, with all that runs on it; never the head."""
        await self._do(f"kill {node}")

    async def add_node(self) -> None:
        """Returns once it is part of the cluster."""
        await self._do("add")

    async def _do(self, what: str) -> None:
        self._process.stdin.write(f"{what}\n".encode())
        await self._process.stdin.drain()
        await self._line(_CHANGE_SECONDS)

    async def _line(self, seconds: float) -> str:
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        except asyncio.TimeoutError as error:
            raise RuntimeError(f"LocalCluster: no answer within {seconds:g} s") from error
        if not line:
            raise RuntimeError("LocalCluster: the cluster's process has ended")
        return str(line.decode().strip())


def main() -> None:
    """The process."""
    nodes, cpus = map(int, sys.argv[1:])
    answers, sys.stdout = sys.stdout, sys.stderr  # Ray may print
    with tempfile.TemporaryDirectory(prefix="lepton-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        quiet(os.environ)
        _run(nodes, cpus, answers)


def _run(nodes: int, cpus: int, answers: TextIO) -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cpus, "object_store_memory": _STORE}
    cluster: Any = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(**node)
        print(cluster.address, file=answers, flush=True)
        for line in sys.stdin:
            what, *names = line.split()
            if what == "kill":
                (victim,) = (each for each in cluster.worker_nodes if [each.node_id] == names)
                cluster.remove_node(victim, allow_graceful=False)
            else:
                cluster.add_node(**node)
            print("done", file=answers, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
