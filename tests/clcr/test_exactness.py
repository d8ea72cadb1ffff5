"""The claims of tests/benchmarks/exactness.py, each within its bound."""

import pytest
from benchmarks.exactness import CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.name for claim in CLAIMS])
def test_claim(claim):
    figure = claim.measure()
    assert claim.holds(figure), f"{claim.name}: {figure:g}, bound {claim.bound:g}"
