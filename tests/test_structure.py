"""The layer contract: who imports whom, what importing costs, how long files are, what is public.

sanm_train → public functions → operators and backends → reference, and nothing the other way.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from sheets import SHEETS

import sanm_kernels
import sanm_kernels.compat

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sanm_kernels"
TRAIN = ROOT / "python/sanm_train"
FOLDERS = ("sanm_kernels", "python", "csrc", "tests", "benchmarks", "examples", "docs", ".ci")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".md", ""} and path.is_file()
) + [ROOT / name for name in ("setup.py", "Makefile", "README.md", "CONTRIBUTING.md")]

#: Layer → what it may import of sanm_kernels, itself included. A layer is a folder or a module.
ARROWS = {
    "reference": {"reference"},
    "ops": {"ops", "reference"},
    "backends": {"backends", "ops", "reference"},
    "config": set(),
    "validate": set(),
    "__init__": None,
    "__main__": None,
}
#: Modules that hold public functions may import all that is below them, and each other.
BELOW = {"backends", "ops", "reference", "config", "validate"}
#: Third parties: the reference is plain torch; the rest of the package works with torch and numpy
#: alone. What torch itself imports first of all gives types that checkers of Python 3.10 know.
THIRD_PARTIES = {
    "reference": {"torch"},
    "backends": {"torch", "triton", "numpy"},
    "masking": {"torch", "numpy", "typing_extensions"},
    "results": {"torch", "numpy", "typing_extensions"},
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, `from a import b` as a.b; its own package resolved."""
    base = TRAIN.parent if path.is_relative_to(TRAIN) else ROOT
    package = path.relative_to(base).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
TRAIN_FILES = sorted(TRAIN.rglob("*.py"))
EXAMPLE_FILES = sorted((ROOT / "examples").rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert {layer(path) for path in PACKAGE_FILES} >= {"reference", "ops", "backends", "__init__"}
    assert len(TRAIN_FILES) > 5 and len(EXAMPLE_FILES) > 2
    assert len(SOURCES) > len(PACKAGE_FILES) + len(TRAIN_FILES)


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    here = layer(path)
    public = {layer(p) for p in PACKAGE_FILES} - set(ARROWS)
    allowed = ARROWS.get(here, BELOW | public)
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top != "sanm_train", f"{name}: the kernels do not know the training front end"
        if top == "sanm_kernels" and rest and allowed is not None:
            first = rest.partition(".")[0]
            assert first in allowed, f"{here} may not import {name}"
        elif top not in sys.stdlib_module_names and top != "sanm_kernels":
            parties = THIRD_PARTIES.get(here, {"torch", "numpy"})
            assert top in parties, f"{here} may import {sorted(parties)}, not {name}"


@pytest.mark.parametrize("path", TRAIN_FILES + EXAMPLE_FILES, ids=relative)
def test_training_and_examples_use_public_names_only(path: Path) -> None:
    public = set(sanm_kernels.__all__) | {"compat", "__version__"}
    tree = ast.parse(path.read_text())
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "sanm_kernels"
    }
    used = {name.split(".")[1] for name in imports(path) if name.startswith("sanm_kernels.")}
    used |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
    }
    assert used <= public, f"not public: {sorted(used - public)}"


def test_reports_are_imported_in_commands_only() -> None:
    def of_reports(tree: ast.AST) -> set[int]:
        return {
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom)) and "reports" in ast.unparse(node)
        }

    for path in TRAIN_FILES:
        if path.parent.name == "reports":
            continue
        tree = ast.parse(path.read_text())
        found = of_reports(tree)
        if path == TRAIN / "cli.py":
            assert found, "sees nothing"
            found -= {
                line
                for node in tree.body
                if isinstance(node, ast.FunctionDef)
                for line in of_reports(node)
            }
        assert not found, f"{relative(path)} imports reports in lines {sorted(found)}"


def module_of(path: Path) -> str:
    parts = path.relative_to(TRAIN.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names of one circle of `graph`, or none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        found = next(filter(None, (visit(other, [*way, name]) for other in graph[name])), [])
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in graph)), [])


def test_training_imports_itself_without_a_circle() -> None:
    """Whoever imports whom, at the top of a file or inside a function."""
    modules = {module_of(path): path for path in TRAIN_FILES}
    graph = {}
    for module, path in modules.items():
        # What a name is imported from, where it is no module itself; `import a.b` as a.b.
        found = {n if n in modules else n.rpartition(".")[0] for n in imports(path)}
        graph[module] = found & set(modules)
    assert sum(map(len, graph.values())) > 3 * len(graph), "sees too few imports"
    assert not circle(graph), " → ".join(circle(graph))
    assert circle(graph | {"sanm_train.errors": {"sanm_train.train"}}), "sees no circle"


