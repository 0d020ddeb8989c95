"""The house rules that a machine can check: packaging, import directions, links for type checkers, lazy imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "compress", "eval", "zoo_cards")
# room: the rooms it may import; the root may import all of them
MAY_IMPORT = {
    "models": {"models"},
    "compress": {"compress", "models"},
    "eval": {"eval", "models"},
    "zoo_cards": set(ROOMS),
}
HEAVY = {"transformers", "timm", "fairseq", "megatron", "datasets", "matplotlib", "torchvision"}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def relative_imports(path):
    """(line, dotted target from the root) of every import that stays inside the package."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*target, alias.name) for alias in node.names] if not node.module else [target]
            for found in names:
                yield node.lineno, found
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                assert module.split(".")[0] != "squeezoo", (
                    f"{path}:{node.lineno}: imports inside the package are relative"
                )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_in_the_allowed_directions(path):
    """models -> nothing of ours; compress -> models; eval -> models; zoo_cards -> all; nobody imports the root."""
    room = path.relative_to(ROOT).parts[0]
    for line, target in relative_imports(path):
        first = target[0] if target else ""
        assert first in MAY_IMPORT[room], f"{path}:{line}: {room} may not import {'.'.join(target) or 'the root'}"


def test_nobody_imports_the_command_line():
    for path in (*SOURCES, *ROOT.glob("*.py")):
        assert all(target[:1] != ("cli",) for _, target in relative_imports(path)), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_libraries_are_imported_inside_the_functions_that_need_them(path):
    """Also because torchvision must be mended before transformers' models or timm are imported."""
    if path.name == "progress.py" and path.parent.name == "compress":
        return  # a Trainer callback; itself imported only where the Trainer is
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not HEAVY & {module.split(".")[0] for module in modules}, f"{path}:{node.lineno}"


def test_the_list_of_packages_equals_the_folders():
    folders = {"squeezoo"} | {
        ".".join(("squeezoo", *path.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_every_root_entry_has_its_link_for_type_checkers():
    entries = {path.name for path in ROOT.glob("*.py")} | set(ROOMS)
    links = {path.name: path.resolve() for path in (ROOT / ".typecheck" / "squeezoo").iterdir()}
    assert links == {name: ROOT / name for name in entries}


def test_importing_the_package_imports_no_torch():
    code = "import sys, squeezoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_are_there():
    import squeezoo

    assert all(getattr(squeezoo, name) is not None for name in squeezoo.__all__)
    assert set(squeezoo.__all__) <= set(dir(squeezoo))
    with pytest.raises(AttributeError, match="has no attribute 'squeeze'"):
        _ = squeezoo.squeeze


def test_compress_is_a_function_and_a_package():
    """One name for both: the function would vanish behind the package at its first import."""
    import squeezoo
    import squeezoo.compress.masks
    from squeezoo.compress.recipe import RecipeError

    assert squeezoo.compress.masks.Pattern(2, 4).density == 0.5
    with pytest.raises(RecipeError, match="no recipe is named"):
        squeezoo.compress("minilm-l6", "nonsense", None, "nowhere")


def test_the_pins_satisfy_the_ranges():
    """constraints.txt pins every direct dependency, inside the range that pyproject.toml allows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(r.name): r for r in (Requirement(li) for li in lines if li and not li.startswith("#"))}
    for text in PROJECT["project"]["dependencies"]:
        wanted = Requirement(text)
        pin = pins[canonicalize_name(wanted.name)]
        version = str(pin.specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"{text} does not allow the pinned {version}"
