"""What every job does before and around its story: options, YAML, one-line errors, progress.

Options come from typed dataclasses (tyro). A YAML file given by `--config` holds the same options by their dotted
names. Of several files the later ones win, and what stands on the command line wins over all. `--print-config` prints
what comes of it as such a file.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from features.files import require_reachable
from pipelines.common.compat import joined_docstrings, run_exit_functions
from pipelines.common.errors import JobError, explain_storage, fail, find_user_error, is_user_error
from pipelines.common.hints import hint, one_line
from pipelines.common.primitives import REGISTRY
from pipelines.common.quiet import quieten

Config = TypeVar("Config")


PRESETS = Path(__file__).parents[1] / "presets"
PRINT = "--print-config"
FILES = (
    "--config FILE reads options from a YAML file, or from a preset by its name; of several, later ones win, and the "
    "command line wins over all. --print-config prints all options as such a file, and ends."
)


def main(job: Callable[[Any], None], config_class: type, description: str) -> NoReturn:
    """What a job's script does: run it and end the process.

    A thread of Ray's outlives its shutdown, and now and then it crashes while Python takes itself apart: a job that has
    done its work would end with SIGSEGV. So the process ends after what was registered for its exit.
    """
    restore = quieten()
    code = 1
    try:
        code = run_job(job, config_class, description)
    except SystemExit as stop:  # --help
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        run_exit_functions()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # whoever read our lines has gone
            stream.flush()
    restore()
    os._exit(code)


def run_job(job: Callable[[Any], None], config_class: type, description: str) -> int:
    """Parse the options and run the job; its exit code. Mistakes in the input end in one line and 1 or 2."""
    try:
        config: Any = parse(config_class, sys.argv[1:], description)
    except BrokenPipeError:  # `--help | head`; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not is_user_error(error):
            raise
        return fail(error, 2)
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        take_signals()
        for value in flatten(config).values():
            if isinstance(value, str):
                require_reachable(value)
        job(config)
    except KeyboardInterrupt:
        number = _received.pop() if _received else signal.SIGINT
        return fail(f"stopped by {signal.Signals(number).name}; run the same command again to resume", 128 + number)
    except Exception as error:
        known = find_user_error(error) or explain_storage(error)
        if known is None:
            raise
        return fail(known, 1)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)
    return 0


SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []  # signals; within a call of Ray's what a handler raises becomes a plain KeyboardInterrupt


def take_signals() -> None:
    """Let SIGTERM, which scancel, `ray job stop` and Kubernetes send, end the job as Ctrl-C does.

    Ray takes the signal for itself when it starts: call it again then.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, frame: object) -> None:
        for each in SIGNALS:  # the end is under way: a second signal would cut it short
            signal.signal(each, signal.SIG_IGN)
        _received.append(number)
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, stop)


