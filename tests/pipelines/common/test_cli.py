"""Options from the command line and from YAML: typed, overridable, and a mistake is one line that names the culprit."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Annotated, Literal

import pytest
import tyro
import yaml

from features.errors import StoreError
from pipelines.common.cli import (
    PRESETS,
    JobError,
    Progress,
    find_user_error,
    flatten,
    override,
    parse,
    resolve_uri,
    run_job,
    to_yaml,
)
from pipelines.train import TrainConfig

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Frames:
    """Nested options."""

    fps: float = 12.5
    """frames per second"""
    crop: tuple[float, float] | Literal["face"] | None = None
    """left, right"""
    mirror: bool = True
    """both ways round"""

    def __post_init__(self):
        if self.fps <= 0:
            raise JobError(f"--frames.fps {self.fps}: must be above 0")


@dataclass(frozen=True)
class Shared:
    """Options without a prefix; one shares its name with a group."""

    kind: Annotated[Literal["big", "small"], tyro.conf.arg(name="frames")] = "big"
    """which"""
    learning_rate: float = 0.1
    """step"""


@dataclass(frozen=True)
class Options:
    """A job's options."""

    store: str
    """where"""
    tasks: tuple[str, ...] = ()
    """what"""
    workers: int = 1
    """how many"""
    dry_run: bool = False
    """only look"""
    shared: Annotated[Shared, tyro.conf.arg(name="")] = field(default_factory=Shared)
    frames: Frames = field(default_factory=Frames)


def config_file(folder, text):
    (folder / "job.yaml").write_text(text)
    return f"--config={folder / 'job.yaml'}"


def test_options_come_from_the_command_line():
    options = parse(
        Options, ["--store", "s", "--tasks", "a,b", "--frames.crop", ".25,.5", "--frames", "small", "--dry-run"]
    )
    assert options == Options("s", ("a", "b"), 1, True, Shared("small"), Frames(crop=(0.25, 0.5)))


def test_a_word_may_stand_in_the_place_of_a_tuple(tmp_path):
    options = parse(Options, ["--store", "s", "--frames.crop", "face"])
    assert options.frames.crop == "face"
    assert parse(Options, [config_file(tmp_path, "store: s\nframes: {crop: face}\n")]) == options
    assert parse(Options, ["--store", "s", "--frames.crop", "none"]).frames.crop is None


@pytest.mark.parametrize("option", ["--learning-rate", "--learning_rate"])
def test_hyphens_and_underscores_are_the_same(option):
    assert parse(Options, ["--store", "s", option, "0.5"]).shared.learning_rate == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "store: s\ntasks: [a, b]\nframes: {fps: 5, crop: [0.25, 0.5], mirror: false}\nlearning_rate: 1e-3\n",
        "store: s\ntasks: a,b\nframes.fps: 5\nframes.crop: 0.25,0.5\nframes.mirror: false\nlearning-rate: 0.001\n",
    ],
    ids=["nested", "dotted"],
)
def test_a_yaml_file_holds_the_same_options(tmp_path, text):
    expected = Options("s", ("a", "b"), shared=Shared(learning_rate=1e-3), frames=Frames(5.0, (0.25, 0.5), False))
    assert parse(Options, [config_file(tmp_path, text)]) == expected
    assert parse(Options, ["--config", config_file(tmp_path, text).partition("=")[2]]) == expected


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path):
    file = config_file(tmp_path, "store: s\nworkers: 2\ndry_run: true\nframes.fps: 5\n")
    for args in ([file, "--workers", "3", "--no-dry-run"], ["--workers", "3", "--no-dry-run", file]):
        options = parse(Options, args)
        assert (options.workers, options.dry_run, options.frames.fps) == (3, False, 5)


