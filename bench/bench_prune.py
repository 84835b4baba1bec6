"""Pruning by magnitude beside torch.nn.utils.prune: all Linear weights of MiniLM, each to 80 % zeros."""

import copy

import torch
from lepton_ai import LeptonModel
from minilm import FOLDER
from torch import nn
from torch.nn.utils import prune

import lepton_kernels as lk


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def torch_prune(model: nn.Module) -> None:
    for layer in linears(model):
        prune.l1_unstructured(layer, "weight", amount=0.8)
        prune.remove(layer, "weight")


def test_prune(race) -> None:
    model = LeptonModel(FOLDER).model
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    lk.prune_(ours, 0.8)
    torch_prune(theirs)
    for a, b in zip(linears(ours), linears(theirs), strict=True):
        assert torch.equal(a.weight, b.weight)
    race("prune",
         {"lepton prune_": lambda: lk.prune_(copy.deepcopy(model), 0.8),
          "torch.nn.utils.prune": lambda: torch_prune(copy.deepcopy(model))},
         table="prune", row="MiniLM, 80 %")  # fmt: skip
