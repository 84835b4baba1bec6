"""Inputs to calibrate a language model with: batches of tokens, made of sentences."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SENTENCES = Path(__file__).with_name("sentences.txt")  # 110 of various kinds, in English


def texts(
    tokenizer: str | os.PathLike[str] | Any,
    sentences: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    max_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Batches of token ids and attention masks [batch, tokens], for calibration= of prune_ and Pruning.

    tokenizer: a Hugging Face tokenizer, or the folder of one. sentences: texts from where the model will work; None is
    a hundred general ones that come with Lepton. Batches are of similar lengths, so that little of them is padding,
    whose activations count as well. Raises ValueError without sentences, ImportError without transformers.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            import transformers
        except ImportError as error:
            raise ImportError("texts needs transformers: pip install 'lepton-kernels[ai]'") from error
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    chosen = SENTENCES.read_text().splitlines() if sentences is None else list(sentences)
    if not chosen:
        raise ValueError("texts: there are no sentences; allowed: one or more")
    chosen.sort(key=len)
    return [
        dict(tokenizer(chosen[i : i + batch_size], padding=True, truncation=True, max_length=max_tokens,
                       return_tensors="pt"))
        for i in range(0, len(chosen), batch_size)
    ]  # fmt: skip
