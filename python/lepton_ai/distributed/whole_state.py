"""The state dict of a whole model, from and to the processes that share it: a checkpoint knows nothing of the split."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lepton_ai.distributed import exchange
from lepton_ai.distributed.slicing import State
from lepton_ai.distributed.tensor_parallel import ParallelLayer


def _parallel_layers(model: nn.Module) -> dict[str, ParallelLayer]:
    """The layers that split_ made, by name; one that stands at several places under each."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, ParallelLayer)}


def _owner(name: str, layers: dict[str, ParallelLayer]) -> str | None:
    return next((layer for layer in layers if name.startswith(layer + ".")), None)


def gather_state(model: nn.Module, mesh: DeviceMesh) -> State:
    """The whole model's state dict on every process, from a model after split_ or sharded, or a pipeline's
    stage.

    All processes that share the model call it together. Names, shapes and dtypes are those before the split.
    """
    layers = _parallel_layers(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if _owner(name, layers) is None}
    state = {name: exchange.whole(tensor) for name, tensor in state.items()}
    for prefix, layer in layers.items():
        state |= {f"{prefix}.{name}": tensor for name, tensor in layer.whole_state().items()}
    stages = mesh.get_group("pipeline")
    whole: State = {}
    for stage in range(stages.size()):
        whole |= exchange.broadcast_state(state, stage, stages)
    return whole


def load_state(model: nn.Module, state: State) -> None:
    """Loads a whole model's state dict into this process's slices. Raises RuntimeError for names that do not fit."""
    layers = _parallel_layers(model)
    rest = {name: tensor for name, tensor in state.items() if _owner(name, layers) is None}
    missing, unexpected = model.load_state_dict(rest, strict=False)
    missing = [name for name in missing if _owner(name, layers) is None]
    if missing or unexpected:
        raise RuntimeError(f"load_state: names that the state lacks: {missing}; that the model lacks: {unexpected}")
    for prefix, layer in layers.items():
        layer.load_whole_state(
            {
                name.removeprefix(prefix + "."): tensor
                for name, tensor in state.items()
                if _owner(name, layers) == prefix
            }
        )
