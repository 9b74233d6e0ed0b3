"""A run in two processes: the numbers of one, and what becomes of it when one of them fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prodial_kernels.training import FinetuneConfig
from prodial_kernels.training.config import ConfigError
from support.distributed.run_cases import DROPOUT, FOUR_BITS
from support.tiny_run import run


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What a run computed, without times."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def written(folder: Path) -> list[bytes]:
    files = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
    return [(folder / file).read_bytes() for file in files]


def test_two_processes_compute_what_one_does(outcomes, place: Path, tmp_path: Path) -> None:
    """Bit for bit: two summands have one sum, in either order."""
    first, second = (process["returned"] for process in outcomes["plain"])
    one = run(place, tmp_path / "one", grad_accumulation=2)
    assert (first["processes"], one.processes) == (2, 1)
    assert numbers(place / "plain") == numbers(tmp_path / "one")
    assert written(place / "plain") == written(tmp_path / "one")
    assert first == second
    assert first["after"] == one.after
    assert first["agreement"] == vars(one.agreement)


def test_a_model_divided_among_the_processes(outcomes, place: Path) -> None:
    """Gathering weights changes none of their bits; the adapter is whole everywhere."""
    assert [process["returned"] for process in outcomes["sharded"]] == [12, 12]
    assert numbers(place / "sharded") == numbers(place / "plain")
    assert written(place / "sharded") == written(place / "plain")


def test_quantised_weights_are_divided_as_they_are_stored(
    outcomes, place: Path, tmp_path: Path
) -> None:
    assert [process.get("returned") for process in outcomes["sharded_in_four_bits"]] == [3, 3]
    run(place, tmp_path / "one", grad_accumulation=2, **FOUR_BITS)
    assert numbers(place / "four-bits") == numbers(tmp_path / "one")
    assert written(place / "four-bits") == written(tmp_path / "one")


def test_more_batches_are_summed_in_another_order(outcomes, place: Path, tmp_path: Path) -> None:
    """(a + b) + (c + d) for ((a + b) + c) + d: an ulp of fp32, 1.2e-7, here and there."""
    assert [process["returned"] for process in outcomes["accumulated"]] == [2, 2]
    run(place, tmp_path / "one", steps=6, grad_accumulation=4)
    folders = (place / "accumulated", tmp_path / "one")
    for ours, theirs in zip(*map(numbers, folders), strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-6)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in folders)
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 2e-6 * theirs[name].norm(), name


def test_a_stop_and_kills_change_nothing(outcomes, place: Path) -> None:
    """A signal to one process stops both after the same step; of a kill the other one hears."""
    assert [process["raised"] for process in outcomes["stopped"]] == ["Interrupted"] * 2
    assert outcomes["killed_first"][0] == {"ended": -9}
    assert outcomes["killed_first"][1]["raised"] == "PeerError"
    assert outcomes["killed_second"][1] == {"ended": -9}
    assert outcomes["killed_second"][0]["raised"] == "PeerError"
    for again in ("restarted", "resumed"):
        assert [process["returned"] for process in outcomes[again]] == [12, 12]
    assert numbers(place / "disturbed") == numbers(place / "undisturbed")
    assert written(place / "disturbed") == written(place / "undisturbed")


def test_a_kill_is_seen_where_no_connection_tells_of_it(outcomes) -> None:
    """As by a process that waits for its GPU, which waits for the other one's."""
    first, second = outcomes["waits_as_a_device_does"]
    assert second == {"ended": -9}
    assert first["raised"] == "PeerError"
    assert "without a word (process 1 of 2 is gone)" in first["message"]


def test_a_stop_during_an_evaluation(outcomes, place: Path) -> None:
    assert [process["raised"] for process in outcomes["stopped_in_evaluation"]] == [
        "Interrupted"
    ] * 2
    assert (place / "evaluating" / "run.json").exists()


def test_a_callback_of_the_first_process_ends_all(outcomes, place: Path) -> None:
    assert [process["returned"] for process in outcomes["ended_by_a_callback"]] == [
        {"steps": 3, "kept": 3}
    ] * 2
    assert {"kind": "stop", "step": 3} in numbers(place / "ended")


def test_one_process_goes_on_with_what_two_have_begun(
    outcomes, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "undisturbed", tmp_path / "copy")
    for name in ("results.json", "state/step-000012"):
        path = tmp_path / "copy" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(place, tmp_path / "copy", resume=True, progress=True, grad_accumulation=2, **DROPOUT)
    said = capsys.readouterr().err
    assert "the last bits may differ from here on: processes 1 (was 2)" in said
    assert "resuming after step 9 of 12" in said


@pytest.mark.parametrize(
    ("case", "failing", "error", "message"),
    [
        ("fails_while_loading", 1, "OSError", "OSError: [Errno 28] no space left: 'cache'"),
        ("fails_in_a_step", 0, "RuntimeError", "RuntimeError: the first process has had enough"),
    ],
)
def test_an_error_in_one_process_ends_both(outcomes, case, failing, error, message) -> None:
    processes = outcomes[case]
    assert processes[failing]["raised"] == error
    assert processes[1 - failing] == {
        "raised": "PeerError", "message": f"process {failing} of 2 failed: {message}"
    }  # fmt: skip


def test_processes_with_different_options(outcomes, place: Path) -> None:
    for process in outcomes["different"]:
        assert process["raised"] == "LaunchError"
        assert "processes 0 and 1 of 2 have different models, data or options" in process["message"]
    assert not (place / "different").exists()


def test_nothing_to_divide_among(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shard divides .* one by itself; start several with"):
        run(place, tmp_path / "one", shard=True)
    with pytest.raises(ConfigError, match=r"shard divides the frozen model, and .*; leave one"):
        FinetuneConfig(shard=True, method="full")
