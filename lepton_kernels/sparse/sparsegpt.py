"""SparseGPT (Frantar and Alistarh, 2023, arXiv 2301.00774): prunes column by column and lets the columns that follow
make up for what is lost, so that the layer's output changes least.

For each row w and inputs X, removing w[j] costs w[j]^2 / U[j, j]^2, with U the upper Cholesky factor of (X^T X)^-1; the
best change of the later weights is -(w[j] / U[j, j]) U[j, j:].

Other than in the paper, how many weights go from each block of columns is what one threshold for the layer would
take, not the same share of every block; and columns are scaled to inputs of mean square 1 first: the damping is then
the same share of every column, where the paper's, a share of the mean, drowns inputs that are small.
"""

import torch
from torch import Tensor

from lepton_kernels.pattern import Pattern

_BLOCK = 128  # columns whose mask is chosen at once, as in the paper
_DAMPING = 0.01  # added to the diagonal, which is 1; ten times as much whenever that is not enough
_MOST_DAMPING = 1e3


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of `gram`, whose diagonal is 1, damped until it is positive definite."""
    damping, eye = _DAMPING, torch.eye(len(gram), device=gram.device)
    while damping <= _MOST_DAMPING:
        factor, failed = torch.linalg.cholesky_ex(gram + damping * eye)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        damping *= 10
    raise ValueError("sparsegpt: the inputs of a layer give no positive definite matrix; allowed: finite inputs")


def prune_group(weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """The pruned and adjusted copy of weight [rows, columns] for inputs with X^T X = gram [columns, columns].

    float32. A block of columns is a multiple of what the pattern takes together.
    """
    size = gram.diagonal().sqrt()
    silent = size == 0  # inputs that are always zero: their weights do nothing
    inverse = torch.where(silent, 0.0, 1 / size)
    weight, gram = weight * size, gram * inverse * inverse[:, None]
    gram.diagonal()[silent] = 1
    upper = _inverse_factor(gram)
    step = pattern.second * max(1, _BLOCK // pattern.second)
    columns = weight.shape[1]
    stays = pattern.keep((weight / upper.diagonal()).square(), sparsity)
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        share = 1 - float(stays[:, begin:end].float().mean())
        part, factor = weight[:, begin:end], upper[begin:end, begin:end]
        mask, change = torch.empty_like(part, dtype=torch.bool), torch.zeros_like(part)
        together = pattern.second if pattern.kind == "n:m" else step  # N:M: each group after those before it
        for j in range(end - begin):
            if j % together == 0:
                span = slice(j, j + together)
                mask[:, span] = pattern.keep((part[:, span] / factor.diagonal()[span]).square(), share)
            kept = part[:, j] * mask[:, j]
            change[:, j] = (part[:, j] - kept) / factor[j, j]
            part[:, j:] -= change[:, j, None] * factor[j, j:]
            part[:, j] = kept
        weight[:, end:] -= change @ upper[begin:end, end:]
    return weight * inverse
