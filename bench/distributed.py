"""Distributed training on this machine: python bench/distributed.py [speed] [loss] [kill]; all three without arguments.

speed: a DDP step of 7.3 million parameters over two ranks, each in a network namespace of its own, joined by a link of
100 Mbit/s, of 1 Gbit/s, and by one without a limit (needs root, ip and tc; says so and goes on where they are missing).
All contenders in turn in one pair of processes, medians. "on the wire": bytes that the interface counted, over those
that stats() says.
loss: the training loss after 200 steps over five seeds.
kill: a worker is killed at a random step; the resumed run's weights against those of a run that nobody disturbed.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from lepton_ai import LeptonDistributedModel, ResourceManager
from lepton_ai.distributed import DataPartitioner, SynchronousUpdate
from tables import markdown
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, TensorDataset

from lepton_kernels import blockwise

RATES = {"100 Mbit/s": "100mbit burst 64kb", "1 Gbit/s": "1gbit burst 512kb", "no limit": ""}
CONTENDERS = ("fp32", "torch's fp16 hook", "fp16", "bf16", "int8", "int4")
SECONDS = 4.0  # of steps a contender and link
ADDRESSES = "10.77.31.1", "10.77.31.2"
NAMESPACES = "lepton-rank0", "lepton-rank1"
SEEDS, STEPS = range(5), 200


def network(parameters_of_layers: tuple[int, ...] = (1024, 2048, 2048, 512)) -> nn.Module:
    """An MLP; by default of 7.3 million parameters."""
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(parameters_of_layers):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# speed


def run_ip(*arguments: str) -> None:
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def linked_namespaces() -> Iterator[None]:
    """Two network namespaces and a pair of interfaces that joins them."""
    try:
        for name in NAMESPACES:
            run_ip("ip", "netns", "add", name)
        run_ip("ip", "link", "add", "lepton0", "netns", NAMESPACES[0], "type", "veth", "peer", "name", "lepton1",
               "netns", NAMESPACES[1])  # fmt: skip
        for rank, (name, address) in enumerate(zip(NAMESPACES, ADDRESSES, strict=True)):
            inside = "ip", "-n", name
            run_ip(*inside, "address", "add", f"{address}/24", "dev", f"lepton{rank}")
            run_ip(*inside, "link", "set", "lo", "up")
            run_ip(*inside, "link", "set", f"lepton{rank}", "up")
        yield
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def limit(rate: str) -> None:
    for rank, name in enumerate(NAMESPACES):
        device = "dev", f"lepton{rank}"
        inside = "ip", "netns", "exec", name, "tc", "qdisc"
        subprocess.run([*inside, "del", *device, "root"], stderr=subprocess.DEVNULL, check=False)
        if rate:
            run_ip(*inside, "add", *device, "root", "tbf", "rate", *rate.split(), "latency", "400ms")


def wrapped(contender: str) -> tuple[DistributedDataParallel, SynchronousUpdate | None]:
    torch.manual_seed(0)
    model = DistributedDataParallel(network())
    if contender == "torch's fp16 hook":
        model.register_comm_hook(None, fp16_compress_hook)
        return model, None
    return model, SynchronousUpdate(contender, automatic=False).attach(model)


def sent_bytes(rank: int) -> int:
    return int(Path(f"/sys/class/net/lepton{rank}/statistics/tx_bytes").read_text())


def time_steps(rank: int) -> None:
    """One rank's process: steps of all contenders in turn, and rank 0 prints what it measured as JSON."""
    os.environ.update(MASTER_ADDR=ADDRESSES[0], MASTER_PORT="29400", GLOO_SOCKET_IFNAME=f"lepton{rank}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    models = {name: wrapped(name) for name in CONTENDERS}
    x = torch.randn(16, 1024)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    wire: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    start = time.perf_counter()
    is_over = torch.zeros(1)
    while len(times["fp32"]) < 4 or not is_over:
        for name, (model, update) in models.items():
            dist.barrier()
            before, claimed = sent_bytes(rank), update.stats().bytes_sent if update else 0
            began = time.perf_counter()
            model(x).square().mean().backward()
            times[name].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
            dist.barrier()
            if update:
                wire[name].append((sent_bytes(rank) - before) / max(update.stats().bytes_sent - claimed, 1))
        is_over.fill_(time.perf_counter() - start > SECONDS * len(CONTENDERS))
        dist.broadcast(is_over, 0)
    report = {
        name: {
            "seconds": median(times[name][2:]), "wire": median(wire[name][2:]) if wire[name] else None,
            "bytes": update.stats().bytes_sent / update.stats().steps if update else None,
        }
        for name, (_, update) in models.items()
    }  # fmt: skip
    if rank == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


def speed() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        print(f"speed: SKIPPED, needs root, ip and tc; missing: {', '.join(missing) or 'root'}")
        return
    rows = []
    with linked_namespaces():
        for link, rate in RATES.items():
            limit(rate)
            ranks = [
                subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, __file__, "--rank", str(rank)],
                    stdout=subprocess.PIPE, text=True,
                )
                for rank, name in enumerate(NAMESPACES)
            ]  # fmt: skip
            output = [process.communicate()[0] for process in ranks]
            if any(process.returncode for process in ranks):
                raise SystemExit(f"speed: a rank failed at {link}")
            report = json.loads(output[0].splitlines()[-1])
            plain, half = report["fp32"]["seconds"], report["torch's fp16 hook"]["seconds"]
            for name, of in report.items():
                fewer = report["fp32"]["bytes"] / of["bytes"] if of["bytes"] else None
                rows.append([
                    link, name, f"{1e3 * of['seconds']:.0f}", f"{of['seconds'] / plain:.2f}",
                    f"{of['seconds'] / half:.2f}", f"{fewer:.2f}" if fewer else "",
                    f"{of['wire']:.3f}" if of["wire"] else "",
                ])  # fmt: skip
    print("\n".join(markdown(
        ["link", "gradients", "ms a step", "of fp32", "of torch's fp16 hook", "times fewer bytes", "on the wire"], rows
    )))  # fmt: skip


