"""Loads the native module `_C`, on torch's own OpenMP runtime where torch is installed.

`_C` asks the loader for `libgomp.so.1` by its plain name and the wheel carries no copy. When torch is already imported
the loader hands `_C` torch's copy; otherwise we load torch's copy by path first, so that a later `import torch` reuses
it and `torch.set_num_threads` governs both. Without torch the system's copy serves.
"""

import ctypes
import importlib.util
import os
import sys
from types import ModuleType


def _torch_libgomp() -> str | None:
    """Path of the OpenMP runtime inside an installed torch that was not imported yet, else None."""
    if "torch" in sys.modules or not sys.platform.startswith("linux"):
        return None
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = os.path.join(spec.submodule_search_locations[0], "lib", "libgomp.so.1")
    return path if os.path.exists(path) else None


def _load() -> ModuleType:
    path = _torch_libgomp()
    if path is not None:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    from lepton_kernels import _C  # type: ignore[attr-defined]

    return _C


C = _load()
