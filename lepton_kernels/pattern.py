"""Pattern: which weights become zero together. A weight is seen as a matrix [rows, columns]; a Conv2d's row is one
output channel, its columns are kernel row, kernel column and input channel, as SparseConv2d multiplies them: neighbours
are the channels at one place of the kernel.

    unstructured   any weight
    N:M            N of M neighbours in a row stay ("2:4"); a last group of fewer keeps its N largest
    RxC            blocks of R rows and C columns ("16x1", "1x4", "32x32"); blocks at the edges may be smaller
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK_SHARE = 0.9
_DETECTED = ("32x32", "16x4", "16x1", "1x4", "1:4", "2:4", "unstructured")
_EXAMPLES = "'unstructured', N:M as '2:4' with N < M, blocks as '16x1', '1x4', '16x4', '32x32'"


@dataclass(frozen=True)
class Pattern:
    """kind: "unstructured", "n:m" or "block"; first, second: N and M, or rows and columns of a block."""

    kind: str
    first: int = 1
    second: int = 1

    @classmethod
    def of(cls, text: "str | Pattern", function: str = "Pattern.of") -> "Pattern":
        """The pattern of its name. Raises ValueError for any other text."""
        if isinstance(text, Pattern):
            return text
        if text == "unstructured":
            return cls("unstructured")
        found = re.fullmatch(r"([1-9]\d{0,3})([:x])([1-9]\d{0,3})", text) if isinstance(text, str) else None
        if found is None or (found[2] == ":" and int(found[1]) >= int(found[3])):
            raise ValueError(f"{function}: pattern is {text!r}; allowed: {_EXAMPLES}")
        return cls("n:m" if found[2] == ":" else "block", int(found[1]), int(found[3]))

    def __str__(self) -> str:
        if self.kind == "unstructured":
            return self.kind
        return f"{self.first}{':' if self.kind == 'n:m' else 'x'}{self.second}"

    @property
    def sparsity(self) -> float | None:
        """The share of zeros where the pattern fixes it."""
        return 1 - self.first / self.second if self.kind == "n:m" else None

    def fits(self, mask: Tensor) -> bool:
        """Whether weights that stay where mask [rows, columns] is True have this pattern: at most N of M; of blocks,
        that nine tenths of the zeros and more lie in blocks of zeros."""
        if self.kind == "unstructured":
            return True
        if self.kind == "n:m":
            groups = functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % self.second))
            return bool((groups.view(len(mask), -1, self.second).sum(2) <= self.first).all())
        empty = ~(_blocks(mask.to(torch.uint8), self.first, self.second) > 0).any(3).any(1)
        zeros = mask.numel() - int(mask.count_nonzero())
        return int((self._sizes(mask) * empty).sum()) >= _BLOCK_SHARE * zeros

    @classmethod
    def detect(cls, mask: Tensor) -> "Pattern":
        """The pattern that mask [rows, columns] fits: the largest of the usual blocks, 1:4, 2:4, or unstructured."""
        if bool(mask.all()):
            return cls("unstructured")
        return next(
            p for p in map(cls.of, ("32x32", "16x4", "16x1", "1x4", "1:4", "2:4", "unstructured")) if p.fits(mask)
        )

    def units(self, energy: Tensor) -> Tensor:
        """What goes or stays as one, from what is lost with each weight [rows, columns]: a block's mean; else each."""
        if self.kind != "block":
            return energy
        total = _blocks(energy, self.first, self.second).sum((1, 3))
        return total / self._sizes(energy)

    def _sizes(self, matrix: Tensor) -> Tensor:
        """Weights of each block [block rows, block columns]."""
        rows, columns = (
            torch.full((-(-size // step),), step, dtype=torch.float32, device=matrix.device)
            for size, step in zip(matrix.shape, (self.first, self.second), strict=True)
        )
        for count, size, step in ((rows, matrix.shape[0], self.first), (columns, matrix.shape[1], self.second)):
            count[-1] = size - (len(count) - 1) * step
        return rows[:, None] * columns[None]

    def keep(self, energy: Tensor, sparsity: float, by_row: bool = False) -> Tensor:
        """Mask [rows, columns], True where a weight stays: those units go that lose the least, as `sparsity` asks.

        energy: what is lost with each weight, >= 0. by_row: the same share of every row (unstructured alone). N:M has
        its own share and ignores `sparsity`.
        """
        rows, columns = energy.shape
        if self.kind == "n:m":
            groups = functional.pad(energy, (0, -columns % self.second), value=-1.0).view(rows, -1, self.second)
            mask = torch.zeros_like(groups, dtype=torch.bool)
            mask.scatter_(2, groups.topk(self.first, 2).indices, True)
            return mask.view(rows, -1)[:, :columns].contiguous()
        if by_row and self.kind == "unstructured":
            mask = torch.ones_like(energy, dtype=torch.bool)
            least = energy.topk(round(sparsity * columns), 1, largest=False).indices
            return mask.scatter_(1, least, False)
        units = self.units(energy)
        mask = torch.ones(units.numel(), dtype=torch.bool, device=energy.device)
        mask[units.flatten().topk(round(sparsity * units.numel()), largest=False).indices] = False
        return self.spread(mask.view_as(units), energy.shape)

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        """A mask of units as a mask of weights."""
        if self.kind != "block":
            return units
        whole = units.repeat_interleave(self.first, 0).repeat_interleave(self.second, 1)
        return whole[: shape[0], : shape[1]].contiguous()


def _blocks(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """[block rows, rows, block columns, columns], padded with zeros."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
