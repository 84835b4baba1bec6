"""train_form_ and compressed_form_: a model's compressed layers by layers that train, and back, in place."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

import lepton_kernels as lk
from lepton_ai.training.layers import TrainEmbedding, TrainLinear
from lepton_ai.training.masked import MASKABLE, Masked, kept_of, mask_
from lepton_ai.training.recurrent import TRAINABLE, TrainRecurrent, train_recurrent_
from lepton_kernels.nn import QuantEmbedding, QuantLinear, SparseLinear
from lepton_kernels.nn.quant_recurrent import Recurrent

# The share of zeros from which a weight counts as pruned, by its bits. A grid of 16 steps rounds a third of an unpruned
# weight with outliers to zero, one of 255 steps about a hundredth; a common step as many as it is coarse.
_PRUNED = {8: 0.1, 7: 0.15, 6: 0.2, 5: 0.3, 4: 0.4}
_PRUNED_WITH_STEP = 0.4
Plan = dict[nn.Module, Callable[[], nn.Module]]


def _masks(model: nn.Module, mask_from: float) -> Plan:
    """Masks of the pruned float layers, and of what their weights are tied to."""
    weights = {module: module._parameters.get("weight") for module in model.modules() if not isinstance(module, Masked)}
    masks = {
        id(weight): kept_of(weight, mask_from)
        for module, weight in weights.items()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and weight is not None
    }
    plan: Plan = {}
    for name, module in model.named_modules():
        mask = masks.get(id(weights.get(module)))
        if mask is None:
            continue
        if type(module) not in MASKABLE:
            zeros = 1 - float(mask.float().mean())
            allowed = ", ".join(f"nn.{kind.__name__}" for kind in MASKABLE)
            raise ValueError(
                f"train_form_: layer {name!r} is {type(module).__name__} with {zeros:.0%} zeros to be kept; "
                f"allowed: {allowed}, no subclass; or a mask_from above its share of zeros"
            )
        plan[module] = partial(mask_, module, mask)
    return plan


def _way(name: str, module: nn.Module, mask_from: float | None) -> Callable[[], nn.Module] | None:
    """What makes the training form of a compressed layer; None for any other module."""
    if type(module) is QuantLinear:
        if mask_from is None:
            mask_from = _PRUNED_WITH_STEP if module.scheme.step else _PRUNED[module.scheme.weight_bits]
        return partial(TrainLinear.from_quant, module, kept_of(module.weight, mask_from))
    if type(module) is SparseLinear:
        return partial(TrainLinear.from_sparse, module)
    if type(module) is QuantEmbedding:
        return partial(TrainEmbedding, module)
    if type(module) in TRAINABLE:
        return partial(train_recurrent_, module)
    recurrent = isinstance(module, Recurrent) and not isinstance(module, TrainRecurrent)
    if recurrent or isinstance(module, (QuantLinear, SparseLinear, QuantEmbedding)):
        kinds = ", ".join(kind.__name__ for kind in TRAINABLE)
        raise ValueError(
            f"train_form_: layer {name!r} is {type(module).__name__}; allowed: QuantLinear, QuantEmbedding, "
            f"SparseLinear, SparseConv2d, {kinds}, no subclass; leave it out: Quantization(..., exclude=[{name!r}])"
        )
    return None


def _replace(model: nn.Module, plan: Mapping[nn.Module, Callable[[], nn.Module]]) -> nn.Module:
    made = {old: make() for old, make in plan.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made and made[child] is not child:
                setattr(parent, name, made[child])
    return made.get(model, model)


def train_form_(model: nn.Module, *, mask_from: float | None = None) -> nn.Module:
    """Gives every compressed layer of `model` float32 master weights to train, in place; compressed_form_ undoes it.

    QuantLinear, SparseLinear and the product of a SparseConv2d become TrainLinear, QuantEmbedding becomes
    TrainEmbedding; QuantLSTM, QuantGRU and the cells become TrainLSTM and so on, their weights TrainLinear. Biases
    train too. Fused blocks (fuse_) stay and run their parts one by one. A layer trains with the weights that it will
    have when compressed again; a 4-bit symmetric grid moves, by up to a fifteenth, with the first step, as its scales
    are those of the masters from then on.

    Zeros of a SparseLinear stay zero. So do those of a QuantLinear (a recurrent layer's too), nn.Linear or nn.Conv2d of
    which at least the share `mask_from` is zero, but not all (0 < mask_from <= 1; None: 0.1 for 8 bits, more
    for fewer, 0.4 for 4 bits or with a step, as coarse grids have many zeros unpruned), those among them that rounding
    made included; a lower share counts as chance and trains. An nn.Linear and the like keeps its dtype and parameter.

    Returns `model`, or its training form where it is itself a layer. Raises ValueError, before anything is changed, for
    a subclass of a compressed layer or of a pruned one, and when there is no compressed layer.
    """
    if mask_from is not None and not 0 < mask_from <= 1:
        raise ValueError(f"train_form_: mask_from is {mask_from!r}; allowed: 0 < mask_from <= 1, or None")
    ways = {module: _way(name, module, mask_from) for name, module in model.named_modules()}
    plan = {module: way for module, way in ways.items() if way is not None}
    plan |= _masks(model, _PRUNED[8] if mask_from is None else mask_from)
    if not plan:
        raise ValueError(f"train_form_: nothing to train in {type(model).__name__}; allowed: a compressed model")
    return _replace(model, plan)


def compressed_form_(model: nn.Module, *, fuse: bool = True) -> nn.Module:
    """Makes the layers that train_form_ gave `model` compressed ones again, in place: same classes, schemes and zeros.

    What training left alone comes back to the bit. fuse: lepton_kernels.fuse_ afterwards, as the sharing of an input by
    several layers ends with train_form_. Returns `model`, or its compressed form where it is itself a layer. Raises
    ValueError, before anything is changed, when no layer has its training form or a weight holds NaN or infinity.
    """
    # Those that change in place come last: when a weight raises an error, nothing has changed.
    plan: Plan = {
        module: module.compressed
        for kinds in ((TrainLinear, TrainEmbedding), (Masked, TrainRecurrent))
        for module in model.modules()
        if isinstance(module, kinds)
    }
    if not plan:
        raise ValueError(
            f"compressed_form_: nothing to compress in {type(model).__name__}; allowed: a model from train_form_"
        )
    model = _replace(model, plan)
    if fuse:
        lk.fuse_(model, optional=True)
    return model
