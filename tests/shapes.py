"""Shapes (m, n, k) shared by tests and benchmarks, each with the reason why it is there."""

GEMM = [
    (1, 16, 16),  # one vector, one panel
    (1, 1, 1),  # the smallest
    (1, 130, 300),  # a vector, four panels side by side and a rest, k past a block of 256
    (0, 16, 32),  # an empty batch
    (2, 17, 3),  # one past a panel; k below a quad
    (5, 33, 31),  # odd everything
    (6, 64, 64),  # a full block of rows at every level
    (7, 15, 65),  # one past a block of rows; below a panel; one past a vector of k
    (13, 129, 257),  # one past a block of k
    (130, 48, 520),  # many row blocks, two blocks of k and a rest
    (100, 33, 10000),  # rows cut where a tile register has 15 of them
    (300, 100, 768),  # several tiles of rows
    (2200, 330, 130),  # Y overflows a second-level cache, the weights do not; rows enough to share out
]
