"""Command line of a feature store: `python -m features.store verify STORE` and `... inspect STORE`."""

import contextlib
import io
import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
import tyro

from features.errors import FeaturesError, StoreError, one_line
from features.store.inspect import inspect, make_console, make_table, number, print_report
from features.store.reader import Store
from features.store.sheet import contact_sheet, write_figure
from features.store.verify import Problem, Verdict, verify

StoreUri = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
INTERVAL = 5.0  # seconds between lines of progress


@dataclass(frozen=True)
class Verify:
    """Check a feature store: every part there, every clip's bytes as the index says, nothing besides."""

    store: StoreUri
    """feature store; path or URI"""
    fast: bool = False
    """parts, counts and sizes only: no byte of a tar is read"""
    show: int = 50
    """problems to print; all are counted"""
    threads: int = 8
    """shards that are read at once"""

    def run(self) -> int:
        """Print each problem and a summary; 1 where there is a problem."""
        _require_at_least("--show", self.show, 0)
        _require_at_least("--threads", self.threads, 1)
        store, started = Store(self.store), time.monotonic()
        shown: list[Problem] = []

        def report(problem: Problem) -> None:
            if len(shown) < self.show:
                shown.append(problem)
                print(problem, flush=True)

        verdict = verify(store, report, self.fast, self.threads, Progress())
        print_verdict(store, verdict, time.monotonic() - started, self.fast)
        if not verdict.problems:
            return 0
        hidden = verdict.problems - len(shown)
        print(f"{verdict.problems} problems" + (f", {hidden} of them not shown (--show)" if hidden else ""))
        print("a shard is made anew when its index part is deleted and the extract command is run again")
        return 1


@dataclass(frozen=True)
class Inspect:
    """Show what a feature store holds: splits, classes, modalities, durations, quality, failures; draw some clips."""

    store: StoreUri
    """feature store; path or URI"""
    json: bool = False
    """print JSON instead of tables"""
    sheet: str | None = None
    """PNG to write; path or URI: frames over log-mel of some clips"""
    clips: int = 6
    """clips on the sheet"""
    seed: int = 0
    """random seed for which clips the sheet shows"""
    split: str | None = None
    """split that the sheet's clips are of; none named = any"""

    def run(self) -> int:
        """Print the figures; draw the sheet if one is wanted."""
        _require_at_least("--clips", self.clips, 1)
        _require_at_least("--seed", self.seed, 0)
        if self.sheet is None and (self.clips, self.seed, self.split) != (6, 0, None):
            raise StoreError("--clips, --seed and --split choose what is drawn: name the picture with --sheet F.png")
        if self.sheet is not None and not self.sheet.partition("?")[0].lower().endswith(".png"):
            raise StoreError(f"--sheet {self.sheet}: the picture is a PNG, name it F.png")
        store = Store(self.store)
        report = inspect(store)
        if self.json:
            print(json.dumps(report, indent=2))
        else:
            print_report(report, make_console())
        if self.sheet is not None:
            write_figure(self.sheet, contact_sheet(store, self.clips, self.seed, self.split))
            print(f"{self.sheet} written", file=sys.stderr)
        return 0


class Progress:
    """Lines of progress on stderr, at most one every INTERVAL seconds."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()

    def __call__(self, verdict: Verdict) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        if now - self.last < INTERVAL:
            return
        self.last, took = now, now - self.started
        left = took / verdict.done * (verdict.shards - verdict.done)
        line = f"verify {verdict.done}/{verdict.shards} shards, {verdict.nbytes / took / 1e6:.0f} MB/s"
        print(f"{line}, {verdict.problems} problems, {left:.0f} s left", file=sys.stderr, flush=True)


def print_verdict(store: Store, verdict: Verdict, seconds: float, fast: bool) -> None:
    """Rows by split as planned and as found, and what was read."""
    table = make_table("", ["split"], ["planned", "indexed", "failed"])
    for split, planned in store.spec.splits.items():
        table.add_row(split, *map(number, (planned, verdict.indexed[split], verdict.failed[split])))
    make_console().print(table)
    rows, indexed, failed = store.spec.rows, sum(verdict.indexed.values()), sum(verdict.failed.values())
    sign = "=" if rows == indexed + failed else "!="
    read = "no tar was read (--fast)" if fast else f"{verdict.nbytes / 1e6:.1f} MB of samples read"
    print(f"{store.uri}: {rows} rows {sign} {indexed} indexed + {failed} failed")
    print(f"{verdict.shards} shards, {read}, {seconds:.1f} s; {'no problem' if not verdict.problems else 'damaged'}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a damaged store, 2 for a mistake in the arguments."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options = tyro.cli(Verify | Inspect, prog="python -m features.store", description=__doc__, args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            return 0
        return _fail(f"{_first_paragraph(errors.getvalue())} (--help lists every option)", 2)
    try:
        return options.run()
    except FeaturesError as error:
        return _fail(error, 1)
    except pa.ArrowException as error:
        return _fail(f"{options.store}: {one_line(error)}; `verify` names the parts that are damaged", 1)
    except OSError as error:  # storage that does not answer
        return _fail(f"{options.store}: {one_line(error)}", 1)
    except KeyboardInterrupt:
        return _fail("stopped by hand", 130)


def _require_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise StoreError(f"{option} {value}: must be {least} or more")


def _fail(error: object, code: int) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code


def _first_paragraph(box: str) -> str:
    """What tyro's framed message says between its title and the next rule; a plain terminal has - for the frame."""
    lines = [line.strip(" │╭╮╰╯|+") for line in box.splitlines()][1:]
    paragraphs = "\n".join("\0" if line and set(line) <= {"─", "-"} else line for line in lines).split("\0")
    return next((" ".join(text.split()) for text in paragraphs if text.strip()), "not understood")


if __name__ == "__main__":
    sys.exit(main())
