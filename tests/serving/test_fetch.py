"""A model file from a URL is whole and the one that was meant, or not there."""

import functools
import hashlib
import http.server
import threading

import pytest
from lepton_ai.serving.fetch import fetch

CONTENT = bytes(range(256)) * 10_000  # more than is read at once
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "model").write_bytes(CONTENT)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/model"
        server.shutdown()
        thread.join()


def test_the_right_file_is_written(url, tmp_path):
    assert fetch(url, tmp_path / "model", SHA256) == len(CONTENT)
    assert (tmp_path / "model").read_bytes() == CONTENT


def test_another_file_is_not(url, tmp_path):
    with pytest.raises(ValueError, match=f"gave {len(CONTENT)} bytes of SHA-256 {SHA256}; allowed: {'0' * 64}"):
        fetch(url, tmp_path / "model", "0" * 64)
    with pytest.raises(OSError, match="404"):
        fetch(url + "s", tmp_path / "model", SHA256)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_the_command_of_the_init_container(url, tmp_path, run_python):
    program = f"import runpy, sys\nsys.argv[1:] = {[url, str(tmp_path / 'model'), SHA256]}\n"
    said = run_python(program + "runpy.run_module('lepton_ai.serving.fetch', run_name='__main__')")
    assert said == f"{tmp_path / 'model'}: {len(CONTENT)} bytes\n"
