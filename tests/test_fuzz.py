"""A sample of `python -m benchmarks.robustness.fuzz`: hostile input is refused, and nothing else happens."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.robustness.fuzz import KINDS, Fuzz, quiet

CASES = {"ranking": 1200, "data": 400, "adapter weights": 200, "adapter configuration": 150, "command line": 80}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(fuzz, kind):
    @settings(
        max_examples=CASES.get(kind, 40),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        fuzz.case(kind, seed)

    with quiet():
        run()
