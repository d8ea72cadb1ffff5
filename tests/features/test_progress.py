"""Progress on a screen is one line that is rewritten; in a log it is a few whole lines."""

import io
import sys

import pytest

from features import progress


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Screen, io.StringIO])
def test_clips_pass_and_are_counted(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress.counted("abc", 3)) == ["a", "b", "c"]
    said = sys.stderr.getvalue()
    assert said.count("3/3 clips") == 1 and said.endswith("\n")
    assert ("\r" in said) == (stream is Screen)


def test_a_log_has_no_line_per_twenty_clips(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    list(progress.counted(range(200), 200))
    assert sys.stderr.getvalue().count("\n") == 1


def test_a_shorter_line_leaves_nothing_of_a_longer_one(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen())
    list(progress.counted(range(40), 40))
    first, second = sys.stderr.getvalue().strip("\r\n").split("\r")
    assert len(first) == len(second)
