"""The house's plan: who may import whom, what stands on which floor, how large a file may be, and what is packaged."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("clcr", "features", "pipelines", "tuning", "infra")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_NOT_IMPORT = {
    "clcr": {"ray", "mlflow", "decord", "features", "pipelines", "tuning", "infra"},
    "features": {"clcr", "pipelines", "tuning", "mlflow"},
    "infra": {"pipelines", "tuning"},
    "pipelines": {"tuning"},
    "tuning": set(),
}
# Rooms of a package from the ground up; those in one line share a floor. A file imports from its own and lower floors.
FLOORS = {
    "features": [
        ("errors", "progress"),
        ("s3",),
        ("files",),
        ("corpus",),
        ("store",),
        ("encoders",),
        ("decode",),
        ("extractor",),
        ("noise", "datasets", "synthetic"),
    ],
    "pipelines": [
        ("common",),
        ("tracking",),
        ("training",),
        ("extract",),  # raw clips are extracted before they are answered
        ("answering",),
        ("evaluation",),
        ("train", "evaluate", "predict", "explain", "serve", "export", "tour"),
    ],
}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imported(tree):
    """Dotted names of everything that a file imports: at its head, inside a function, or for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def own_imports(path):
    """The files of this project that one imports, as module names."""
    for name in imported(ast.parse(path.read_text())):
        module = name if name in MODULES else name.rpartition(".")[0]
        if module in MODULES:
            yield module


def floor_of(module):
    """The floor that a module's room stands on; None for what belongs to no room (a package's own face)."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return next((number for number, rooms in enumerate(FLOORS[package]) if room in rooms), None)


@each_file
def test_a_package_imports_only_what_its_wall_lets_through(path):
    package = path.relative_to(ROOT).parts[0]
    names = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert not MAY_NOT_IMPORT[package] & names


@each_file
def test_a_file_has_at_most_400_lines_and_says_what_it_is_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


def test_no_files_import_each_other_in_a_circle():
    graph = {module_name(path): {*own_imports(path)} - {module_name(path)} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_of_a_package_has_its_floor(package):
    modules = {module_name(path) for path in (ROOT / package).rglob("*.py")} - {package}
    assert {module for module in modules if floor_of(module) is None} == set(), "add its room to FLOORS"


@pytest.mark.parametrize("package", FLOORS)
def test_no_room_imports_from_a_floor_above_it(package):
    upward = [
        f"{module_name(path)} imports {other}"
        for path in (ROOT / package).rglob("*.py")
        for other in own_imports(path)
        if other.startswith(f"{package}.") and (floor_of(other) or 0) > (floor_of(module_name(path)) or 0)
    ]
    assert upward == []


def test_every_package_is_looked_at():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES) and len(FILES) > 30


def test_importing_clcr_loads_no_cluster_no_tracking_and_no_decoder_and_what_a_worker_trains_by_no_tracking():
    """Each worker would spend a second and more on MLflow and Matplotlib, each trial half a second on the latter."""
    code = """
import sys, clcr
print(*sorted({'ray', 'mlflow', 'decord', 'av', 'features', 'pipelines'} & {*sys.modules}))
import pipelines.training.workers
print(*sorted({'mlflow', 'matplotlib'} & {*sys.modules}))
import pipelines.train, tuning.sweep
print(*sorted({'matplotlib'} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "\n\n\n"), done.stdout + done.stderr
