"""torch's own fused path of nn.TransformerEncoderLayer, which reads the weights of its layers itself."""

from torch import nn


def disable_fused_path(model: nn.Module) -> None:
    """Switches it off in layers whose linear1 or linear2 is no nn.Linear any more: it would dequantize them, and
    multiply in float, at every call."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            type(layer) is not nn.Linear for layer in (module.linear1, module.linear2)
        ):
            module.activation_relu_or_gelu = 0  # the path's own switch
