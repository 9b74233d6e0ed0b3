"""CI has no GPU: the record of the last run on a device must belong to these sources."""

from __future__ import annotations

import json

from benchmarks.gpu_tests import RECORD, source_hash


def test_the_record_belongs_to_the_kernels_as_they_are() -> None:
    record = json.loads(RECORD.read_text())
    if record["status"] == "pending":
        return  # and why, as below
    assert record["sources"] == source_hash(), (
        "files under prodial_kernels/{ops,kernels,models} changed after the last run on a GPU; "
        "run python -m benchmarks.gpu_tests on one, or record 'pending' and why"
    )


def test_the_record_says_what_passed_or_why_not() -> None:
    record = json.loads(RECORD.read_text())
    if record["status"] == "pending":
        assert len(record["reason"]) > 40
        return
    assert record["status"] == "passed"
    assert record["counts"]["failed"] == 0
    assert record["counts"]["passed"] > 0
    assert record["device"] != "none"