def test_of_several_files_the_later_ones_win_and_the_command_line_over_all(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("store: s\nworkers: 2\ndry_run: true\nframes.fps: 5\n")
    second.write_text("workers: 3\ndry_run: false\nframes: {fps: 7}\n")
    both = parse(Options, ["--workers=4", "--config", str(first), f"--config={second}"])
    assert (both.store, both.workers, both.dry_run, both.frames.fps) == ("s", 4, False, 7)
    other = parse(Options, ["--config", str(second), "--config", str(first)])
    assert (other.workers, other.dry_run, other.frames.fps) == (2, True, 5)


def test_print_config_prints_what_gives_the_same_options_and_runs_nothing(tmp_path, capsys):
    args = ["--store", "s", "--workers=4", config_file(tmp_path, "frames.fps: 5\n")]
    with pytest.raises(SystemExit) as stop:
        parse(Options, [*args, "--print-config"])
    assert stop.value.code == 0
    assert parse(Options, [config_file(tmp_path, capsys.readouterr().out)]) == Options(
        "s", workers=4, frames=Frames(5.0)
    )


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        (["--store", "s", "--worker", "2"], r"--worker.* did you mean --workers\?"),
        (["--store", "s", "--frames.fsp", "2"], r"--frames\.fsp.* did you mean --frames\.fps\?"),
        (["--store", "s", "--workers", "two"], r"--workers.*'two'"),
        (["--store", "s", "--frames", "huge"], r"'huge'.*--frames.*'big', 'small'"),
        (["--store", "s", "--frames.crop", "1,2,3"], r"--frames\.crop.*2 values"),
        (["--store", "s", "--frames.crop", "1,x"], r"--frames\.crop.*'x'"),
        (["--store", "s", "--frames.crop", "nose"], r"--frames\.crop.*'nose'"),
        (["--store", "s", "--frames.fps", "-1"], r"--frames\.fps -1\.0: must be above 0"),
        (["--store", "s", "stray"], "stray"),
        (["--store"], "--store"),
        ([], "missing option --store"),
        (["--store", "s", "--config"], "--config: name a YAML file"),
        (["--store", "s", "--config", "no.yaml"], r"no\.yaml: No such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(args, culprit):
    with pytest.raises(JobError, match=culprit) as error:
        parse(Options, args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("store: s\nworker: 2\n", r"job\.yaml: unknown option worker; did you mean workers\?"),
        ("store: s\nframes: {fsp: 2}\n", r"unknown option frames\.fsp; did you mean frames\.fps\?"),
        ("store: s\nworkers: two\n", "--workers.*'two'"),
        ("store: s\ndry_run: 3\n", "dry_run is true or false, not 3"),
        ("- store\n", "expected `option: value` lines"),
        ("store: [\n", "not YAML"),
        ("workers: 2\n", "missing option --store"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, text, culprit):
    monkeypatch.setattr(sys, "argv", ["job.py", config_file(tmp_path, text)])
    assert run_job(lambda options: None, Options, "A job.") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    with pytest.raises(JobError, match=culprit):
        parse(Options, sys.argv[1:])


def test_a_config_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"PAR1\x89\xff")
    with pytest.raises(JobError, match=r"job\.yaml: not YAML"):
        parse(Options, ["--config", str(tmp_path / "job.yaml")])


def test_help_into_a_closed_pipe_ends_without_a_word():
    job = subprocess.Popen([sys.executable, "pipelines/train.py", "--help"], cwd=ROOT, stdout=PIPE, stderr=PIPE)
    job.stdout.close()
    assert job.stderr.read() == b"" and job.wait() == 1


def test_help_names_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], "A job.")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("A job.", "--store", "--frames.fps", "frames per second", "12.5", "--learning-rate", "--dry-run"):
        assert words in text


OPTIONS = Options("s", ("a", "b"), 3, True, Shared("small", 1e-5), Frames(5.0, (0.25, 0.5), False))


def test_a_config_written_as_yaml_is_read_back_the_same(tmp_path):
    assert parse(Options, [config_file(tmp_path, to_yaml(OPTIONS))]) == OPTIONS
    assert parse(Options, [config_file(tmp_path, to_yaml(Options("s")))]) == Options("s")
    assert yaml.safe_load(to_yaml(OPTIONS))["frames"] == "small"


def test_flatten_and_override_are_inverse():
    flat = flatten(OPTIONS)
    assert flat["frames"] == "small" and flat["frames.fps"] == 5.0 and flat["learning_rate"] == 1e-5
    assert override(Options("other"), flat) == OPTIONS
    assert override(OPTIONS, {}) == OPTIONS


def test_override_changes_the_named_options_alone():
    changed = override(OPTIONS, {"frames": "big", "frames.fps": 7.0, "workers": 9})
    assert flatten(changed) == {**flatten(OPTIONS), "frames": "big", "frames.fps": 7.0, "workers": 9}


@pytest.mark.parametrize(
    ("options", "culprit"),
    [({"frames.fsp": 1.0}, "frames.fsp; did you mean frames.fps?"), ({"frames.fps": -1.0}, "fps")],
)
def test_override_refuses_what_is_not_an_option(options, culprit):
    with pytest.raises(JobError) as error:
        override(OPTIONS, options)
    assert culprit in str(error.value)


