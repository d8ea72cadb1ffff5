"""Continuous integration never passes because a test was left out."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
TESTS = """
import pytest

def test_left_out():
    pytest.skip("no time")

@pytest.mark.gpu
def test_on_a_gpu():
    pytest.skip("no GPU")

@pytest.mark.data
@pytest.mark.skipif(True, reason="no data")
def test_on_data():
    pass

@pytest.mark.xfail
def test_known_to_fail():
    assert False
"""


@pytest.fixture
def suite(pytester):
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    gpu: x\n    data: x\n")
    pytester.makepyfile(TESTS)
    return pytester


def test_under_ci_a_skip_is_a_failure_unless_it_needs_a_gpu_or_data(suite, monkeypatch):
    monkeypatch.setenv("CI", "true")
    result = suite.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, skipped=2, xfailed=1)
    result.stdout.fnmatch_lines(["*with CI=true a skip is a failure: *no time*"])


def test_under_ci_a_module_that_skips_itself_is_an_error(suite, monkeypatch):
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(test_other="import pytest\npytest.importorskip('no_such_module')")
    result = suite.runpytest_inprocess("-p", "no:cacheprovider", "test_other.py")
    result.assert_outcomes(errors=1)


def test_elsewhere_a_skip_is_a_skip(suite, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    suite.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(skipped=3, xfailed=1)
