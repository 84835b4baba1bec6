"""Where a model comes from: a module, a Hugging Face folder, a Python object by name, or one of our files."""

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIG_KEY = "hf.config"  # a saved file's metadata: the Hugging Face configuration, so that load can build the model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a Hugging Face folder needs transformers: pip install 'lepton-kernels[ai]'") from error
    return transformers


def _from_folder(folder: Path) -> nn.Module:
    transformers = _transformers()
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    kind = getattr(transformers, architecture, transformers.AutoModel)
    transformers.utils.logging.disable_progress_bar()
    return kind.from_pretrained(folder, local_files_only=True).eval()


def _from_python(name: str) -> nn.Module:
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).exists():
            raise FileNotFoundError(f"model is {name!r}: there is no file {module_name}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")
        module = importlib.import_module(module_name)
    thing = getattr(module, attribute)
    model = thing if isinstance(thing, nn.Module) else thing()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {name!r}: it is {type(model).__name__}; allowed: an nn.Module or a function giving one"
        )
    return model


def open_model(source: "nn.Module | str | Path") -> nn.Module:
    """The model that `source` names.

    An nn.Module; a folder with config.json and weights; a .safetensors file in such a folder; "package.module:name" or
    "file.py:name", an nn.Module or a function that returns one. Raises ValueError that lists these for anything else.
    """
    if isinstance(source, nn.Module):
        return source
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir() and (path / "config.json").is_file():
        return _from_folder(path)
    if ":" in str(source):
        return _from_python(str(source))
    raise ValueError(
        f"model is {str(source)!r}; allowed: an nn.Module, a folder with config.json and safetensors weights, "
        "'package.module:name' or 'file.py:name'"
    )


def metadata_of(model: nn.Module) -> dict[str, str]:
    """What a file needs beside the weights to be opened without the model's code at hand."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_diff_dict"):
        return {}
    return {CONFIG_KEY: json.dumps({**config.to_diff_dict(), "architectures": [type(model).__name__]}, default=str)}


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, modules get their parameters on the meta device; buffers stay real, since files need not hold them."""
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def model_of_config(text: str) -> nn.Module:
    """The model of a saved configuration, without weights: its parameters are on the meta device."""
    transformers = _transformers()
    values = json.loads(text)
    architecture = values.get("architectures", [""])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(f"the file's architecture is {architecture!r}; this transformers has no such model")
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with empty_parameters(), torch.no_grad():
        return kind(config).eval()
