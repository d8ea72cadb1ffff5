"""What the documents say is true: commands parse, links lead somewhere, Python runs, README stays short and plain."""

import ast
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml

from infra import local_cluster
from pipelines.common.cli import option_types, parse

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/v1"
ROOMS = ("pipelines", "features", "clcr", "tuning", "infra", "tests/benchmarks")
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.md"))})
MODULES = ["features.store", "features.synthetic", "features.noise", "features.datasets", "infra.doctor"]
MODULES += [f"tests.benchmarks.{path.stem}" for path in sorted((ROOT / "tests/benchmarks").glob("[!_]*.py"))]
FOREIGN = {  # options of programs that are not ours, named in the text
    "--working-dir", "--address", "--head", "--follow", "--no-wait", "--num-cpus", "--nodes", "--gpus-per-node",
    "--config", "--print-config", "--help", "--no-deps", "--backend-store-uri", "--artifacts-destination",
    "--allowed-hosts", "--experiment-id",
}  # fmt: skip
BAD = {  # what words.md says not to write, and what to write instead
    r"\bgo(es|ing)? on where\b|\b(then|it|again|jobs?|command|runs?|training) goe?s? on\b|\bto go on\b|\bgone on\b":
        "resume",
    r"\bsurely\b": "significantly",
    r"\bbeside\b": "alongside, next to, compared with",
    r"\bmet by the job itself\b": "the job recovers",
    r"\bmend(s|ed)?\b": "fix",
    r"\bprocess that may die\b": "in its own process",
    r"\bare worth up to\b": "outperform by up to",
    r"\bby lot\b|\bwho babbles\b": "randomly sampled, random seed for",
    r"\bso-many-th\b": "every N steps",
    r"\bone face\b": "normalise missing values to null",
    r"older than \w+ changes of defaults": "a table that is not older than the code",
}  # fmt: skip