def test_tests_and_benchmarks_share_the_sheets_alone() -> None:
    shared = {"sheets", "maker"}
    of_tests = {path.stem for path in (ROOT / "tests").iterdir()} | {"tests"}
    for folder, foreign in (("tests", {"benchmarks"}), ("benchmarks", of_tests - shared)):
        for path in (ROOT / folder).rglob("*.py"):
            bad = [name for name in imports(path) if name.split(".")[0] in foreign]
            assert not bad or path.name == "test_gpu_script.py", f"{relative(path)} imports {bad}"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_importing_loads_no_library_and_compiles_nothing() -> None:
    code = """
import subprocess, sys, torch
def refuse(*_, **__): raise AssertionError("a process was started")
subprocess.Popen.__init__ = refuse
before = set(sys.modules)
import sanm_kernels
from sanm_kernels import backends
print(backends.load.cache_info().currsize)
print(sum("sanm_kernels" in line and ".so" in line for line in open("/proc/self/maps")))
print(*sorted({n for n in set(sys.modules) - before if not n.startswith("sanm_kernels")}))
"""
    loaded, mapped, modules = run_python(code).split("\n")[:3]
    assert int(loaded) == 0, "a backend was loaded"
    assert int(mapped) == 0, "a compiled library was mapped"
    heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton", "sklearn", "matplotlib", "cv2"}
    assert not heavy & set(modules.split())
    assert len(modules.split()) < 50, modules


def test_the_sheets_need_no_pytest() -> None:
    """An installed copy is tried, and benchmarks run, where torch and numpy are all there is."""
    missing = "import sys; sys.modules |= {'pytest': None, 'scipy': None}; sys.path[:0] = ['tests']"
    run_python(f"{missing}; import operations, benchmarks.run")


def test_the_first_call_does_load_the_library() -> None:
    """Shows that the check above can see a mapped library."""
    if sanm_kernels.available_backends()["cpu"] is not None:
        pytest.skip("no compiled library")
    code = """
import torch, sanm_kernels
sanm_kernels.available_backends()
print(sum("sanm_kernels" in line and ".so" in line for line in open("/proc/self/maps")))
"""
    assert int(run_python(code)) > 0


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_are_short_and_finished(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    if path == Path(__file__).resolve():
        return
    for pattern in (
        r"\b(TODO|FIXME|XXX)\b",
        r"\bbreakpoint\(\)",
        r"/(home|root|Users|work|tmp)/\w",
    ):
        found = re.search(pattern, text)
        assert found is None, (
            f"{found.group()!r} in line {text[: found.start()].count(chr(10)) + 1}"
        )


def public_functions() -> set[str]:
    """The functions of the package's modules that are decorated as public."""
    return {
        node.name
        for path in PACKAGE.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).endswith("validate.public") for d in node.decorator_list)
    }


def own_names() -> dict[str, object]:
    """The package's names that are not modules, without a leading underscore, and defined in it."""
    return {
        name: value
        for name, value in vars(sanm_kernels).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "").startswith("sanm_kernels")
    }


def test_names_of_torch_that_are_not_public_are_in_one_module() -> None:
    """Each has there what is used without it. Of torch.utils there is no public pytree."""
    private = re.compile(r"\btorch(?:\.\w+)*\._[^_]\w*|\.(?:_C|_dynamo_\w+|_overloadname)\b")
    allowed = {"python/sanm_train/features.py": {"torch.utils._pytree"}}
    found = {
        relative(path): set(private.findall(path.read_text()))
        for folder in (PACKAGE, TRAIN)
        for path in folder.rglob("*.py")
    }
    assert "torch._C" in found.pop("sanm_kernels/ops/internals.py")
    assert {path: names for path, names in found.items() if names} == allowed


def test_all_is_complete() -> None:
    names = sanm_kernels.__all__
    assert len(names) == len(set(names))
    assert set(names) == set(own_names())
    decorated = public_functions()
    assert decorated and decorated <= set(names), f"not exported: {sorted(decorated - set(names))}"


def test_every_function_has_a_sheet() -> None:
    assert set(SHEETS) == public_functions()
    for name, sheet in SHEETS.items():
        assert {operation.op for operation in sheet.operations.values()} == {name}


def public_objects() -> dict[str, object]:
    result = {f"sanm_kernels.{name}": value for name, value in own_names().items()}
    for name in sanm_kernels.compat.__all__:
        result[f"compat.{name}"] = getattr(sanm_kernels.compat, name)
    return result


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_public_names_are_documented(name: str) -> None:
    value = public_objects()[name]
    assert value is not None, "not there"
    text = inspect.getdoc(value) or ""
    assert text, "no docstring"
    if isinstance(value, type):
        takes_arguments = "__init__" in vars(value) or "_fields" in vars(value)
        assert not takes_arguments or re.search(r"^(Args|Attributes):", text, re.M), text
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                inherited = any(hasattr(base, method) for base in value.__mro__[1:])
                assert inherited or function.__doc__, f"{method} has no docstring"
        return
    parameters = inspect.signature(value).parameters  # type: ignore[arg-type]
    if not parameters:
        return
    assert re.search(r"^Args:", text, re.M), "no section Args"
    assert re.search(r"^Raises:", text, re.M), "no section Raises"
    returns = str(inspect.signature(value).return_annotation)  # type: ignore[arg-type]
    if returns != "None" and "Iterator" not in returns:
        assert re.search(r"^(Returns|Yields):", text, re.M), "no section Returns"
    for parameter in parameters:
        assert re.search(rf"^ +([\w, ]+, )?{parameter}(, [\w, ]+)?:", text, re.M), f"{parameter}?"
