"""Pruning: which weights become zero (prune_, GradualPruner), and what multiplies them fastest then (sparsify_)."""

from lepton_kernels.pattern import Pattern
from lepton_kernels.sparse.masks import GradualPruner, finalize_
from lepton_kernels.sparse.prune import PrunedLayer, PruneReport, prune_, sensitivity
from lepton_kernels.sparse.sparsify import SparsifyReport, SparsifyRow, sparsify_

__all__ = [
    "GradualPruner",
    "Pattern",
    "PruneReport",
    "PrunedLayer",
    "SparsifyReport",
    "SparsifyRow",
    "finalize_",
    "prune_",
    "sensitivity",
    "sparsify_",
]
