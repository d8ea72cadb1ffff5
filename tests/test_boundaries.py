"""The house's walls: who may import whom, and how large a room may be."""

import ast
import subprocess
import sys
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

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(tree):
    """Top-level names of everything that a file imports, at its head or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value.split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant))


@each_file
def test_a_package_imports_only_what_its_wall_lets_through(path):
    package = path.relative_to(ROOT).parts[0]
    assert not MAY_NOT_IMPORT[package] & set(imported(ast.parse(path.read_text())))


@each_file
def test_a_file_has_at_most_400_lines_and_says_what_it_is_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


def test_every_package_is_looked_at():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES) and len(FILES) > 30


def test_importing_clcr_loads_no_cluster_no_tracking_and_no_decoder():
    code = (
        "import sys, clcr; print(*sorted({'ray', 'mlflow', 'decord', 'av', 'features', 'pipelines'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
