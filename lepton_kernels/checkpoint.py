"""save and load: a model or a state dict as one model file (model_file.py), tensor by tensor."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lepton_kernels import model_file
from lepton_kernels._progress import progress
from lepton_kernels.fused_path import disable_fused_path
from lepton_kernels.nn import QuantEmbedding, QuantLinear, SparseConv2d, SparseLinear
from lepton_kernels.nn.quant_recurrent import REPLACEMENTS
from lepton_kernels.scheme import QuantScheme

_LOG = logging.getLogger("lepton_kernels")
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64,
    "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RECURRENT = {kind.__name__: (kind, old) for old, kind in REPLACEMENTS.items()}
_LAYERS_KEY, _TIED_KEY = "lepton.layers", "lepton.tied"


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def stored_bytes(model: nn.Module, codec: str = "huffman") -> int:
    """Bytes that the tensors of a model or layer take in a file of that codec; the file's header comes on top."""
    total = 0
    for tensor in model.state_dict().values():
        data = _bytes_of(tensor)
        frame = model_file.encode(data, _NAMES[tensor.dtype], codec)
        total += data.size if frame is None else len(frame)
    return total


def _sparse(layer: SparseLinear) -> dict[str, Any]:
    scheme: Any = layer.scheme
    if layer.scheme is not None:
        scheme = layer.scheme.name if layer.scheme == QuantScheme.of(layer.scheme.name) else asdict(layer.scheme)
    return {"nonzeros": layer.nonzeros, "bias": layer.bias is not None,
            "dtype": None if scheme else _NAMES[layer.weight_compressed.dtype],
            "activation": layer.activation, "scheme": scheme}  # fmt: skip


def _layers(model: nn.Module) -> dict[str, Any]:
    """What each quantized module is, by name, so that load can build it without the weights."""
    out: dict[str, Any] = {}
    parts: set[nn.Module] = set()  # of recurrent layers and convolutions, which are built with them
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ in _RECURRENT and isinstance(module, _RECURRENT[type(module).__name__][0]):
            out[name] = {"kind": type(module).__name__}
            parts.update(module.children())
        elif module in parts:
            continue
        elif isinstance(module, QuantLinear):
            out[name] = {"kind": "QuantLinear", "scheme": asdict(module.scheme), "bias": module.bias is not None,
                         "activation": "none" if module.activation_is_fused else module.activation}  # fmt: skip
        elif isinstance(module, SparseLinear):
            out[name] = {"kind": "SparseLinear", **_sparse(module)}
        elif isinstance(module, SparseConv2d):
            parts.add(module.product)
            out[name] = {"kind": "SparseConv2d", "kernel_size": module.kernel_size, "stride": module.stride,
                         "padding": module.padding, "dilation": module.dilation, "padding_mode": module.padding_mode,
                         **_sparse(module.product)}  # fmt: skip
        elif isinstance(module, QuantEmbedding):
            dtype = _NAMES[module.dtype]
            out[name] = {"kind": "QuantEmbedding", "padding_idx": module.padding_idx, "dtype": dtype,
                         "weight_bits": module.weight_bits, "step": module.step}  # fmt: skip
    return out


