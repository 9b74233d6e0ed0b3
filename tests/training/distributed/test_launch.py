"""Which process of a run this is, by what launchers set; and what one by itself says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prodial_kernels.cli import commands
from prodial_kernels.training.distributed import world
from prodial_kernels.training.distributed.gradients import GradientSum
from prodial_kernels.training.distributed.launch import Launch, LaunchError, tell_launcher
from prodial_kernels.training.distributed.world import ONE_PROCESS, PeerError, World
from prodial_kernels.training.run.signals import StopSignals

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500",
}  # fmt: skip


def test_what_launchers_set() -> None:
    assert Launch.from_environment(TORCHRUN) == Launch(3, 4, 1)
    assert not Launch.from_environment(TORCHRUN).main
    again = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}
    assert Launch.from_environment(again).restarts == 2


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_part_of_it_is_for_other_programs(missing: str) -> None:
    """As accelerate sets a port alone, and some schedulers a size."""
    assert Launch.from_environment({k: v for k, v in TORCHRUN.items() if k != missing}) == Launch()


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "one"}, {"LOCAL_RANK": "-1"}])
def test_values_that_cannot_be(wrong: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"the environment says RANK=.*which cannot be"):
        Launch.from_environment({**TORCHRUN, **wrong})


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(LaunchError, match=r"process 3 is number 1 .* which has 1 GPU: start one"),
        world.joined(Launch(3, 4, 1), torch.device("cuda")),
    ):
        pass


def test_torchruns_summary_holds_the_error(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    tell_launcher("no such file", {"TORCHELASTIC_ERROR_FILE": str(file)})
    assert json.loads(file.read_text())["message"] == "no such file"
    tell_launcher("no such file", {})
    tell_launcher("no such file", {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "no" / "folder")})


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_the_first_repeats_what_another_has_said(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> int:
        raise PeerError("process 2 of 4 failed: no such file")

    monkeypatch.setenv("RANK", rank)
    command = commands.COMMANDS["finetune"]._replace(run=fails)
    monkeypatch.setitem(commands.COMMANDS, "finetune", command)
    assert commands.main(["finetune"]) == 1
    assert capsys.readouterr().err.count("process 2 of 4 failed") == lines


def test_one_process_waits_for_nobody() -> None:
    assert ONE_PROCESS.gather({"a": 1}) == [{"a": 1}]
    assert ONE_PROCESS.from_main(lambda: 5) == 5
    ONE_PROCESS.wait()
    ONE_PROCESS.check_same("options", 1)


def test_batches_that_cannot_be_shared() -> None:
    gradients = GradientSum([], World(Launch(1, 2)), StopSignals(shared=True))
    assert gradients.share([1, 2, 3, 4]) == [3, 4]
    with pytest.raises(LaunchError, match="3 micro-batches cannot be divided among 2"):
        gradients.share([1, 2, 3])


def test_a_signal_that_is_shared_is_received_when_all_agree() -> None:
    signals = StopSignals(shared=True)
    with signals.deferred(), signals.deferred():
        signals._handle(15, None)
        assert (signals.noted, signals.received) == (15, None)
        signals.agree()
    assert signals.received == 15
    other = StopSignals(shared=True)
    other.agree()
    assert other.received == 15
