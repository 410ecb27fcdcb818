"""Imports point downwards only, by the table below; inside one folder neighbours may import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "config": 0,
    "exit_codes": 0,
    "parallel": 0,
    "drawing": 0,
    "hlo": 0,
    "images": 0,
    "stopping": 0,
    "storage": 0,
    "torch_files": 0,
    "torch_pickle": 0,
    "watchdog": 0,
    "weights": 0,
    "cli": 0,
    "models": 1,
    "losses": 2,
    "ordering": 2,
    "coordinates": 2,
    "object_tokens": 2,
    "conditioning": 2,
    "tokenizer": 2,
    "transformer": 2,
    "data": 3,
    "train": 3,
    "sampling": 3,
    "evals": 3,
    "convert": 4,
    "pretrained": 4,
    "published": 4,
    "trained_transformer": 4,
    "front_door": 4,
    "scoring": 4,
    "request": 4,
    "tools": 5,
}
FILES = sorted((ROOT / "vqgan_jax").rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "vqgan_jax").parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Top-level names under vqgan_jax that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("vqgan_jax.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_from_its_own_layer_or_below(path):
    module = module_of(path)
    if module == "__init__":
        assert not imports_of(path)
        return
    for imported in imports_of(path) - {"__version__"}:
        assert LAYERS[imported] <= LAYERS[module], f"{module} (layer {LAYERS[module]}) imports {imported}"


def test_the_table_names_what_is_there():
    assert {module_of(path) for path in FILES} - {"__init__"} == set(LAYERS)


def test_models_and_data_keep_apart():
    """Data knows no model and no mesh; models know no data."""
    for path in FILES:
        if module_of(path) == "data":
            assert not imports_of(path) & {"models", "parallel", "train", "sampling", "evals"}, path
        if module_of(path) == "models":
            assert not imports_of(path) & {"data", "train", "sampling", "evals"}, path


def test_nothing_imports_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not scripts & set(names), path
