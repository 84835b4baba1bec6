"""The model that is served in these tests, and requests to it."""

import json
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    """Slow and deadly where it is asked to be: a first value of 1000 ends the process, one of 2000 takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x):
        if (x[:, 0] == 1000).any():
            os._exit(3)
        if (x[:, 0] == 2000).any():
            time.sleep(1)
        return self.body(x)


def make() -> nn.Module:
    """The architecture, for replicas."""
    torch.manual_seed(0)
    return Net().eval()


def row(value: float = 1.0) -> list[float]:
    return [value, *[0.5] * 23]


def body(*values: float) -> bytes:
    return json.dumps({"inputs": [row(value) for value in values]}).encode()
