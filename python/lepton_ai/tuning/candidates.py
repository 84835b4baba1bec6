"""What a layer may become: the choices that lepton tune weighs, and the layers that they make."""

import copy
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lepton_ai.compression import Choice
from lepton_kernels.checkpoint import stored_bytes
from lepton_kernels.quantize import quantize_

# In root mean squares of a weight; from one to the next an entropy-coded weight takes about half a bit less, and of a
# table, which may be half of a model, a quarter.
STEPS = (0.0, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56)
TABLE_STEPS = (0.0, *(round(0.05 * 2 ** (i / 4), 3) for i in range(15)))
_INT8 = tuple(Choice(scheme, step=step) for scheme in ("w8a8", "w8a16") for step in STEPS)
_INT4 = tuple(Choice(scheme, group_size=group) for scheme in ("w4a8", "w4a16") for group in (32, 128))
_SPARSE = tuple(Choice("w8a8", sparsity=sparsity, sparse=True) for sparsity in (0.5, 0.7, 0.85))
LINEAR = (Choice(), *_INT8, *_INT4, *_SPARSE)
EMBEDDING = (Choice(), *(Choice("w8a8", step=step) for step in TABLE_STEPS))
RECURRENT = (Choice(), Choice("w8a8"))
# For layers of which nothing is known: what is all but harmless anywhere.
CAUTIOUS = (Choice(), Choice("w8a8"))
CANDIDATES: dict[type[nn.Module], tuple[Choice, ...]] = {
    nn.Linear: LINEAR, nn.Embedding: EMBEDDING, nn.LSTM: RECURRENT, nn.GRU: RECURRENT, nn.LSTMCell: RECURRENT,
    nn.GRUCell: RECURRENT, nn.RNNCell: RECURRENT,
}  # fmt: skip


def tunable_layers(model: nn.Module, kinds: Iterable[type[nn.Module]]) -> dict[str, nn.Module]:
    """The layers of these types that quantize_ takes, by name, each once. Raises ValueError where there is none."""
    present = [kind for kind in kinds if any(type(module) is kind for module in model.modules())]
    if not present:
        names = ", ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise ValueError(f"tune: {type(model).__name__} has no layer to tune; allowed: a model with {names}")
    # On a copy: what quantize_ skips it says afterwards.
    report = quantize_(copy.deepcopy(model), "w8a8", include=present)
    modules = dict(model.named_modules(remove_duplicate=False))
    return {row.name: modules[row.name] for row in report.rows if not row.skipped}


def made(layer: nn.Module, choice: Choice) -> nn.Module:
    """The layer that a choice makes of `layer`, which is not changed."""
    if choice == Choice(codec=choice.codec):
        return layer
    alone = nn.Sequential(copy.deepcopy(layer) if choice.sparsity else layer)
    choice.apply(alone, [alone[0]])
    return alone[0]


def coded(layer: nn.Module, choice: Choice) -> tuple[Choice, int]:
    """The choice with the codec that makes `layer`, which it gave, smallest in a file, and the bytes there."""
    sizes = {codec: stored_bytes(layer, codec) for codec in ("huffman", "lzw")}
    best = min(sizes, key=sizes.__getitem__)
    return replace(choice, codec=best), sizes[best]