def _codecs(names: Sequence[str], codecs: Mapping[str, str]) -> dict[str, str]:
    """The codec of each tensor: that of the innermost module that `codecs` names."""
    if "" not in codecs:
        raise ValueError(f"save: codec names {sorted(codecs)[:5]} alone; allowed: also '', for all else")
    inside: dict[str, list[str]] = {module: [n for n in names if n.startswith(f"{module}.")] for module in codecs}
    inside[""] = list(names)
    out: dict[str, str] = {}
    for module in sorted(codecs, key=len):
        if names and not inside[module]:
            raise ValueError(f"save: codec names {module!r}; allowed: modules with tensors, such as {names[0]!r}'s")
        out.update(dict.fromkeys(inside[module], codecs[module]))
    return out


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    codec: str | Mapping[str, str] = "huffman",
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model, or a state dict, as one safetensors file, lossless and atomic.

    codec: "huffman", "lzw" or "none"; tensors that would shrink by less than 3 % stay as they are. A mapping gives the
    modules that it names codecs of their own, and all else what it has for "". Tied tensors are stored once.
    metadata: more texts for the header. Any safetensors reader opens the file; coded tensors look like U8 to it.
    Raises ValueError for an unknown codec or dtype, a codec of a module without tensors, meta tensors and a reserved
    metadata name, OSError when writing fails; a file that was there before is then still there.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    texts = {"format": "pt", **(metadata or {})}
    for name in texts:
        if name.startswith("lepton."):
            raise ValueError(f"save: metadata holds {name!r}; allowed: names that do not start with 'lepton.'")
    codec_of = _codecs(list(state), {"": codec} if isinstance(codec, str) else codec)
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    pending = []
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"save: {name} is {type(tensor).__name__}; allowed: tensors")
        if tensor.is_meta or tensor.dtype not in _NAMES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
            raise ValueError(f"save: {name} is {tensor.dtype} on {tensor.device}; allowed: {allowed}, not on meta")
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        data = partial(_bytes_of, tensor)
        pending.append(model_file.Pending(name, _NAMES[tensor.dtype], tuple(tensor.shape), data, codec_of[name]))
    if isinstance(model, nn.Module):
        texts[_LAYERS_KEY] = json.dumps(_layers(model))
    if tied:
        texts[_TIED_KEY] = json.dumps(tied)
    model_file.write(path, pending, texts)


def _tensor(entry: model_file.Entry, data: np.ndarray, device: torch.device | None) -> Tensor:
    if not data.size:
        return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device=device)
    return torch.from_numpy(data).view(_DTYPES[entry.dtype]).reshape(entry.shape).to(device)


def _empty_layer(spec: Mapping[str, Any], old: nn.Module) -> nn.Module:
    """The quantized module that stands in for `old`: on the meta device, or `old` itself where it is such a layer."""
    if spec["kind"] in _RECURRENT:
        kind, plain = _RECURRENT[spec["kind"]]
        if not isinstance(old, (kind, plain)):
            raise TypeError(f"an nn.{plain.__name__} in the file and {type(old).__name__} in the model")
        return kind.empty_like(old, device="meta")
    if spec["kind"] == "QuantEmbedding":
        if not isinstance(old, (nn.Embedding, QuantEmbedding)):
            raise TypeError(f"an nn.Embedding in the file and {type(old).__name__} in the model")
        dtype = _DTYPES[spec["dtype"]]
        grid = spec.get("weight_bits", 8), spec.get("step", 0.0)
        return QuantEmbedding(old.num_embeddings, old.embedding_dim, spec["padding_idx"], dtype, "meta", *grid)
    dtype = _DTYPES[spec["dtype"]] if spec.get("dtype") else torch.float32
    scheme = QuantScheme(**spec["scheme"]) if isinstance(spec["scheme"], dict) else spec["scheme"]
    if spec["kind"] == "SparseConv2d":
        if not isinstance(old, (nn.Conv2d, SparseConv2d)):
            raise TypeError(f"an nn.Conv2d in the file and {type(old).__name__} in the model")
        geometry = {name: spec[name] for name in ("stride", "padding", "dilation", "padding_mode")}
        return SparseConv2d(
            old.in_channels, old.out_channels, spec["kernel_size"], spec["nonzeros"], **geometry, bias=spec["bias"],
            dtype=dtype, device="meta", activation=spec["activation"], scheme=scheme,
        )  # fmt: skip
    if not isinstance(old, (nn.Linear, QuantLinear, SparseLinear)):
        raise TypeError(f"an nn.Linear in the file and {type(old).__name__} in the model")
    if spec["kind"] == "SparseLinear":
        return SparseLinear(
            old.in_features, old.out_features, spec["nonzeros"], spec["bias"], dtype, "meta", spec["activation"],
            scheme,
        )  # fmt: skip
    activation = spec.get("activation", "none")
    # What computed the activation before fuse_ is not there any more: the layer has to keep it.
    fused = isinstance(old, QuantLinear) and old.activation_is_fused
    if fused and activation != "none":
        raise TypeError(
            f"one with activation {activation!r} in the file and fused with {old.activation!r} in the model"
        )
    if fused:
        activation = old.activation
    wanted = scheme, spec["bias"], activation
    if isinstance(old, QuantLinear) and (old.scheme, old.bias is not None, old.activation) == wanted:
        return old
    layer = QuantLinear(old.in_features, old.out_features, spec["bias"], scheme, "meta", activation)
    layer.activation_is_fused = fused
    return layer