def quantizer() -> None:
    """The native quantizer with error feedback, one thread, from the second-level cache."""
    torch.set_num_threads(1)
    x, residual = torch.randn(1 << 16), torch.zeros(1 << 16)
    for bits in (8, 4):
        out = blockwise.quantize(x, bits, residual)
        seconds = []
        for _ in range(2000):
            start = time.perf_counter()
            blockwise.quantize(x, bits, residual, out)
            seconds.append(time.perf_counter() - start)
        print(f"int{bits} quantizer with error feedback, 1 thread: {x.numel() * 4 / median(seconds) / 1e9:.1f} GB/s")


# loss


def teacher_data(samples: int, seed: int = 0) -> TensorDataset:
    """Inputs, and the classes that a random network gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 32, generator=generator)
    teacher = torch.randn(32, 64, generator=generator), torch.randn(64, 10, generator=generator)
    return TensorDataset(x, ((x @ teacher[0]).tanh() @ teacher[1]).argmax(1))


def digest(model: nn.Module) -> str:
    hashed = hashlib.sha256()
    for tensor in model.state_dict().values():
        hashed.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def trained(data: Dataset[tuple[Tensor, ...]], seed: int, compression: str, **settings: object) -> tuple[float, str]:
    """The last epoch's loss of 200 steps on two ranks, and the digest of the weights."""
    torch.manual_seed(seed)
    model = LeptonDistributedModel(
        network((32, 128, 128, 10)), DataPartitioner(data, batch_size=32, seed=seed),
        SynchronousUpdate(compression, automatic=False),
    )  # fmt: skip
    model.configure(ResourceManager(2, 2, max_restarts=3))
    epochs = -(-STEPS * 64 // 6400)
    report = model.train(nn.functional.cross_entropy, sgd, epochs=epochs, seed=seed, **settings)  # type: ignore[arg-type]
    return report.losses[-1], digest(model.model)  # type: ignore[arg-type]


def loss() -> None:
    data = teacher_data(6400)
    rows = []
    for compression in ("fp32", "int8", "int4"):
        losses = [trained(data, seed, compression)[0] for seed in SEEDS]
        rows.append([compression, *(f"{value:.4f}" for value in losses), f"{sum(losses) / len(losses):.4f}"])
    print("\n".join(markdown(["gradients", *(f"seed {seed}" for seed in SEEDS), "mean"], rows)))


# kill


class Deadly(Dataset[tuple[Tensor, ...]]):
    """A dataset that kills the process that reads its n-th sample, once: then `flag` is there."""

    def __init__(self, data: TensorDataset, n: int, flag: Path) -> None:
        self.data, self.n, self.flag = data, n, flag

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == self.n and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[index]


def kill() -> None:
    data = teacher_data(6400)
    rows = []
    for compression in ("fp32", "int8"):
        _, undisturbed = trained(data, 0, compression)
        for trial in range(5):
            n = random.Random(trial).randrange(6400)
            with tempfile.TemporaryDirectory() as folder:
                flag = Path(folder) / "killed"
                deadly = Deadly(data, n, flag)
                _, resumed = trained(deadly, 0, compression, checkpoint=f"{folder}/steps", checkpoint_every=20)
                same = "yes" if resumed == undisturbed and flag.exists() else "NO"
                rows.append([compression, str(trial), undisturbed, resumed, same])
    print("\n".join(markdown(["gradients", "trial", "undisturbed", "killed and resumed", "same bits"], rows)))


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return time_steps(int(sys.argv[2]))
    parts = {"speed": speed, "loss": loss, "kill": kill}
    for name in sys.argv[1:] or parts:
        if name not in parts:
            raise SystemExit(f"distributed.py: {name}; allowed: {', '.join(parts)}")
        parts[name]()
        if name == "speed":
            quantizer()
        print(flush=True)
    return None


if __name__ == "__main__":
    main()
