"""Training of compressed models: train_form_ gives the layers float32 masters, compressed_form_ compresses them again.

What was pruned stays zero, what was quantized trains through its rounding.
"""

from lepton_ai.training.forms import compressed_form_, train_form_
from lepton_ai.training.layers import TrainEmbedding, TrainLinear
from lepton_ai.training.masked import MaskedConv2d, MaskedEmbedding, MaskedLinear, MaskedProjection
from lepton_ai.training.recurrent import TrainGRU, TrainGRUCell, TrainLSTM, TrainLSTMCell, TrainRNNCell

__all__ = [
    "MaskedConv2d",
    "MaskedEmbedding",
    "MaskedLinear",
    "MaskedProjection",
    "TrainEmbedding",
    "TrainGRU",
    "TrainGRUCell",
    "TrainLSTM",
    "TrainLSTMCell",
    "TrainLinear",
    "TrainRNNCell",
    "compressed_form_",
    "train_form_",
]
