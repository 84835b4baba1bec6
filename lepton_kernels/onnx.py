"""ONNX: a quantized model in standard operators (opset 21), for onnxruntime and whatever else reads ONNX.

Weights stay int8 or int4 in the file. Activations of w8a8 are quantized as here, a row at a time, and multiplied as
integers (MatMulInteger); w4a8 rounds them to the same grid and multiplies floats; w8a16 and w4a16 multiply floats.

Sparse layers keep their nonzeros and bitmask in the file alone: neither ONNX nor onnxruntime multiplies sparse weights,
so the graph expands them, which onnxruntime does once, when it loads. From then on they take the memory and the time of
dense layers; what was pruned is exactly zero there, too.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any


def export(
    model: Any, args: tuple[Any, ...], path: str | os.PathLike[str], *, exact: bool = True, **options: Any
) -> None:
    """Writes model(*args) as ONNX to `path`; `options` go to torch.onnx.export (input_names, dynamic_shapes, ...).

    exact: w8a8 multiplies unsigned weights (less 128), which onnxruntime does exactly on every processor. False: signed
    ones, which it does faster where the processor has VNNI; where it has not, sums of two products saturate at 16 bits,
    and outputs were off by a fifth in our test.
    The exporter's own optimizer stays off: it would store the weights as floats. onnxruntime folds them when it loads.
    Raises ImportError without onnxscript, ValueError for a model with quantized recurrent layers.
    """
    import torch

    from lepton_kernels.nn.quant_recurrent import REPLACEMENTS

    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    for name, module in modules:
        if isinstance(module, tuple(REPLACEMENTS.values())):
            raise ValueError(
                f"onnx.export: {name or 'the model'} is a {type(module).__name__}; allowed: no recurrent layer"
            )
    program = torch.onnx.export(
        model, args, dynamo=True, opset_version=21, optimize=False, verbose=False,
        custom_translation_table=translations(exact), **options,
    )  # fmt: skip
    if program is None:
        raise RuntimeError("onnx.export: torch.onnx.export returned no program")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of this machine, 800 bytes a node
    program.save(path)


def translations(exact: bool = True) -> dict[Any, Callable[..., Any]]:
    """Our operators for torch.onnx.export's custom_translation_table; `exact` as in export.

    Raises ImportError without onnxscript.
    """
    try:
        op: Any = importlib.import_module("onnxscript").opset21
    except ImportError as error:
        raise ImportError("lk.onnx.translations() needs onnxscript: pip install onnxscript") from error
    from lepton_kernels import _ops, _ops_sparse

    def constant(value: list[int], *, int32: bool = False) -> Any:
        return op.Cast(op.Constant(value_ints=value), to=6) if int32 else op.Constant(value_ints=value)

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    def quantize_rows(x: Any) -> tuple[Any, Any, Any]:
        """q, zero (both float, of integer value) and scale [..., 1], as in reference.quantize_rows for finite x."""
        low = op.Min(op.ReduceMin(x, constant([-1])), number(0.0))
        high = op.Max(op.ReduceMax(x, constant([-1])), number(0.0))
        scale = op.Sub(op.Mul(high, number(1 / 255)), op.Mul(low, number(1 / 255)))
        tiny = op.Less(scale, number(2.0**-126))
        inverse = op.Where(tiny, number(0.0), op.Reciprocal(op.Where(tiny, number(1.0), scale)))
        zero = op.Clip(op.Round(op.Mul(op.Neg(low), inverse)), number(0.0), number(255.0))
        q = op.Clip(op.Add(op.Round(op.Mul(x, inverse)), zero), number(0.0), number(255.0))
        return q, zero, op.Where(tiny, number(0.0), scale)

    activations: dict[str, Callable[[Any], Any]] = {
        "none": lambda y: y,
        "relu": op.Relu,
        "silu": lambda y: op.Mul(y, op.Sigmoid(y)),
        "gelu": op.Gelu,
        "gelu_tanh": lambda y: op.Gelu(y, approximate="tanh"),
    }

    def finish(y: Any, bias: Any, activation: str, x: Any) -> Any:
        return op.CastLike(activations[activation](y if bias is None else op.Add(y, bias)), x)

    def gemm_int8(
        x: Any, weight_packed: Any, weight_scale: Any, bias: Any, quantize_activations: bool, activation: str = "none"
    ) -> Any:
        rows = op.Cast(x, to=1)
        scale = op.Squeeze(weight_scale, constant([1]))
        if not quantize_activations:
            weight = op.DequantizeLinear(weight_packed, scale, axis=0)
            return finish(op.MatMul(rows, op.Transpose(weight, perm=[1, 0])), bias, activation, x)
        q, zero, row_scale = quantize_rows(rows)
        weight, weight_zero = weight_packed, None
        if exact:  # the file keeps int8; onnxruntime folds this when it loads
            weight = op.Cast(op.Add(op.Cast(weight_packed, to=6), constant([128], int32=True)), to=2)
            weight_zero = op.Cast(op.Constant(value_int=128), to=2)
        sums = op.MatMulInteger(op.Cast(q, to=2), op.Transpose(weight, perm=[1, 0]), None, weight_zero)
        column_sum = op.ReduceSum(op.Cast(weight_packed, to=6), constant([1]), keepdims=0)
        sums = op.Sub(sums, op.Mul(op.Cast(zero, to=6), column_sum))
        return finish(op.Mul(op.Cast(sums, to=1), op.Mul(row_scale, scale)), bias, activation, x)

    def unpacked(packed: Any, bits: int, onnx_type: int, width: int) -> Any:
        """The values of `bits` bits in each of packed, `width` bits wide, the lowest first: [..., size * values]."""
        shifts = op.Cast(constant(list(range(0, width, bits))), to=onnx_type)
        values = op.BitShift(op.Unsqueeze(op.Cast(packed, to=onnx_type), constant([-1])), shifts, direction="RIGHT")
        values = op.BitwiseAnd(values, op.Cast(constant([2**bits - 1]), to=onnx_type))
        *outer, last = packed.shape
        return op.Reshape(values, constant([*outer, last * (width // bits)]))

    def first_columns(matrix: Any, k: int) -> Any:
        return op.Slice(matrix, constant([0]), constant([k]), constant([1]))

    def per_weight(per_group: Any, k: int, group_size: int) -> Any:
        """[n, groups] to float [n, k]."""
        size = k if group_size == -1 else group_size
        repeated = op.Expand(op.Unsqueeze(op.Cast(per_group, to=1), constant([2])), constant([1, 1, size]))
        return first_columns(op.Reshape(repeated, constant([per_group.shape[0], -1])), k)

    def nibbles(packed: Any, onnx_type: int, width: int) -> Any:
        """float, -8 to 7."""
        return op.Sub(op.Cast(op.Cast(unpacked(packed, 4, onnx_type, width), to=7), to=1), number(8.0))

    def float_product(x: Any, weight: Any, bias: Any, activation: str, quantize_activations: bool = False) -> Any:
        rows = op.Cast(x, to=1)
        if quantize_activations:
            q, zero, row_scale = quantize_rows(rows)
            rows = op.Mul(op.Sub(q, zero), row_scale)
        return finish(op.MatMul(rows, op.Transpose(weight, perm=[1, 0])), bias, activation, x)

    def gemm_int4(
        x: Any, weight_packed: Any, weight_scale: Any, weight_zero_point: Any, bias: Any, group_size: int,
        quantize_activations: bool, activation: str = "none",
    ) -> Any:  # fmt: skip
        k = x.shape[-1]
        values = first_columns(nibbles(weight_packed, 12, 32), k)
        if weight_zero_point is not None:
            values = op.Sub(values, per_weight(weight_zero_point, k, group_size))
        weight = op.Mul(values, per_weight(weight_scale, k, group_size))
        return float_product(x, weight, bias, activation, quantize_activations)

    def sparse_linear(
        x: Any, weight_compressed: Any, weight_bitmask: Any, weight_scale: Any, bias: Any, activation: str = "none",
        weight_zero_point: Any = None, group_size: int = -1,
    ) -> Any:  # fmt: skip
        k = x.shape[-1]
        ones = op.Cast(first_columns(unpacked(weight_bitmask, 1, 2, 8), k), to=6)
        count = op.CumSum(op.Reshape(ones, constant([-1])), constant([0]))
        places = op.Mul(op.Reshape(count, constant([-1, k])), ones)  # of a weight among those stored, from 1 on; else 0

        def expanded(values: Any, onnx_type: int) -> Any:
            """[n, k]: values [nonzeros] in their order where the bitmask has ones, else 0."""
            return op.Gather(op.Concat(op.Cast(constant([0]), to=onnx_type), values, axis=0), places)

        if weight_scale is None:
            return float_product(x, expanded(op.Cast(weight_compressed, to=1), 1), bias, activation)
        if weight_compressed.dtype.name == "INT8":
            return gemm_int8(x, expanded(weight_compressed, 3), weight_scale, bias, True, activation)
        values = expanded(nibbles(weight_compressed, 2, 8), 1)
        if weight_zero_point is not None:
            values = op.Sub(values, op.Mul(per_weight(weight_zero_point, k, group_size), op.Cast(ones, to=1)))
        return float_product(x, op.Mul(values, per_weight(weight_scale, k, group_size)), bias, activation)

    return {_ops.gemm_int8: gemm_int8, _ops.gemm_int4: gemm_int4, _ops_sparse.sparse_linear: sparse_linear}
