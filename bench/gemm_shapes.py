"""The products of the benchmarks: (n, k) of a weight."""

LLM, UP, DOWN = (4096, 4096), (14336, 4096), (4096, 14336)  # attention and feed-forward of an 8 B model
MINILM = [(384, 384), (1536, 384), (384, 1536)]  # its attention and feed-forward
BASE = [(768, 768), (3072, 768)]  # of an encoder with 768 features