def relative(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    """The fenced blocks of a document, in its order, whose language is one of these; "" is none."""
    found = re.findall(r"^```(\S*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def without_blocks(path):
    """The text of a document, its fenced blocks left out."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(path):
    """Every command of a document's shell blocks as its words; continued lines are one, comments are left out."""
    for block in blocks(path, "", "bash", "sh", "shell"):
        for line in block.replace("\\\n", "").splitlines():
            line = re.sub(r"(^|\s)#.*$", "", line).strip()
            if re.search(r"(^|[\s/])(python|make|mlflow|ray)\s", line):
                yield from (shlex.split(part) for part in re.split(r"\s(?:&&|\||;)\s", line))


def job_of(script):
    """The config class that a job's script hands to `main`, and the script's own parser is `parse` of it."""
    tree = ast.parse((ROOT / script).read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "main" and len(n.args) > 1]
    assert calls, f"{script} is no job"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return getattr(module, ast.unparse(calls[0].args[1]))


def options_of(module):
    """What a module's command line hands to `tyro.cli`."""
    imported = importlib.import_module(module)
    if hasattr(imported, "__path__"):
        imported = importlib.import_module(f"{module}.__main__")
    tree = ast.parse(Path(imported.__file__).read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "tyro.cli"]
    return eval(ast.unparse(calls[0].args[0]), vars(imported)) if calls else None


def check(words):
    """Parse a command by its own parser. Raises, or exits, where it does not parse."""
    if "python" not in {Path(word).name for word in words}:
        if words[0] == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert all("=" in word or word in targets for word in words[1:]), words
        return
    at = next(number for number, word in enumerate(words) if Path(word).name == "python")
    program, arguments = words[at + 1], words[at + 2 :]
    if program == "-m" and arguments[0] == "infra.local_cluster":
        return check_local_cluster(arguments[1:])
    if program == "-m":
        if arguments[0] != "pytest" and (options := options_of(arguments[0])) is not None:
            tyro.cli(options, args=arguments[1:])
        return
    if "pipelines" in program or "tuning" in program:
        parse(job_of(program), [written(word) for word in arguments])


def check_local_cluster(arguments):
    """The command exists and takes these arguments, and what it submits parses."""
    calls = []
    stubs = {}
    for name, command in local_cluster.COMMANDS.items():
        stubs[name] = functools.wraps(command)(lambda *given, **named: calls.append(named))
    tyro.extras.subcommand_cli_from_dict(stubs, args=arguments)
    assert len(calls) == 1
    if "--" in arguments:
        check(arguments[arguments.index("--") + 1 :])


def written(word):
    """A YAML file that a command reads and another one writes: a sweep's best recipe, or its space, stands for it."""
    if Path(word).name == "space.yaml":
        return str(ROOT / "tests/helpers/space.yaml")
    if word.endswith(".yaml") and not (ROOT / word).exists():
        return str(GOLDEN / "best.yaml")
    return word


EVERY_COMMAND = [(path, words) for path in DOCUMENTS for words in commands(path)]


@pytest.mark.parametrize(
    ("path", "words"), EVERY_COMMAND, ids=[f"{relative(path)}-{' '.join(words)[:70]}" for path, words in EVERY_COMMAND]
)
def test_a_command_parses(path, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        check(words)
    except SystemExit as stop:
        assert stop.code in (0, None), capsys.readouterr().err


def scripts():
    """The jobs: what is executable in the rooms that hold them."""
    files = [path for room in ("pipelines", "tuning") for path in sorted((ROOT / room).glob("*.py"))]
    return [relative(path) for path in files if path.stat().st_mode & 0o100]


def test_every_job_is_in_a_command_of_a_document():
    shown = {word for _, words in EVERY_COMMAND for word in words}
    assert scripts() and set(scripts()) <= shown


@functools.cache
def known_options():
    """Every option of every job, and of every module that is run by `python -m`, with its switched-off form."""
    names = {name for script in scripts() for name, _ in option_types(job_of(script))}
    for module in MODULES:
        options = options_of(module)
        for part in getattr(options, "__args__", (options,)):  # of `Verify | Inspect` both
            names |= set(getattr(part, "__dataclass_fields__", ()))
    for command in local_cluster.COMMANDS.values():
        names |= set(inspect.signature(command).parameters)
    given = {f"--{name.replace('_', '-')}" for name in names}
    return given | {re.sub(r"(--(?:.*\.)?)", r"\1no-", option, count=1) for option in given} | FOREIGN


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_an_option_that_the_text_names_exists(path):
    code = " ".join(re.findall(r"`([^`]+)`", without_blocks(path)))
    named = {option.replace("_", "-") for option in re.findall(r"(?<!\S)--[a-z][\w.-]*", code)}
    assert not named - known_options()


def anchors(path):
    """The anchors of a document's headings, as GitHub makes them."""
    text = without_blocks(path)
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug, number = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"), 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def dead_links(path):
    """The relative links of a document that lead nowhere: no such file, or no such heading in it."""
    text = without_blocks(path)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield link


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_relative_links_and_anchors_resolve(path):
    assert not list(dead_links(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_fences_close_and_tables_have_as_many_cells_in_each_row(path):
    text = path.read_text()
    assert text.count("\n```") % 2 == 0
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in table.splitlines()}
        assert len(cells) == 1, table.splitlines()[0]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=relative)
def test_python_runs(path, tmp_path):
    """On the store and the run of version 1, as the commands above it would have left them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "store").symlink_to(GOLDEN / "store")
    (out / "clcr").symlink_to(GOLDEN / "run")
    program = tmp_path / "block.py"
    program.write_text("\n".join(blocks(path, "python")))
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_readme_is_short_and_every_room_has_one():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500
    for room in ROOMS:
        assert (ROOT / room / "README.md").exists()


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_the_words_are_plain(path):
    prose = re.sub(r"`[^`]*`", "", " ".join(without_blocks(path).split()))
    found = {match.group(): better for bad, better in BAD.items() if (match := re.search(bad, prose, re.IGNORECASE))}
    assert not found


def test_a_wrong_flag_and_a_dead_link_are_found(tmp_path, capsys):
    """The tests above would notice: they are tried on a document that lies."""
    document = tmp_path / "README.md"
    document.write_text(
        "# One\n\n[here](#one) [gone](gone.md) [nowhere](#two)\n\n```\n"
        "ray job submit --working-dir . -- env A=b \\\n  python pipelines/train.py --store s --out o --epoch 3\n"
        "python -m features.store inspect s --sheets s.png\nmake tea\n```\n"
    )
    assert list(dead_links(document)) == ["gone.md", "#two"]
    wrong_flag, wrong_option, wrong_target = commands(document)
    with pytest.raises(Exception, match="--epoch"):
        check(wrong_flag)
    with pytest.raises(SystemExit):
        check(wrong_option)
    with pytest.raises(AssertionError):
        check(wrong_target)


def test_the_papers_have_authors():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] and all(len(paper["authors"]) > 1 for paper in cited["references"])
