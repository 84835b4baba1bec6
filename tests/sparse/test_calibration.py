"""What calibration collects is X^T X of each layer's own input, for Linear and Conv2d of every kind."""

import pytest
import torch
from torch import nn

from lepton_kernels.sparse.calibration import as_matrix, collect, input_rows

CONVS = [
    {"kernel_size": 3}, {"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": (1, 3), "padding": "same"},
    {"kernel_size": 2, "dilation": 2, "groups": 2}, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]  # fmt: skip


@pytest.mark.parametrize("options", CONVS)
def test_a_convolution_is_a_product_of_its_input_rows(options):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, **options), torch.randn(3, 4, 9, 8)
    rows, weight = input_rows(layer, x), as_matrix(layer.weight)
    y = torch.cat([part @ w.T for part, w in zip(rows, weight.chunk(layer.groups), strict=True)], 1) + layer.bias
    want = layer(x)
    torch.testing.assert_close(y.view(3, *want.shape[2:], 6).permute(0, 3, 1, 2), want)


def test_statistics_add_up_over_all_inputs_in_every_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs = [torch.randn(2, 5), torch.randn(7, 5), torch.randn(3, 4, 5)]
    calibration = [inputs[0], (inputs[1],), {"input": inputs[2]}]
    layers = {"0": model[0], "2": model[2]}
    found = collect(model, layers, calibration, gram=True)
    x = torch.cat([part.reshape(-1, 5) for part in inputs])
    hidden = torch.relu(model[0](x)).detach()
    for name, rows in (("0", x), ("2", hidden)):
        torch.testing.assert_close(found[name].gram[0], rows.T @ rows)
        torch.testing.assert_close(found[name].squares[0], rows.square().sum(0))
        assert found[name].samples == len(rows) == 21
    before = as_matrix(model[2].weight)
    after = before * (torch.rand_like(before) > 0.5)
    want = float((hidden @ (after - before).T).norm() / (hidden @ before.T).norm())
    assert found["2"].output_error(before, after) == pytest.approx(want, rel=1e-4)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model.train()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, {"0": model[0]}, [torch.randn(8, 4)], gram=False)
    assert [module.training for module in model] == [True, False, True]
    assert not model[0]._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_no_inputs():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="calibration is empty"):
        collect(model, {"0": model[0]}, [], gram=False)
    assert not model[0]._forward_pre_hooks
