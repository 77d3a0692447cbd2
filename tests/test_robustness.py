"""A twentieth of tests/robustness.py; `make robustness` runs it whole."""

import robustness


def test_every_case_is_clean():
    for kind, tried, clean in robustness.table(0.05):
        assert clean == tried > 0, kind
