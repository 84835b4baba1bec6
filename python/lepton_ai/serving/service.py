"""Service: a model that answers requests in JSON, several at a time.

A request is an object with either
  texts: a list of strings, where there is a tokenizer, or
  inputs: an object of the model's keyword arguments, or its one argument, as nested lists; the first dimension is that
    of samples. Integers become int64, numbers with a point float32, true and false bool.
The answer is {"vectors": [[...], ...]}, one a sample, as lepton_ai.fidelity.output_vectors makes them: for a sentence
encoder the mean over the tokens that the attention mask keeps.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lepton_ai.fidelity import vectors_of
from lepton_ai.serving.frames import Part
from lepton_kernels.sparse.calibration import call

OK, BAD_REQUEST, FAILED = 200, 400, 500
_FORM = '{"texts": [string, ...]} or {"inputs": {name: nested lists, ...}}'


class BadRequestError(ValueError):
    """What the sender has to mend."""


@dataclass(frozen=True)
class _Query:
    """What a request asks for: texts, or a model input whose tensors all have `samples` entries."""

    samples: int
    texts: list[str] | None = None
    inputs: Tensor | dict[str, Tensor] | None = None

    @property
    def key(self) -> object:
        """Queries of one key can be one batch."""
        if self.inputs is None:
            return "texts"
        named = self.inputs.items() if isinstance(self.inputs, dict) else [("", self.inputs)]
        return tuple(sorted((name, t.dtype, tuple(t.shape[1:])) for name, t in named))


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequestError(f"{name}: {error}; allowed: nested lists of numbers of one shape") from error
    if tensor.dim() == 0:
        raise BadRequestError(f"{name} is a single value; allowed: nested lists, samples first")
    return tensor.float() if tensor.is_floating_point() else tensor


def failure(status: int, text: str) -> Part:
    """An answer that says what is wrong."""
    return status, json.dumps({"error": text}).encode()


class Service:
    """Answers requests with `model`, in evaluation mode.

    tokenizer: a Hugging Face tokenizer, for texts, which are cut at max_tokens. max_samples: of one request. batch: how
    many samples the model is given at once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        max_tokens: int = 512,
        max_samples: int = 256,
        batch: int = 32,
    ) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._max_tokens, self._max_samples, self._batch = max_tokens, max_samples, batch

    def answers(self, bodies: Sequence[bytes]) -> list[Part]:
        """The status and the JSON for each request's body. Those that are wrong do not disturb the others."""
        out: dict[int, Part] = {}
        queries: dict[object, list[tuple[int, _Query]]] = {}
        for i, body in enumerate(bodies):
            try:
                query = self._query(body)
                queries.setdefault(query.key, []).append((i, query))
            except BadRequestError as error:
                out[i] = failure(BAD_REQUEST, str(error))
        for group in queries.values():
            for (i, _), answer in zip(group, self._run([query for _, query in group]), strict=True):
                out[i] = answer
        return [out[i] for i in range(len(bodies))]

    def _query(self, body: bytes) -> _Query:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"the body is no JSON: {error}") from error
        if not isinstance(request, dict) or len(request.keys() & {"texts", "inputs"}) != 1 or len(request) != 1:
            given = ", ".join(sorted(request)) if isinstance(request, dict) else type(request).__name__
            raise BadRequestError(f"the request has {given or 'nothing'}; allowed: {_FORM}")
        query = self._of_texts(request["texts"]) if "texts" in request else self._of_inputs(request["inputs"])
        if not 1 <= query.samples <= self._max_samples:
            raise BadRequestError(f"the request has {query.samples} samples; allowed: 1 to {self._max_samples}")
        return query

    def _of_texts(self, texts: Any) -> _Query:
        if self._tokenizer is None:
            raise BadRequestError("texts: this server has no tokenizer; allowed: inputs")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadRequestError("texts: allowed: a list of strings")
        return _Query(len(texts), texts=texts)

    def _of_inputs(self, inputs: Any) -> _Query:
        if not isinstance(inputs, dict):
            tensor = _tensor("inputs", inputs)
            return _Query(len(tensor), inputs=tensor)
        if not inputs:
            raise BadRequestError("inputs is empty; allowed: the model's arguments by name")
        tensors = {name: _tensor(name, value) for name, value in inputs.items()}
        counts = sorted({len(tensor) for tensor in tensors.values()})
        if len(counts) > 1:
            raise BadRequestError(f"inputs have {counts} samples; allowed: one number for all")
        return _Query(counts[0], inputs=tensors)

    def _run(self, queries: list[_Query]) -> list[Part]:
        try:
            with torch.inference_mode():
                vectors = self._vectors(queries)
        except Exception as error:  # whatever the model says to what it was given
            if len(queries) > 1:
                return [answer for query in queries for answer in self._run([query])]
            return [failure(BAD_REQUEST, f"the model can not take this: {type(error).__name__}: {error}")]
        out = []
        for part in vectors.split([query.samples for query in queries]):
            if part.isfinite().all():
                out.append((OK, json.dumps({"vectors": part.tolist()}).encode()))
            else:
                out.append(failure(FAILED, "the model gave NaN or infinity"))
        return out

    def _vectors(self, queries: list[_Query]) -> Tensor:
        if queries[0].texts is not None:
            return self._of_batches([text for query in queries for text in query.texts or ()])
        parts: list[Any] = [query.inputs for query in queries]
        if isinstance(parts[0], dict):
            joined = {name: torch.cat([part[name] for part in parts]).split(self._batch) for name in parts[0]}
            items: list[Any] = [dict(zip(joined, cut, strict=True)) for cut in zip(*joined.values(), strict=True)]
        else:
            items = list(torch.cat(parts).split(self._batch))
        return torch.cat([vectors_of(call(self._model, item), item) for item in items])

    def _of_batches(self, texts: list[str]) -> Tensor:
        # Batches of similar lengths hold little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: list[Tensor] = []
        for begin in range(0, len(texts), self._batch):
            chosen = [texts[i] for i in order[begin : begin + self._batch]]
            item = dict(
                self._tokenizer(chosen, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
            )
            vectors.append(vectors_of(call(self._model, item), item))
        places = torch.empty(len(texts), dtype=torch.long)
        places[order] = torch.arange(len(texts))
        return torch.cat(vectors)[places]
