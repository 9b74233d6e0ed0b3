"""Launches from a recording on a real GPU: bit for bit what Triton's own launches give."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from prodial_kernels import prodial_linear
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import LinearCase, make_case
from support.captured.on_device import captured

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_recordings() -> Iterator[None]:
    recorded_calls.reset()
    yield
    recorded_calls.reset()


@dataclass(frozen=True)
class Call:
    """A projector as the kernels meet it; ``skew`` elements lie before x in memory."""

    m: int
    k: int
    n: int
    p: int = 1
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    skew: int = 0
    bias: bool = False
    absent: tuple[str, ...] = ()
    channel_first: bool = False

    def case(self, device: str = "cuda") -> LinearCase:
        """The same operands every time, each at a new address."""
        drawn = operands(self, device)
        copies = {
            name: tensor.clone()
            for name, tensor in vars(drawn).items() if isinstance(tensor, Tensor)
        }  # fmt: skip
        case = replace(drawn, **copies)
        if self.skew:
            x = case.x.new_empty(case.x.numel() + self.skew)[self.skew :].view_as(case.x)
            case = replace(case, x=x.copy_(case.x))
        return case


@cache
def operands(call: Call, device: str) -> LinearCase:
    tokens = (2, call.m // 2) if call.channel_first else call.m
    case = make_case(tokens, call.k, call.n, block_size=call.p, r=call.r, device=device)
    none: dict[str, Any] = dict.fromkeys(call.absent if call.bias else (*call.absent, "bias"))
    return replace(case.cast(call.dtype, torch.float32), **none)


# Few, because each compiles all of its kernels.
CALLS = [
    Call(2048, 768, 3072),
    Call(1008, 768, 512, p=24, dtype=torch.float16, bias=True, channel_first=True),
    Call(333, 192, 250, p=12, r=5, bias=True),
    Call(2048, 768, 3072, skew=1),
    Call(512, 768, 512, absent=("lora_a", "lora_b")),
]


def names_of(case: LinearCase) -> list[str]:
    return [name for name in LinearCase.TRAINED if getattr(case, name) is not None]


def step(case: LinearCase, channel_first: bool = False) -> list[Tensor]:
    """The output and every gradient."""
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in names_of(case)}
    one = replace(case, **leaves)
    y = prodial_linear(
        one.x, one.weight, blocks=one.blocks, scale=one.scale, lora_a=one.lora_a,
        lora_b=one.lora_b, bias=one.bias, lora_scaling=0.5, training=True, impl="triton",
        channel_first=channel_first,
    )  # fmt: skip
    dy = case.grad_output.to(y.dtype)
    return [
        y.detach(),
        *torch.autograd.grad(y, list(leaves.values()), dy.mT if channel_first else dy),
    ]


def by_jit(case: LinearCase, channel_first: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The same with every launch made by Triton."""
    with monkeypatch.context() as patch:
        patch.setattr(recorded_calls, "replayable", lambda _: False)
        return step(case, channel_first)


def settle(call: Call) -> None:
    """Let a call come back often enough that it is recorded."""
    for _ in range(2):
        step(call.case(), call.channel_first)


def test_a_call_that_comes_back_is_launched_past_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    settle(CALLS[0])
    assert recorded_calls.obstacles() == []

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{self.__name__} was launched by Triton's JIT")

    monkeypatch.setattr(JITFunction, "run", refuse)
    step(CALLS[0].case())


def test_random_sequences_give_the_bits_of_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    held: list[Any] = []
    for turn in range(60):
        call = draw.choice(CALLS)
        case = call.case()
        expected = by_jit(case, call.channel_first, monkeypatch)
        result = step(case, call.channel_first)
        names = ["output", *names_of(case)]
        for name, one, other in zip(names, result, expected, strict=True):
            assert torch.equal(one, other), f"turn {turn}, {call}: {name}"
        # Some memory stays, so that later calls meet other addresses.
        held = [*held, (case, result)][-draw.randrange(1, 4) :]
    assert recorded_calls.obstacles() == []
    assert recorded_calls.counts()["replayed"] == 2 * len(CALLS)


def test_a_captured_recording_replays_on_new_data() -> None:
    call = CALLS[0]
    settle(call)
    case = call.case()
    replay, results = captured(lambda: step(case))
    for seed in range(2):
        torch.manual_seed(seed)
        case.x.normal_()
        replay()
        torch.cuda.synchronize()
        for one, other in zip(results, step(case), strict=True):
            assert torch.equal(one, other)


def test_a_launch_hook_sees_every_launch() -> None:
    settle(CALLS[0])
    launched: list[str] = []
    hook = lambda metadata: launched.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        step(CALLS[0].case())
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(launched) >= 6
    assert "_gemm_kernel" in launched


def test_threads_on_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[0]
    settle(call)
    cases = [call.case() for _ in range(4)]
    expected = [by_jit(case, False, monkeypatch) for case in cases]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(case: LinearCase, wanted: list[Tensor]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                for index, (one, other) in enumerate(zip(step(case), wanted, strict=True)):
                    if not torch.equal(one, other):
                        wrong.append(f"turn {turn}, result {index}")

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_recording_needs_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[0]
    settle(call)
    case = call.case()

    def peak(run: Any) -> int:
        """Bytes asked for: up to 1 MB more is taken for each, depending on what is cached.

        The most of several runs over the least between them: results of a run may still be held
        when the next one begins, and freed in the middle of it.
        """
        peaks, between = [], []
        for _ in range(4):
            gc.collect()
            torch.cuda.synchronize()
            between.append(torch.cuda.memory_stats()["requested_bytes.all.current"])
            torch.cuda.reset_peak_memory_stats()
            run()
            peaks.append(torch.cuda.memory_stats()["requested_bytes.all.peak"])
        return max(peaks) - min(between)

    by_triton = peak(lambda: by_jit(case, False, monkeypatch))
    # One workspace lives to the end: 2% measured.
    assert peak(lambda: step(case)) <= 1.05 * by_triton


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_has_recordings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        for device in ("cuda:0", "cuda:1"):
            case = CALLS[0].case(device)
            result, expected = step(case), by_jit(case, False, monkeypatch)
            for one, other in zip(result, expected, strict=True):
                assert one.device == torch.device(device)
                assert torch.equal(one, other)
