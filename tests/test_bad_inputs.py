"""A fifth of the cases of bad_inputs.py, drawn at random: some 5,000 in a minute."""

import bad_inputs


def test_every_bad_input_ends_in_one_line(tmp_path):
    rows = bad_inputs.table(tmp_path, 1 / 5)
    assert not [case for _, _, wrong in rows for case in wrong]
    assert sum(tried for _, tried, _ in rows) >= 2_000
