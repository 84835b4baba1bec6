"""python -m lepton_ai.serving.fetch URL PATH SHA256: what URL gives becomes PATH, if it has that SHA-256."""

import hashlib
import sys
import urllib.request
from pathlib import Path

from lepton_kernels._whole_file import whole_file

_PIECE = 1 << 20


def fetch(url: str, path: Path, sha256: str, timeout: float = 60.0) -> int:
    """Writes what `url` (http or https) gives, and returns its bytes; the file is whole or not there.

    timeout: seconds that the other side may be silent. Raises OSError where it can not be fetched or written, and
    ValueError where its SHA-256 is another.
    """
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=timeout) as response, whole_file(path) as file:
        while piece := response.read(_PIECE):
            digest.update(piece)
            size += file.write(piece)
        if digest.hexdigest() != sha256:
            raise ValueError(f"fetch: {url} gave {size} bytes of SHA-256 {digest.hexdigest()}; allowed: {sha256}")
    return size


if __name__ == "__main__":
    url, path, sha256 = sys.argv[1:]
    print(f"{path}: {fetch(url, Path(path), sha256)} bytes")