def _check_names(path: Any, expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"load: {path} does not fit the model; missing in the file: {missing[:5] or 'nothing'}, "
            f"not in the model: {unexpected[:5] or 'nothing'} ({len(missing)} and {len(unexpected)} in all)"
        )
    for name, tensor in expected.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"load: {name} has shape {shapes[name]} in {path}; the model wants {tuple(tensor.shape)}")


def load(path: str | os.PathLike[str], model: nn.Module | None = None, device: torch.device | str | None = None) -> Any:
    """Reads a model file: a state dict, or `model` with the file's layers and weights put into it.

    model: has the layers of the model that was saved, before or after it was quantized; built on the meta device it
    costs no memory. Its nn.Linear, nn.Conv2d, nn.Embedding and recurrent layers become what they are in the file. Every
    tensor is checked; nothing is put into `model` before all of them have been read. The disk is read ahead while a
    tensor is decoded, on all threads; the logger lepton_kernels tells the speed (INFO). A model that fuse_ has changed
    stays so; layers of one input that the file replaces by others part. device: where tensors go; None is the CPU.
    Raises CorruptDataError that names a damaged tensor, ValueError when names or shapes do not fit, OSError.
    """
    file = model_file.ModelFile.open(path)
    target = None if device is None else torch.device(device)
    tied: dict[str, str] = json.loads(file.metadata.get(_TIED_KEY, "{}"))
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    shapes.update({name: shapes[source] for name, source in tied.items()})

    skeleton: dict[str, nn.Module] = {}
    expected: dict[str, Tensor] = {}
    if model is not None:
        layers = json.loads(file.metadata.get(_LAYERS_KEY, "{}"))
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, spec in layers.items():
            if name not in modules:
                raise ValueError(f"load: {path} has a quantized layer {name!r}; the model has no module of that name")
            try:
                skeleton[name] = _empty_layer(spec, modules[name])
            except TypeError as error:
                raise ValueError(f"load: layer {name!r} is {error}") from error
        inside = tuple(f"{name}." for name in skeleton)
        expected = {n: t for n, t in model.state_dict().items() if not inside or not n.startswith(inside)}
        for name, layer in skeleton.items():
            expected.update({f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})
        _check_names(path, expected, shapes)

    start = time.perf_counter()
    tensors = zip(progress(list(file.entries), "reading"), file.read_all(), strict=False)  # the first one ends it
    state = {name: _tensor(file.entries[name], data, target) for _, (name, data) in tensors}
    seconds = time.perf_counter() - start
    size = sum(entry.size for entry in file.entries.values())
    _LOG.info(
        "load: %s: %.1f MB, stored as %.1f MB, in %.3f s: %.2f GB/s", path, size / 1e6,
        sum(entry.stored_size for entry in file.entries.values()) / 1e6, seconds, size / 1e9 / seconds,
    )  # fmt: skip
    state.update({name: state[source] for name, source in tied.items()})
    if model is None:
        return state

    # The same module may stand at several places, and the same tensor under several names: both stay so.
    same: dict[int, nn.Module] = {}
    for name, layer in skeleton.items():
        parent, _, attribute = name.rpartition(".")
        old = modules[name]
        if isinstance(old, QuantLinear) and old is not layer and old._shared is not None:
            old._shared.dissolve()
        replacement = same.setdefault(id(old), layer.train(old.training))
        setattr(model.get_submodule(parent), attribute, replacement)
    parameters: dict[int, nn.Parameter] = {}
    for name, tensor in state.items():
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        before = owner._parameters.get(attribute)
        if before is not None:
            made = parameters.get(id(tensor))
            if made is None:
                trains = before.requires_grad and tensor.is_floating_point()
                made = parameters[id(tensor)] = nn.Parameter(tensor, trains)
            owner._parameters[attribute] = made
        else:
            owner._buffers[attribute] = tensor
    disable_fused_path(model)
    return model
