"""One side of a comparison: measures on request, over standard input and output."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from typing import Any

from benchmarks.cases import Case, draw, rotating_sets
from benchmarks.environment import cache_bytes
from benchmarks.gate import Gate, Refusal
from benchmarks.measure import start_afresh
from benchmarks.rivals import FLOOR, OURS, select
from benchmarks.rivals.layer import Step
from benchmarks.timing import Replay


def prepare(case: Case, device: str) -> dict[str, Replay]:
    """Check and record ProDiaL and the floor on one case."""
    start_afresh()
    gate = Gate(case, device)
    replays = {}
    for rival in select([OURS]):
        try:
            gate.check(rival)
        except Refusal as refusal:
            raise Refusal(f"{rival.name} on {case}: {refusal}") from None
        sets = range(rotating_sets(case, cache_bytes(device)))
        steps = [Step.on(draw(case, device, seed), rival.prepare).both for seed in sets]
        for step in steps:
            step()
        replays[rival.name] = Replay(steps, device)
    return replays


def sample(replays: dict[str, Replay]) -> dict[str, float]:
    """One figure for each variant; the first sample after waiting is not taken."""
    replays[FLOOR].sample()
    return {
        name: statistics.median(replay.sample() for _ in range(3))
        for name, replay in replays.items()
    }


def main() -> int:
    """Answer one line for each line, until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    device = parser.parse_args().device
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    replays: dict[str, Replay] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if request["do"] == "prepare":
                replays = {}
                gc.collect()
                replays = prepare(Case(**request["case"]), device)
            else:
                answer = sample(replays)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
