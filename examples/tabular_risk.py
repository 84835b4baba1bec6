"""Tabular risk scoring: a network over numbers and categories, from one stream of records that is never held in memory.

    python examples/tabular_risk.py [--samples 20000] [--epochs 2] [--workers 2]

The data is made here: twelve numbers and four categories a record; default depends on a few of them, with interactions.
"""

import argparse
import functools
from collections.abc import Iterator

import torch
from lepton_ai import LeptonDistributedModel, LeptonModel, ResourceManager
from lepton_ai.compression import Compression, Quantization
from lepton_ai.distributed import DataPartitioner, SynchronousUpdate
from torch import Tensor, nn
from torch.utils.data import IterableDataset

NUMBERS, CATEGORIES, LEVELS = 12, 4, 16
Record = tuple[Tensor, Tensor, Tensor]  # numbers f32 [12], categories int64 [4], 1.0 where it defaulted


class Records(IterableDataset[Record]):
    """The same records in the same order for every reader."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __iter__(self) -> Iterator[Record]:
        generator = torch.Generator().manual_seed(self.seed)
        effect = torch.randn(CATEGORIES, LEVELS, generator=torch.Generator().manual_seed(7))
        for _ in range(self.samples):
            numbers = torch.randn(NUMBERS, generator=generator)
            categories = torch.randint(0, LEVELS, (CATEGORIES,), generator=generator)
            score = effect[torch.arange(CATEGORIES), categories].sum() / 2 + numbers[0] - numbers[1] * numbers[2]
            yield numbers, categories, (torch.rand((), generator=generator) < score.sigmoid()).float()


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(LEVELS, 8) for _ in range(CATEGORIES))
        self.layers = nn.Sequential(
            nn.Linear(NUMBERS + 8 * CATEGORIES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
        )  # fmt: skip

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        embedded = [embedding(column) for embedding, column in zip(self.embeddings, categories.unbind(1), strict=True)]
        return self.layers(torch.cat([numbers, *embedded], 1)).squeeze(1)


@torch.inference_mode()
def auc(model: nn.Module, records: list[Record]) -> float:
    """The chance that a record that defaulted scores above one that did not."""
    numbers, categories, defaulted = (torch.stack(column) for column in zip(*records, strict=True))
    rank = model.eval()(numbers, categories).argsort().argsort().double()
    bad, good = int(defaulted.sum()), int((1 - defaulted).sum())
    return float(rank[defaulted == 1].sum() - bad * (bad - 1) / 2) / (bad * good)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--samples", type=int, default=20000)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--workers", type=int, default=2)
    chosen = options.parse_args()
    torch.manual_seed(0)
    job = LeptonDistributedModel(
        Scorer(), DataPartitioner(Records(chosen.samples, 0), batch_size=64), SynchronousUpdate("int8")
    )
    job.configure(ResourceManager(max_workers=chosen.workers))
    loss = nn.functional.binary_cross_entropy_with_logits
    print(job.train(loss, functools.partial(torch.optim.AdamW, lr=2e-3), epochs=chosen.epochs))
    dense = job.model
    assert isinstance(dense, nn.Module)
    small = LeptonModel(dense).compress(Quantization("w8a8"), Compression("huffman"))
    small.save("tabular_risk.safetensors")
    unseen = list(Records(3000, 1))
    print(f"AUC: float32 {auc(dense, unseen):.4f}, w8a8 {auc(small.model, unseen):.4f}; "
          f"file {small.report().file_bytes} bytes")  # fmt: skip


if __name__ == "__main__":
    main()