def parse(config_class: type[Config], args: Sequence[str], description: str = "") -> Config:
    """Options to a config. Raises JobError naming the option; `--help` and `--print-config` print and exit 0."""
    given = [arg for arg in args if arg != PRINT]
    options = _with_todays_names(config_class, _with_config_files(config_class, given))
    errors = io.StringIO()
    try:
        with REGISTRY, joined_docstrings(), contextlib.redirect_stderr(errors):
            about = f"{description} {FILES}" if description else ""
            config = tyro.cli(config_class, args=options, description=about, prog=Path(sys.argv[0]).name)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise JobError(one_line(errors.getvalue(), [name for name, _ in option_types(config_class)])) from None
    if len(given) < len(args):
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def flatten(config: Any) -> dict[str, Any]:
    """A config as dotted option names and values: what `--config` reads and MLflow shows."""
    flat: dict[str, Any] = {}
    for name, field in _named_fields(type(config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{name}.{k}" if name else k: v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def override(config: Config, options: Mapping[str, Any]) -> Config:
    """The config with some options changed, by dotted name. Raises JobError for an unknown name or a wrong value."""
    if unknown := sorted(options.keys() - flatten(config).keys()):
        raise JobError(f"no option {unknown[0]}{hint(unknown[0], flatten(config))}")
    changes = {}
    for name, field in _named_fields(type(config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):  # first: an option may share its name with a group, as --model does
            prefix = f"{name}." if name else ""
            inside = {f"{prefix}{k}" for k in flatten(value)} & options.keys()
            changes[field.name] = override(value, {k.removeprefix(prefix): options[k] for k in inside})
        elif name in options:
            changes[field.name] = options[name]
    instance: Any = config
    return dataclasses.replace(instance, **changes)


def require_at_least(config: Any, least: Mapping[str, float]) -> None:
    """Raise JobError for the first option that is below its least value, or not finite; least: by field name."""
    for name, value in least.items():
        given = getattr(config, name)
        if not (given >= value and math.isfinite(given)):
            what = f"{value:g} or more" if math.isfinite(given) else "a finite number"
            raise JobError(f"--{name.replace('_', '-')} {given}: must be {what}")


def to_yaml(config: Any) -> str:
    """The options of a config by dotted name, as `--config` takes them; options left empty are left out.

    `version` says which version's defaults they leave out (`clcr.versions`).
    """
    from clcr.versions import VERSION

    plain: dict[str, Any] = {"version": VERSION} if any(name == "loss.standardise" for name in flatten(config)) else {}
    plain |= {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in flatten(config).items()}
    return yaml.safe_dump({k: v for k, v in plain.items() if v not in (None, "")}, sort_keys=False)


def submitted() -> bool:
    """True inside a job that came by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def submission_id() -> str:
    """The id by which `ray job logs` and `ray job stop` know this job; "" where it was not submitted."""
    try:
        return json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, TypeError, ValueError):
        return ""


def resolve_uri(option: str, uri: str) -> str:
    """An absolute path or a URI. Raises JobError for a relative path inside a submitted job."""
    uri = uri if "://" in uri else os.path.expanduser(uri)
    if "://" in uri or os.path.isabs(uri):
        return uri
    if submitted():
        raise JobError(
            f"{option} {uri}: a submitted job runs in a copy of the uploaded folder, where a relative path means "
            "another place; give an absolute path or a URI such as s3://bucket/folder"
        )
    return os.path.abspath(uri)


class Progress:
    """Lines of progress with rate and time left, at most one every `interval` seconds: readable in a job's log."""

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "clips", interval: float = 5.0) -> None:
        self.what, self.total, self.done, self.unit, self.interval = what, total, done, unit, interval
        self._first, self._start, self._last = done, time.monotonic(), 0.0

    def update(self, amount: int, note: str = "") -> None:
        """Count `amount` more as done."""
        self.done += amount
        now = time.monotonic()
        if now - self._last < self.interval and self.done < self.total:
            return
        self._last = now
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        line = f"{self.what} {self.done}/{self.total} {self.unit}"
        if rate:
            speed = f"{rate:.1f}/s" if rate >= 0.1 else f"{60 * rate:.1f}/min"
            line += f", {speed}, {(self.total - self.done) / rate:.0f} s left"
        print(f"{line}, {note}" if note else line, flush=True)


def _with_config_files(config_class: type, args: Sequence[str]) -> list[str]:
    """Replace every `--config FILE` by the options it holds, put first in the order of the files."""
    options: list[str] = []
    rest, words = [], iter(args)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            options += _yaml_options(config_class, word.partition("=")[2] or next(words, ""))
        else:
            rest.append(word)
    return options + rest


def _with_todays_names(config_class: type, args: list[str]) -> list[str]:
    """Options of old names (`clcr.versions`) by the names that they have today."""
    from clcr.versions import RENAMED

    known = {name for name, _ in option_types(config_class)}
    today = {f"--{_hyphened(old)}": f"--{_hyphened(new)}" for old, new in RENAMED.items() if new in known}
    options = [arg.partition("=") for arg in args]
    return [today.get(_hyphened(option), option) + sign + value for option, sign, value in options]


def _hyphened(name: str) -> str:
    return name.replace("_", "-")


def _yaml_options(config_class: type, path: str) -> Iterator[str]:
    if not path:
        raise JobError("--config: name a YAML file of options")
    presets = {file.stem: file for file in PRESETS.glob("*.yaml")}
    file = Path(path) if Path(path).is_file() else presets.get(path, Path(path))
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        what = f"give a YAML file of options, or one of the presets {', '.join(sorted(presets))}"
        raise JobError(f"--config {path}: {error.strerror}; {what}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise JobError(f"--config {path}: expected `option: value` lines")
    known = {_hyphened(name): kind for name, kind in option_types(config_class)}
    for name, value in _migrated(dict(_dotted(tree)), known, path).items():
        option = _hyphened(name)
        if option not in known:
            raise JobError(f"--config {path}: unknown option {name}{hint(option, known)}")
        if known[option] is bool and not isinstance(value, bool):
            raise JobError(f"--config {path}: {name} is true or false, not {value!r}")
        if known[option] is bool:
            yield f"--{option}" if value else _negated(option)
        elif value is not None:
            yield f"--{option}={','.join(map(str, value)) if isinstance(value, list) else value}"


def _migrated(options: dict[str, Any], known: Collection[str], path: str) -> dict[str, Any]:
    """Options of a file by dotted name, as the version that wrote it meant them; without the version itself."""
    from clcr.versions import VERSION, later_options, renamed, version_of

    version = version_of(options)
    if version > VERSION:
        raise JobError(f"--config {path} was written by a later version ({version}, this one is {VERSION}): update")
    later = {name: value for name, value in later_options(version).items() if _hyphened(name) in known}
    return {**later, **{name: value for name, value in renamed(options).items() if name != "version"}}


def _negated(option: str) -> str:
    head, _, last = option.rpartition(".")
    return f"--{head}.no-{last}" if head else f"--no-{last}"


def option_types(config_class: type) -> Iterator[tuple[str, Any]]:
    """Every option's name, in files and on the command line, and its type; an option of two names comes twice."""
    hints = typing.get_type_hints(config_class)
    for name, field in _named_fields(config_class):
        kind = hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from ((f"{name}.{k}" if name else k, v) for k, v in option_types(kind))
        else:
            yield name, kind
            yield from ((other, kind) for other in _argument(config_class, field, "name") if other != name)


def _named_fields(config_class: type) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Fields with their names in files and MLflow; "" = no prefix.

    It is the name that `tyro.conf.arg` gives, or its alias where it has one: an option that was renamed keeps its first
    name in files, so that old ones are read.
    """
    for field in dataclasses.fields(config_class):
        names = _argument(config_class, field, "aliases") or _argument(config_class, field, "name")
        yield (names[0] if names else field.name), field


def _argument(config_class: type, field: dataclasses.Field[Any], what: str) -> list[str]:
    """Names, or aliases, that `tyro.conf.arg` gives a field."""
    kind = _hints(config_class)[field.name]
    given = [getattr(extra, what, None) for extra in getattr(kind, "__metadata__", ())]
    names = [[value] if isinstance(value, str) else list(value) for value in given if value is not None]
    return [name.lstrip("-") for group in names for name in group]


@functools.cache
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class, include_extras=True)


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
