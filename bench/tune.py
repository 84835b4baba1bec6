"""What lepton tune finds for MiniLM: python bench/tune.py [--budget B] [--only PART]; prints tables, draws the fronts.

Tuned on the hundred sentences that come with lepton_ai; "other sentences" are those of the demo that are not among
them, on which nothing was tuned. Times: one batch of 128 tokens, the models in turn.
"""

import argparse
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from conftest import cpu_model
from lepton_ai import LeptonModel
from lepton_ai.calibration import SENTENCES, texts
from lepton_ai.fidelity import fidelity, output_vectors
from lepton_ai.measure import token_batch
from lepton_ai.tuning import TuneResult, tune
from minilm import FOLDER, batches, sentences
from tables import markdown

PLOTS = Path(__file__).with_name("plots")
TOKENS = 128
PARTS = {"size": ("size", 1), "latency-1": ("latency", 1), "latency-32": ("latency", 32)}


def table(model: LeptonModel, result: TuneResult, others: list[dict]) -> list[str]:
    """A line a point: those on the front, single schemes, and the chosen one in bold."""
    reference, front = output_vectors(model.model, others), {id(point) for point in result.front()}
    rows = []
    for point in sorted(result.points, key=lambda point: -point.value):
        if not (point.single or id(point) in front):
            continue
        made = model.model if point.recipe is None else model.compress(point.recipe).model
        close = fidelity(reference, output_vectors(made, others))
        cells = [
            point.label, "yes" if id(point) in front else "", f"{point.file_bytes / 1e6:.2f}",
            f"{1e3 * point.seconds:.2f}", f"{point.value:.4f}", f"{close.cosine_mean:.4f}", f"{close.cosine_min:.4f}",
        ]  # fmt: skip
        rows.append([f"**{cell}**" if cell and point is result.chosen else cell for cell in cells])
    header = ["", "on the front", "file, MB", "ms", result.budget.metric, "other sentences: mean", "min"]
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="cosine>=0.995")
    parser.add_argument("--only", choices=PARTS, help="one of the parts")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model, known = LeptonModel(FOLDER), set(SENTENCES.read_text().splitlines())
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    others = batches(tokenizer, [text for text in sentences() if text not in known])
    machine = "-".join(re.findall("[a-z0-9]+", cpu_model().lower()))
    for part in [arguments.only] if arguments.only else PARTS:
        minimize, batch = PARTS[part]
        example = token_batch(model.model, batch, TOKENS)
        result = tune(model, texts(tokenizer), arguments.budget, minimize, example=example)
        PLOTS.mkdir(exist_ok=True)
        result.plot(PLOTS / f"{machine}-tune-{part}.svg")
        best = result.best_single
        print(f"\n#### tune: {minimize}, batch {batch}, {result.budget}; {torch.get_num_threads()} threads\n")
        print("\n".join(table(model, result, others)))
        share = (
            "" if best is None else f"; {result.objective(result.chosen) / result.objective(best):.3f} of {best.label}"
        )
        print(f"\nFound in {result.took:.0f} s{share}.", flush=True)


if __name__ == "__main__":
    main()
