"""``metrics.jsonl`` across an interruption: no line twice, no line that is not JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from prodial_kernels.training.run.metrics import MetricsLog, read_metrics


def _fill(path: Path) -> None:
    log = MetricsLog(path, step=0)
    log.write({"kind": "evaluation", "step": 0, "loss": 3.0})
    for step in range(1, 6):
        log.write({"kind": "train", "step": step, "loss": 3.0 - step / 10})
        if step % 2 == 0:
            log.write({"kind": "evaluation", "step": step, "loss": 2.5})
    log.close()


def test_resuming_removes_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _fill(path)
    with path.open("a") as stream:
        stream.write('{"kind": "train", "step": 6, "lo')
    log = MetricsLog(path, step=4)
    log.write({"kind": "evaluation", "step": 4, "loss": 2.4})
    log.close()
    found = [(r["kind"], r["step"]) for r in map(json.loads, path.read_text().splitlines())]
    assert found == [
        ("evaluation", 0),
        ("train", 1),
        ("train", 2),
        ("evaluation", 2),
        ("train", 3),
        ("train", 4),
        ("evaluation", 4),
    ]


def test_each_line_is_there_before_the_next_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    log.write({"kind": "train", "step": 1, "loss": 0.1})
    assert read_metrics(log.path) == [{"kind": "train", "step": 1, "loss": 0.1}]
    log.close()


def test_a_loss_survives_exactly_and_infinity_is_valid_json(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    log.write({"kind": "train", "step": 1, "loss": loss, "perplexity": math.inf})
    log.close()
    assert read_metrics(log.path) == [
        {"kind": "train", "step": 1, "loss": loss, "perplexity": None}
    ]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    log._stream.close()
    with Path("/dev/full").open("a") as log._stream:
        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
            log.write({"kind": "train", "step": 1})
        log.close()


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000, "[]", "7", "null", '{"step": 3}', '{"kind": "train", "loss": 1.0}',
        '{"kind": "other", "step": 3}', '{"kind": "train", "step": 3}', "\x00\x00",
        '{"kind": "train", "step": true, "loss": 1.0}', '{"kind": "train", "step": -1, "loss": 1}',
        '{"kind": "train", "step": "3", "loss": 1.0}', '{"kind": "train", "step": 3, "loss": "x"}',
        '{"kind": "evaluation", "step": 3, "acc": [1]}', '{"kind": ["train"], "step": 3}',
    ],
    ids=lambda line: line[:44],
)  # fmt: skip
def test_lines_that_are_no_records_are_counted_and_dropped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    _fill(path)
    before = read_metrics(path)
    path.write_text(f"{line}\n" + path.read_text() + '{"unfinished')
    assert read_metrics(path) == before
    log = MetricsLog(path, step=9)
    log.close()
    assert log.dropped == 1
    assert read_metrics(path) == before


def test_a_file_that_is_replaced_or_never_ends_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    path.rename(tmp_path / "moved")
    path.touch()
    with pytest.raises(OSError, match=r"was replaced.*metrics\.jsonl"):
        log.write({"kind": "train", "step": 1, "loss": 1.0})
    log.close()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"not a regular file.*metrics\.jsonl"):
        read_metrics(path)
