"""Imports go one way: lepton_ai -> public names of lepton_kernels -> nn -> _ops -> _backends -> native module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS, PIPELINE = ROOT / "lepton_kernels", ROOT / "python" / "lepton_ai"

# What may not be imported (prefixes), by the first matching part of a module's name; lower layers know nothing above.
FORBIDDEN = {
    "lepton_kernels._runtime": ("lepton_kernels.",),
    "lepton_kernels.codec": ("torch", "lepton_kernels.nn", "lepton_kernels._ops", "lepton_kernels._backends"),
    "lepton_kernels.model_file": ("torch", "lepton_kernels.nn", "lepton_kernels._ops", "lepton_kernels._backends"),
    "lepton_kernels.reference": ("lepton_kernels.",),
    "lepton_kernels.pattern": ("lepton_kernels.",),
    "lepton_kernels.triton_kernels": ("lepton_kernels.nn", "lepton_kernels._ops", "lepton_kernels._backends"),
    "lepton_kernels._backends": ("lepton_kernels.nn", "lepton_kernels._ops", "lepton_kernels.quantize"),
    "lepton_kernels._ops": ("lepton_kernels.nn", "lepton_kernels.quantize"),
    "lepton_kernels._ops_recurrent": ("lepton_kernels.nn", "lepton_kernels.quantize"),
    "lepton_kernels._ops_sparse": ("lepton_kernels.nn", "lepton_kernels.quantize"),
    "lepton_kernels.nn": ("lepton_kernels.quantize", "lepton_kernels.checkpoint", "lepton_kernels.sparse"),
    "lepton_kernels": ("lepton_ai", "tests", "bench"),
}
ALLOWED = {("lepton_kernels.codec", "lepton_kernels._runtime"), ("lepton_kernels.nn", "lepton_kernels.quantizers")}
# The pipeline uses public names; three helpers of the library's own command line and files are shared with it.
PIPELINE_MAY = (
    "lepton_kernels.model_file",
    "lepton_kernels.checkpoint",
    "lepton_kernels._progress",
    "lepton_kernels._whole_file",
)


def module_name(path: Path) -> str:
    root = KERNELS.parent if path.is_relative_to(KERNELS) else PIPELINE.parent
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level_imports(path: Path) -> set[str]:
    """Names imported when the module is, TYPE_CHECKING blocks and functions left out; `from a import b` gives a.b."""
    names = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child)

    visit(ast.parse(path.read_text()))
    return names


def under(name: str, prefix: str) -> bool:
    """Whether a name is the prefix, or lies in it; a prefix that ends in a dot is a whole package."""
    return name.startswith(prefix) if prefix.endswith(".") else name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=module_name)
def test_the_library_imports_downwards(path: Path):
    name = module_name(path)
    for layer, forbidden in FORBIDDEN.items():
        if not under(name, layer):
            continue
        for imported in top_level_imports(path):
            if any(under(name, a) and under(imported, b) for a, b in ALLOWED) or under(imported, name):
                continue
            if layer != "lepton_kernels" and under(imported, layer):
                continue
            assert not any(under(imported, prefix) for prefix in forbidden), f"{name} imports {imported}"


@pytest.mark.parametrize("path", sorted(PIPELINE.rglob("*.py")), ids=module_name)
def test_the_pipeline_uses_public_names(path: Path):
    for imported in top_level_imports(path):
        private = imported.startswith("lepton_kernels.") and any(part.startswith("_") for part in imported.split("."))
        assert not private or any(under(imported, may) for may in PIPELINE_MAY), (
            f"{module_name(path)} imports {imported}"
        )


def test_the_check_sees_a_wrong_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from lepton_kernels import nn\nimport torch.nn\n")
    assert top_level_imports(bad) == {"lepton_kernels.nn", "torch.nn"}
    assert any(under("lepton_kernels.nn", prefix) for prefix in FORBIDDEN["lepton_kernels._ops"])
