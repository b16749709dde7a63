"""What the parts of the gate say."""

from __future__ import annotations

import pytest

from merge_adapter.verify.findings import fault


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the file '/home/ann/models/x/config.json' is broken", "the file 'config.json' is broken"),
        ("cannot open /tmp/job-7/merged: no such folder", "cannot open merged: no such folder"),
        ('File "/usr/lib/python3/x.py", line 3', 'File "x.py", line 3'),
        ("see https://huggingface.co/docs/transformers/x", "see https://huggingface.co/docs/transformers/x"),
        ("owner/name@abc/sub and q_proj/v_proj", "owner/name@abc/sub and q_proj/v_proj"),
        ("eos is '</s>', expected '[/INST]'", "eos is '</s>', expected '[/INST]'"),
        ("a ratio of 1/2/3 and /", "a ratio of 1/2/3 and /"),
    ],
)
def test_a_finding_names_no_place_of_this_machine(text: str, shown: str) -> None:
    """Libraries' errors carry whole paths; a report of a failed merge is published too."""
    assert str(fault("files", "", text)) == shown
