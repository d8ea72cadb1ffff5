"""The installed package: models and stores need its base dependencies alone, and a command says what it lacks.

What is tested here is a wheel, unpacked, without the libraries that the extras bring.
"""

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from infra import commands

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL"}  # where the package has another name


def module(requirement):
    """The name that a requirement of pyproject.toml is imported by."""
    package = re.split(r"[^\w-]", requirement)[0]
    return MODULES.get(package, package.replace("-", "_"))


BASE = {module(line) for line in PROJECT["dependencies"]}
# An environment without the extras: everything that is neither Python's, ours, nor needed by the base is not found.
BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
ABSENT = {module(line) for line in PROJECT["optional-dependencies"]["pipeline"]} - BASE - {"scipy"}

PACKAGES = ("clcr", "features", "pipelines", "tuning", "infra")
DATA = ("pipelines/presets/*.yaml", "pipelines/evaluation/*.j2", "pipelines/answering/*.html", "*/py.typed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what the wheel installs; built from a copy, so that no build folder is left here."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def bare(installed, code):
    """Run code on the wheel, where the extra [pipeline] is not installed (scipy stays: scikit-learn brings it)."""
    source = BARE.format(absent=ABSENT) + code
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=installed)


def test_a_wheel_holds_every_file_of_every_package(installed):
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files += [path for pattern in DATA for path in ROOT.glob(pattern)]
    assert [path for path in files if not (installed / path.relative_to(ROOT)).is_file()] == []


def test_a_wheel_asks_for_the_base_alone(installed):
    (folder,) = installed.glob("*.dist-info")
    requires = importlib.metadata.Distribution.at(folder).requires
    asked = {re.split(r"[^\w-]", line)[0] for line in requires if "extra ==" not in line}
    assert asked == {re.split(r"[^\w-]", line)[0] for line in PROJECT["dependencies"]}


def test_clcr_imports_nothing_beyond_the_base():
    third_party = set()
    for path in (ROOT / "clcr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            third_party |= {name.partition(".")[0] for name in names}
    third_party -= set(sys.stdlib_module_names) | {"clcr"}
    assert third_party - BASE == {"torchvision"}, "which one stem alone needs, and imports where it does"


def test_a_saved_model_answers_without_the_extra(installed):
    done = bare(
        installed,
        "import clcr, numpy as np\n"
        f"assert clcr.__file__ == {str(installed / 'clcr/__init__.py')!r}, clcr.__file__\n"
        f"model = clcr.load({str(ROOT / 'tests/golden/v1/models/clcr')!r})\n"
        "features = {m: np.zeros((8, *s.shape), s.dtype) for m, s in model.features.items()}\n"
        "print(list(model.predict([{'clip_id': 'a', 'features': features}])))\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[{'clip_id': 'a', ")


def test_a_store_is_read_without_the_extra(installed):
    code = "from features.store import Store\n"
    code += f"for sample in Store({str(ROOT / 'tests/golden/v1/store')!r}).samples(None): print(sample['clip_id'])\n"
    done = bare(installed, code)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["c/0.x", "c/1.x", "c/2.x", "c/3"]


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_every_command_is_a_job_and_says_what_it_lacks(command):
    module, _, name = PROJECT["scripts"][command].partition(":")
    assert module == commands.__name__ and command == f"clcr-{name}"
    assert importlib.util.find_spec(getattr(commands, name).args[0])


@pytest.mark.parametrize(("name", "extra"), [("extract", "pipeline"), ("train", "pipeline"), ("serve", "serve")])
def test_without_the_extra_a_command_names_it_in_one_line(installed, name, extra):
    done = bare(
        installed, f"import sys; sys.argv = ['clcr-{name}', '--help']\nfrom infra.commands import {name}; {name}()"
    )
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(rf"clcr-{name}: \w+ is not installed; pip install 'clcr-pipeline\[{extra}\]'\n", done.stderr)


def test_the_demo_of_a_wheel_submits_the_installed_commands_and_writes_here(installed, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    code += "from infra import demo; from infra.head import Head, job\n"
    code += "print(demo.OUT); print(*Head('URL', '', {}).submit_command(*job('tuning/sweep.py'))[1:])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"{tmp_path}/demo-out", "job submit --address URL -- clcr-sweep"], done.stderr


def test_a_command_is_its_job():
    code = "import sys; sys.argv = ['clcr-train', '--help']\nfrom infra.commands import train; train()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Train a model on a feature store." in done.stdout
