"""The numbers that stand for dtypes and activation functions in the native module."""

import torch

from lepton_kernels.reference import ACTIVATIONS

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/dtype.h
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # csrc/cpu/activation.h
