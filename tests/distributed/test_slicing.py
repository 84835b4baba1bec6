"""Slices of layers compute their share, and come together as the layer they were."""

import itertools

import pytest
import torch
from layers import make_layers, make_linear, make_sparse, same
from lepton_ai.distributed.slicing import can_slice, columns_of, join_columns, join_rows, rows_of, shares
from torch import nn

import lepton_kernels as lk
from lepton_kernels.nn import QuantLinear, SparseLinear


def test_shares_cover_evenly():
    assert shares(7, 3) == [(0, 2), (2, 4), (4, 7)]
    for size, parts in [(1, 1), (10, 4), (1000, 7)]:
        ranges = shares(size, parts)
        lengths = [end - begin for begin, end in ranges]
        assert ranges[0][0] == 0
        assert [end for _, end in ranges[:-1]] == [begin for begin, _ in ranges[1:]]
        assert sum(lengths) == size
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("n", "k"), [(3, 5), (33, 70), (18, 256)])
def test_row_slices_are_the_layer_s_outputs(n: int, k: int, rng: torch.Generator):
    x = torch.randn(4, k, generator=rng)
    for layer in make_layers(n, k, rng):
        parts = [rows_of(layer, begin, end) for begin, end in shares(n, 3)]
        assert all(type(part) is type(layer) for part in parts)
        y = torch.cat([part(x) for part in parts], -1)
        if isinstance(layer, QuantLinear) or getattr(layer, "weight_compressed", x).dtype is torch.int8:
            assert torch.equal(y, layer(x)), layer
        else:
            torch.testing.assert_close(y, layer(x))
        assert same(join_rows(layer, [part.state_dict() for part in parts]), layer.state_dict())
        whole = rows_of(layer, 0, n)
        assert same(whole.state_dict(), layer.state_dict())
        memory = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
        assert not memory & {t.data_ptr() for t in (*whole.parameters(), *whole.buffers())}


@pytest.mark.parametrize(("n", "k"), [(3, 160), (33, 224), (5, 250)])
def test_column_slices_add_up_to_the_weight(n: int, k: int, rng: torch.Generator):
    for layer in make_layers(n, k, rng):
        if isinstance(layer, SparseLinear) and layer.weight_compressed.dtype is torch.uint8:
            continue  # refused, below
        size = layer.scheme.group_size if isinstance(layer, QuantLinear) else 1
        cuts = [0, 128, k] if size == 128 else [0, 64, 96, k]
        parts = [columns_of(layer, begin, end) for begin, end in itertools.pairwise(cuts)]
        assert all(part.bias is None for part in parts)
        assert torch.equal(torch.cat([part.weight for part in parts], 1), layer.weight)
        state = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
        assert same(join_columns(layer, [part.state_dict() for part in parts]), state)
        assert getattr(parts[0], "activation", "none") == "none"


def test_slices_refuse_what_they_can_not_cut(rng: torch.Generator):
    layer = QuantLinear.from_linear(make_linear(8, 64, rng), "w4a16", activation="none")
    grouped = QuantLinear.from_linear(make_linear(8, 64, rng), lk.QuantScheme.of("w4a16", 32))
    for begin, end in [(-1, 2), (2, 2), (0, 9)]:
        with pytest.raises(ValueError, match="rows_of: the range is"):
            rows_of(layer, begin, end)
    for whole_group in (layer, grouped):
        with pytest.raises(ValueError, match="allowed: whole groups"):
            columns_of(whole_group, 0, 16)
    with pytest.raises(ValueError, match="SparseLinear of 4-bit weights; allowed: float or int8 ones"):
        columns_of(make_sparse(8, 64, rng, "w4a16"), 0, 16)
    for function, arguments in [(rows_of, (0, 1)), (columns_of, (0, 1)), (join_rows, ([],)), (join_columns, ([],))]:
        with pytest.raises(ValueError, match="module is Conv2d; allowed: Linear, QuantLinear, SparseLinear"):
            function(nn.Conv2d(1, 1, 1), *arguments)
    assert not can_slice(nn.MultiheadAttention(4, 2).out_proj)  # a subclass, whose weight is read directly
