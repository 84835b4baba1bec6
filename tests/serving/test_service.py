"""What a request may be, what it is answered, and that a wrong one disturbs no other."""

import json

import pytest
import torch
from lepton_ai.serving.service import Service
from torch import nn


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, index, scale=None):
        y = self.head(self.table(index)).mean(1)
        return y if scale is None else y * scale


class Words:
    """A tokenizer: a number a letter."""

    def __init__(self) -> None:
        self.batches = []

    def __call__(self, texts, **options):
        assert options["truncation"]
        self.batches.append(texts)
        longest = min(max(map(len, texts)), options["max_length"])
        return {"index": torch.tensor([[ord(c) % 50 for c in text.ljust(longest, "a")[:longest]] for text in texts])}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Two().eval()


def vectors(part) -> torch.Tensor:
    assert part[0] == 200, part
    return torch.tensor(json.loads(part[1])["vectors"])


def encoded(value) -> bytes:
    return json.dumps(value).encode()


def test_requests_of_one_shape_are_one_batch_and_get_their_own_answers(model):
    calls = []
    model.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    service = Service(model)
    first, second = [[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]
    other, named = [[1, 2]], {"index": [[1, 2, 3]], "scale": [[2.0]]}
    answers = service.answers([encoded({"inputs": value}) for value in (first, second, other, named)])
    assert sorted(calls) == [1, 1, 3]
    with torch.inference_mode():
        for part, value in zip(answers, (first, second, other), strict=False):
            assert torch.allclose(vectors(part), model(torch.tensor(value)), atol=1e-6)
        assert torch.allclose(vectors(answers[3]), 2 * model(torch.tensor([[1, 2, 3]])), atol=1e-6)


def test_inputs_are_cut_to_the_batch_as_texts_are(model):
    calls = []
    model.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    rows = [[i, i + 1, i + 2] for i in range(7)]
    service = Service(model, batch=3)
    answers = service.answers([encoded({"inputs": rows[:5]}), encoded({"inputs": rows[5:]})])
    named = service.answers([encoded({"inputs": {"index": rows, "scale": [[2.0]] * 7}})])
    assert calls == [3, 3, 1, 3, 3, 1]
    with torch.inference_mode():
        want = model(torch.tensor(rows))
    assert torch.allclose(torch.cat([vectors(part) for part in answers]), want, atol=1e-6)
    assert torch.allclose(vectors(named[0]), 2 * want, atol=1e-6)


def test_texts_are_batches_of_similar_lengths_in_their_own_order(model):
    tokenizer = Words()
    service = Service(model, tokenizer, batch=2, max_tokens=6)
    texts = ["a long text", "b", "another long one", "cc"]
    one, two = service.answers([encoded({"texts": texts[:3]}), encoded({"texts": texts[3:]})])
    assert [sorted(map(len, batch)) for batch in tokenizer.batches] == [[1, 2], [11, 16]]
    assert [len(vectors(one)), len(vectors(two))] == [3, 1]
    pairs = ([texts[1], texts[3]], [texts[0], texts[2]])
    with torch.inference_mode():
        short, long = (model(**Words()(pair, truncation=True, max_length=6)) for pair in pairs)
    assert torch.allclose(vectors(one), torch.stack([long[0], short[0], long[1]]), atol=1e-6)
    assert torch.allclose(vectors(two), short[1:], atol=1e-6)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "the request has list; allowed: "),
        (b"{}", "the request has nothing"),
        (b'{"inputs": [[1]], "texts": []}', "the request has inputs, texts"),
        (b'{"inputs": [[1]], "more": 1}', "the request has inputs, more"),
        (b'{"texts": ["a"]}', "no tokenizer"),
        (b'{"inputs": 3}', "inputs is a single value"),
        (b'{"inputs": []}', "0 samples; allowed: 1 to 256"),
        (b'{"inputs": {}}', "inputs is empty"),
        (b'{"inputs": [[1, 2], [3]]}', "allowed: nested lists of numbers of one shape"),
        (b'{"inputs": [["a"]]}', "allowed: nested lists of numbers"),
        (b'{"inputs": {"index": [[1]], "scale": [[1.0], [2.0]]}}', r"\[1, 2\] samples; allowed: one number for all"),
        (b'{"inputs": {"nothing": [[1]]}}', "can not take this: TypeError"),
        (b'{"inputs": [[1000]]}', "can not take this: IndexError"),
        (b'{"inputs": [[1.5]]}', "can not take this: RuntimeError"),
        (b'{"inputs": [[99999999999999999999999999]]}', "inputs: "),
    ],
)
def test_what_is_wrong_is_said_and_disturbs_no_other(model, request_, text):
    import re

    good = encoded({"inputs": [[1, 2, 3]]})
    alone = Service(model).answers([good])[0]
    wrong, right = Service(model).answers([request_, good])
    assert wrong[0] == 400
    assert re.search(text, json.loads(wrong[1])["error"])
    assert right == alone


def test_limits_and_values_that_are_no_numbers(model):
    service = Service(model, Words(), max_samples=3)
    assert service.answers([encoded({"texts": ["a"] * 4})])[0][0] == 400
    assert service.answers([encoded({"texts": ["a", 3]})])[0][0] == 400
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    status, answer = service.answers([encoded({"inputs": [[1]]})])[0]
    assert (status, json.loads(answer)["error"]) == (500, "the model gave NaN or infinity")
