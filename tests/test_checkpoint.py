"""save, load, inspect, verify: lossless, atomic, readable by safetensors, and loud about every damage."""

import copy
import gc
import json
import os
import re
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lepton_kernels as lk
from lepton_kernels.codec import CorruptDataError


class Net(nn.Module):
    """Embedding, linears, a tied head, a persistent buffer and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(120, 64)
        self.body = nn.Sequential(nn.Linear(64, 200), nn.GELU(), nn.Linear(200, 64, bias=False))
        self.head = nn.Linear(64, 120, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, index):
        return self.head(self.body(self.embedding(index))) * self.scratch[0]


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net().eval()


INDEX = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("codec", ["huffman", "lzw", "none"])
@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a16"])
def test_round_trip_is_bit_equal_and_loads_into_a_meta_model(net, tmp_path, codec, scheme):
    if scheme:
        lk.quantize_(net, scheme, include=["body.*"])
    want = net(INDEX)
    lk.save(net, tmp_path / "a.safetensors", codec)
    state = lk.load(tmp_path / "a.safetensors")
    assert state.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    fresh = lk.load(tmp_path / "a.safetensors", model=Net().eval())
    assert torch.equal(fresh(INDEX), want)
    with torch.device("meta"):
        empty = Net().eval()
    empty.scratch = torch.ones(2)
    assert torch.equal(lk.load(tmp_path / "a.safetensors", model=empty)(INDEX), want)


def test_modules_may_have_codecs_of_their_own(net, tmp_path):
    lk.save(net, tmp_path / "a", {"": "none", "body": "huffman", "body.0": "lzw"})
    codecs = {entry.name: entry.codec for entry in lk.inspect(tmp_path / "a")}
    large = {name: codec for name, codec in codecs.items() if net.state_dict()[name].numel() >= 4096}
    assert large
    for name, codec in large.items():
        allowed = {"none"} if not name.startswith("body.") else {"lzw" if name.startswith("body.0.") else "huffman"}
        assert codec in allowed | {"none"}
    assert set(large.values()) > {"none"}
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in lk.load(tmp_path / "a").items())
    with pytest.raises(ValueError, match=r"codec names \['body'\] alone; allowed: also ''"):
        lk.save(net, tmp_path / "b", {"body": "huffman"})
    with pytest.raises(ValueError, match="codec names 'boddy'; allowed: modules with tensors"):
        lk.save(net, tmp_path / "b", {"": "none", "boddy": "huffman"})
    with pytest.raises(ValueError, match="codec is 'zip'"):
        lk.save(net, tmp_path / "b", {"": "none", "body": "zip"})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unquantized_models_are_lossless_and_smaller(net, tmp_path, dtype):
    net = net.to(dtype)
    lk.save(net, tmp_path / "a")
    fresh = lk.load(tmp_path / "a", model=Net())
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), net.state_dict().values(), strict=True))
    ratio = {e.name: e.ratio for e in lk.inspect(tmp_path / "a")}["body.0.weight"]
    assert ratio < {torch.float32: 0.9, torch.bfloat16: 0.75, torch.float16: 1.0, torch.float64: 1.01}[dtype]


def test_tied_tensors_are_stored_once_and_tied_after_loading(net, tmp_path):
    lk.save(net, tmp_path / "a")
    names = [entry.name for entry in lk.inspect(tmp_path / "a")]
    assert ("head.weight" in names) + ("embedding.weight" in names) == 1
    fresh = lk.load(tmp_path / "a", model=Net())
    assert fresh.head.weight is fresh.embedding.weight
    state = lk.load(tmp_path / "a")
    assert state["head.weight"] is state["embedding.weight"]


def test_safetensors_opens_the_file_and_we_open_theirs(net, tmp_path):
    lk.quantize_(net, "w8a8", include=["body.*"])
    lk.save(net, tmp_path / "a", metadata={"note": "mine"})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata()["note"] == "mine"
        assert file.metadata()["format"] == "pt"
        table = json.loads(file.metadata()["lepton.tensors"])
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if table[name]["codec"] == "huffman":
                assert tensor.dtype is torch.uint8
                assert lk.codec.info(tensor[: table[name]["frame"]]).codec == "huffman"
    state = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2).bfloat16(), "empty": torch.empty(0, 4)}
    save_file(state, tmp_path / "theirs")
    assert all(torch.equal(lk.load(tmp_path / "theirs")[name], tensor) for name, tensor in state.items())
    lk.save(state, tmp_path / "ours", "none")
    assert all(torch.equal(load_file(tmp_path / "ours")[name], tensor) for name, tensor in state.items())


def test_dtypes_shapes_and_strides(tmp_path):
    state = {
        "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "f64": torch.randn(3).double(),
        "u8": torch.arange(9, dtype=torch.uint8), "turned": torch.randn(40, 60).t(),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn), "odd": torch.ones(3, dtype=torch.int8),
        "complex": torch.randn(3, dtype=torch.complex64), "none": torch.empty(0),
        "steps": torch.randn(90, 90)[::2, ::3],
    }  # fmt: skip
    lk.save(state, tmp_path / "a")
    for name, tensor in lk.load(tmp_path / "a").items():
        assert tensor.dtype == state[name].dtype
        assert tensor.shape == state[name].shape
        flat, want = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, state[name]))
        assert torch.equal(flat, want)


def test_any_flipped_byte_and_any_truncation_is_found(net, tmp_path):
    lk.quantize_(net, "w8a8", include=["body.*"])
    path = tmp_path / "a"
    lk.save(net, path)
    good = path.read_bytes()
    end_of_header = 8 + int.from_bytes(good[:8], "little")
    rows = {entry.name: (entry.begin, entry.end) for entry in lk.verify(path)}
    for position in [0, 9, 200, end_of_header // 2, *range(end_of_header, len(good), 701), len(good) - 1]:
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        if position < end_of_header and chr(good[position]) == " ":
            continue
        with pytest.raises(CorruptDataError) as error:
            lk.verify(path)
        if position >= end_of_header:
            inside = next(name for name, (begin, end) in rows.items() if begin <= position < end)
            assert f"tensor {inside}:" in str(error.value)
            with pytest.raises(CorruptDataError, match=inside):
                lk.load(path)
    for length in (0, 7, 8, 100, end_of_header, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptDataError):
            lk.load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CorruptDataError, match="its tensors end at"):
        lk.load(path)


def test_a_file_of_a_later_version_is_refused_by_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a", metadata={"lepton.version": "2"})
    with pytest.raises(ValueError, match="format version 2; this release reads 1"):
        lk.load(tmp_path / "a")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(net, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    lk.save(net, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        lk.save(net.half(), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_nothing_of_a_bad_file_reaches_the_model(net, tmp_path):
    lk.quantize_(net, "w8a8", include=["body.*"])
    path = tmp_path / "a"
    lk.save(net, path)
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)
    model = Net().eval()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(CorruptDataError):
        lk.load(path, model=model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_is_an_error_that_names_it(net, tmp_path):
    lk.save({"x": torch.ones(3)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"missing in the file: \['body.0.bias'.*not in the model: \['x'\]"):
        lk.load(tmp_path / "a", model=net)
    state = net.state_dict()
    state["body.0.bias"] = torch.ones(7)
    lk.save(state, tmp_path / "b")
    with pytest.raises(ValueError, match=r"body.0.bias has shape \(7,\) in .*; the model wants \(200,\)"):
        lk.load(tmp_path / "b", model=net)
    lk.quantize_(net, "w8a8", include=["body.0"])
    lk.save(net, tmp_path / "c")
    other = Net()
    other.body[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"layer 'body.0' is an nn.Linear in the file and Identity in the model"):
        lk.load(tmp_path / "c", model=other)
    with pytest.raises(ValueError, match="codec is 'zip'; allowed: huffman, lzw, none"):
        lk.save(net, tmp_path / "d", "zip")
    with pytest.raises(ValueError, match=r"allowed: names that do not start with 'lepton.'"):
        lk.save(net, tmp_path / "d", metadata={"lepton.version": "7"})
    with pytest.raises(ValueError, match="not on meta"):
        lk.save({"x": torch.empty(3, device="meta")}, tmp_path / "d")
    with pytest.raises(FileNotFoundError):
        lk.load(tmp_path / "nothing here")


def _peak_of(work) -> int:
    """How far the resident memory rose above its start while work() ran, in bytes."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    start = peak = resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.0005):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    peak = max(peak, resident())
    stop.set()
    thread.join()
    del result
    return peak - start


def test_loading_peaks_at_the_decoded_model_and_about_one_layer(tmp_path):
    layer = 32 << 20
    lk.save({f"w{i}": torch.randn(layer // 4) for i in range(6)}, tmp_path / "a")
    lk.load(tmp_path / "a")  # buffers of the threads, once
    assert _peak_of(lambda: lk.load(tmp_path / "a")) < 6 * layer + 1.5 * layer


def test_saving_peaks_at_two_layers(tmp_path):
    layer = 32 << 20
    state = {f"w{i}": torch.randn(layer // 4) for i in range(6)}
    lk.save(state, tmp_path / "a")
    assert _peak_of(lambda: lk.save(state, tmp_path / "a")) < 2.5 * layer


def test_load_tells_how_fast_it_was(tmp_path, caplog):
    lk.save({"weight": torch.randn(300, 400) * 0.02, "bias": torch.randn(7)}, tmp_path / "model.safetensors")
    with caplog.at_level("INFO", "lepton_kernels"):
        lk.load(tmp_path / "model.safetensors")
    assert re.search(r"model.safetensors: 0.5 MB, stored as 0.4 MB, in 0\.\d+ s: \d+\.\d\d GB/s", caplog.text)