def test_a_relative_path_is_refused_in_a_submitted_job_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert resolve_uri("--store", "out/store") == str(tmp_path / "out/store")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for uri in ("/data/store", "s3://bucket/store"):
        assert resolve_uri("--store", uri) == uri
    assert resolve_uri("--store", "~/store") == "/home/me/store"
    with pytest.raises(JobError, match=r"--store out/store: a submitted job runs in a copy .*absolute path or a URI"):
        resolve_uri("--store", "out/store")


def raise_wrapped(error):
    try:
        raise error
    except Exception as cause:
        raise RuntimeError("a worker failed") from cause


@pytest.mark.parametrize(
    ("raised", "code"), [(StoreError("locked\nby another"), 1), (JobError("too many"), 1), (KeyboardInterrupt(), 130)]
)
def test_what_a_person_can_act_on_is_one_line_and_an_exit_code(monkeypatch, capsys, raised, code):
    monkeypatch.setattr(sys, "argv", ["job.py", "--store", "s"])

    def job(options):
        raise_wrapped(raised) if code == 1 else (_ for _ in ()).throw(raised)

    assert run_job(job, Options, "A job.") == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_storage_that_lets_nobody_in_is_one_line_with_advice_and_a_bug_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job.py", "--store", "s"])

    def job(message):
        def fail(options):
            raise OSError(message)

        return fail

    denied = "When getting information for key 'a' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation"
    assert run_job(job(denied), Options, "A job.") == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {denied}: access is denied; check the credentials") and printed.count("\n") == 1
    with pytest.raises(OSError, match="a bug"):
        run_job(job("a bug"), Options, "A job.")


JOB = """
import atexit, sys, threading, time
from pipelines.common.cli import main
from pipelines.common.errors import JobError
from tests.pipelines.common.test_cli import Options

class Late:
    def __del__(self):
        print("the interpreter was taken apart")

late = Late()
sys.argv = ["job.py", "--store", "s"]

def job(options):
    atexit.register(print, "what was registered")
    threading.Thread(target=time.sleep, args=[600]).start()
    print("no line's end", end=" ")
    if %r:
        raise JobError("a reason")

main(job, Options, "A job.")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_ends_its_process_after_what_was_registered_and_before_python_takes_itself_apart(fails):
    done = subprocess.run([sys.executable, "-c", JOB % fails], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "no line's end what was registered\n"
    assert (done.returncode, done.stderr) == ((1, "error: a reason\n") if fails else (0, ""))


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job.py", "--store", "s"])
    with pytest.raises(ZeroDivisionError):
        run_job(lambda options: 1 / 0, Options, "A job.")
    assert find_user_error(ZeroDivisionError()) is None


def test_progress_says_how_much_how_fast_and_always_the_end(capsys):
    progress = Progress("extract", total=10, done=4, interval=1000)
    for _ in range(6):
        progress.update(1, "0 failed")
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("extract 5/10 clips, ") and last.startswith("extract 10/10 clips, ")
    assert last.endswith("/s, 0 s left, 0 failed")


def test_a_preset_is_named_without_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--store", "s", "--out", "o"]
    (tmp_path / "mosi").mkdir()
    assert parse(TrainConfig, ["--config", "mosi", *given]) == parse(
        TrainConfig, ["--config", str(PRESETS / "mosi.yaml"), *given]
    )
    preset = parse(TrainConfig, ["--config", "grid", *given])
    assert preset == parse(TrainConfig, ["--config", str(PRESETS / "grid.yaml"), *given])
    (tmp_path / "grid").write_text("epochs: 3\n")
    assert flatten(parse(TrainConfig, ["--config", "grid", *given]))["epochs"] == 3, "a file of that name comes first"
    with pytest.raises(JobError, match=r"gird: No such file.*presets ave, .*grid"):
        parse(TrainConfig, ["--config", "gird", *given])


@pytest.mark.parametrize(("word", "motion"), [("yes", True), ("False", False), ("default", None), ("None", None)])
def test_a_switch_may_be_left_to_the_job(word, motion):
    given = parse(TrainConfig, ["--store", "s", "--out", "o", "--stem.motion", word])
    assert flatten(given)["stem.motion"] is motion


def test_a_switch_that_is_neither_says_what_it_may_be():
    with pytest.raises(JobError, match=r"--stem\.motion: expected default, yes or no, got 'perhaps'"):
        parse(TrainConfig, ["--store", "s", "--out", "o", "--stem.motion", "perhaps"])
