"""QuantScheme: how a layer's weights and activations are stored, and the strings that stand for it."""

import math
import re
from dataclasses import dataclass, replace

GROUP_MULTIPLE = 16  # a group along k is a whole number of the kernels' 16-wide blocks


@dataclass(frozen=True)
class QuantScheme:
    """What "w8a8", "w4a16" and the like stand for.

    weight_bits: 8 (one scale an output channel) or 4 (one scale a group along in_features). 5, 6 and 7 are 8 bits on a
    coarser grid, -(2^(bits-1) - 1) to 2^(bits-1) - 1: int8 in memory and for the kernels, which are faster with up to 6
    bits at level avx2, and fewer bits a weight in an entropy-coded file.
    group_size: in_features that share a scale at 4 bits, a multiple of 16; -1 is the whole row. 5 to 8 bits: -1.
    symmetric: False gives every 4-bit group a zero point of its own. Weights of 5 to 8 bits are always symmetric.
    step: no channel's scale is below it, in the weight's unit; 0: each is just large enough for its largest weight. In
    an entropy-coded file rows that share a step take fewer bytes at the same error than rows that have each their own
    (Gish and Pierce 1968: for a given error a uniform quantizer's output has nearly the least entropy). 4 bits: 0.
    activation: "int8" (quantized on the fly, a scale and zero point for every row) or "float" (left as they are).
    """

    weight_bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    activation: str = "int8"
    step: float = 0.0

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 5, 6, 7, 8):
            raise ValueError(f"QuantScheme: weight_bits is {self.weight_bits!r}; allowed: 4, 5, 6, 7, 8")
        if self.activation not in ("int8", "float"):
            raise ValueError(f"QuantScheme: activation is {self.activation!r}; allowed: 'int8', 'float'")
        if self.group_size != -1 and (self.group_size < 1 or self.group_size % GROUP_MULTIPLE):
            raise ValueError(
                f"QuantScheme: group_size is {self.group_size}; "
                f"allowed: a multiple of {GROUP_MULTIPLE}, or -1 (whole row)"
            )
        if not 0 <= self.step < math.inf:
            raise ValueError(f"QuantScheme: step is {self.step}; allowed: a finite number, 0 or more")
        if self.stored_bits == 4 and self.step:
            raise ValueError(f"QuantScheme: step is {self.step} with 4 bits; allowed: 0 (a group has its own scale)")
        if self.stored_bits == 8 and (self.group_size != -1 or not self.symmetric):
            raise ValueError(
                f"QuantScheme: {self.weight_bits}-bit weights have one symmetric scale a channel; "
                "allowed: group_size=-1, symmetric=True"
            )

    @property
    def name(self) -> str:
        """The field's short name: "w8a8", "w8a16", "w4a8", "w4a16", "w6a8" and so on."""
        return f"w{self.weight_bits}a{8 if self.activation == 'int8' else 16}"

    @property
    def kernels(self) -> str:
        """The name of the scheme whose kernels serve it: "w8a8" for "w6a8"."""
        return f"w{self.stored_bits}{self.name[2:]}"

    @property
    def stored_bits(self) -> int:
        """8 where a weight is an int8 (5 to 8 bits), 4 where eight share an int32."""
        return 4 if self.weight_bits == 4 else 8

    @property
    def limit(self) -> int:
        """The largest integer that a weight can be."""
        return 2 ** (self.weight_bits - 1) - 1

    def groups(self, in_features: int) -> int:
        """How many scales a row of in_features weights has."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    @classmethod
    def of(cls, scheme: "str | QuantScheme", group_size: int | None = None) -> "QuantScheme":
        """A scheme from a string; 4 bits default to asymmetric groups of 128."""
        if isinstance(scheme, QuantScheme):
            return scheme if group_size is None else replace(scheme, group_size=group_size)
        match = re.fullmatch(r"w([4-8])a(8|16)", scheme) if isinstance(scheme, str) else None
        if match is None:
            raise ValueError(
                f"scheme is {scheme!r}; allowed: 'w8a8', 'w8a16', 'w4a8', 'w4a16', "
                "w5, w6 or w7 for w8, or a QuantScheme"
            )
        activation = "int8" if match[2] == "8" else "float"
        if match[1] != "4":
            if group_size not in (None, -1):
                raise ValueError(f"group_size is {group_size} with {scheme!r}; allowed: None (one scale a channel)")
            return cls(int(match[1]), -1, True, activation)
        return cls(4, 128 if group_size is None else group_size, False, activation)
