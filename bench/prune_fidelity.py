"""What one-shot pruning leaves of MiniLM, by method and pattern: python bench/prune_fidelity.py; prints a table.

Cosines between the sentence embeddings of the pruned model and those of the dense one, over the demo's sentences.
Calibration: the sentences that come with lepton_ai (the demo's sentences hold them, too).
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from lepton_ai import LeptonModel
from lepton_ai.calibration import texts
from lepton_ai.compression import Pruning
from lepton_ai.fidelity import fidelity, output_vectors
from minilm import FOLDER, batches, sentences
from tables import markdown

CASES = [
    ("magnitude", "unstructured", 0.5, False), ("wanda", "unstructured", 0.5, False),
    ("sparsegpt", "unstructured", 0.5, False), ("wanda", "unstructured", 0.5, True),
    ("sparsegpt", "unstructured", 0.5, True), ("wanda", "2:4", 0.5, False), ("sparsegpt", "2:4", 0.5, False),
    ("sparsegpt", "2:4", 0.5, True), ("sparsegpt", "1x4", 0.5, False), ("sparsegpt", "1x4", 0.5, True),
    ("sparsegpt", "16x4", 0.5, False), ("sparsegpt", "unstructured", 0.3, False),
]  # fmt: skip


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer, probe = LeptonModel(FOLDER), transformers.AutoTokenizer.from_pretrained(FOLDER), sentences()
    inputs, calibration = batches(tokenizer, probe), texts(tokenizer)
    reference = output_vectors(model.model, inputs)
    rows = []
    for method, pattern, sparsity, sequential in CASES:
        pruned = model.compress(Pruning(sparsity, pattern, method, calibration, sequential=sequential))
        close = fidelity(reference, output_vectors(pruned.model, inputs))
        errors = [row.output_error for row in pruned.report().pruning.rows if row.output_error is not None]
        rows.append([
            method, pattern, f"{sparsity:.0%}", "yes" if sequential else "", f"{close.cosine_mean:.3f}",
            f"{close.cosine_min:.3f}", f"{max(errors):.2f}",
        ])  # fmt: skip
    header = ["method", "pattern", "zeros", "sequential", "cosine, mean", "min", "largest output error of a layer"]
    print("\n".join(markdown(header, rows)))


if __name__ == "__main__":
    main()
