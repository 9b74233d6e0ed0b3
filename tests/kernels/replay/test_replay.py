"""Recorded launches: what is replayed, when they must not, and what the driver sees of it."""

from __future__ import annotations

import ast
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import native_specialize_impl

from prodial_kernels import kernels
from prodial_kernels.kernels.replay import recorded_calls, recorder, recording
from prodial_kernels.kernels.replay.raw_launch import UnsupportedLaunch
from prodial_kernels.kernels.replay.recorder import fork, join, launch
from prodial_kernels.kernels.replay.workspace import ALIGNMENT, Lifetime, pack
from support.kernels.uninterpreted import run_uninterpreted


def test_the_driver_gets_what_triton_gives_it(tmp_path: Path) -> None:
    run_uninterpreted(tmp_path, "replayed_launches.py")


# --- Which calls share a recording. --------------------------------------------------------------


def some_tensor(draw: random.Random) -> Tensor:
    """A matrix whose shape, strides, dtype and alignment come in few enough kinds to repeat."""
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
    rows, columns = draw.choice([1, 15, 16]), draw.choice([1, 8, 16, 17])
    offset, before = draw.choice([0, 0, 1, 8, 16]), draw.choice([0, 1, 16])
    wide = torch.empty(offset + rows * (columns + before), dtype=dtype)[offset:]
    matrix = wide.view(rows, columns + before)[:, before:]
    return matrix.t() if draw.random() < 0.2 else matrix


def test_one_key_is_one_specialisation() -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def specialised(*arguments: Any) -> list[Any]:
        return [native_specialize_impl(backend, value, False, True, True) for value in arguments]

    draw = random.Random(0)
    seen: dict[Any, Any] = {}
    for _ in range(4000):
        x, w = some_tensor(draw), some_tensor(draw)
        options = (draw.choice([1, 2, 16]), draw.choice([0.5, 1.0]))
        key, addresses = recorded_calls.call_key(len, (x, None, w), options)
        assert addresses == [x.data_ptr(), 0, w.data_ptr()]
        # What a launcher hands to a kernel: the tensors, parts of them, their sizes and products.
        sizes = (*x.shape, *x.stride(), *w.shape, *w.stride(), x.numel() * w.shape[0])
        arguments = specialised(x, w, x[:, x.shape[1] // 2 :], *sizes, *options)
        assert seen.setdefault(key, arguments) == arguments
    assert 100 < len(seen) < 4000, "too few keys repeat to say anything"
    assert len({str(arguments) for arguments in seen.values()}) > 50


def test_the_order_of_operands_is_in_the_key() -> None:
    x = torch.empty(4, 4)
    keys = {
        recorded_calls.call_key(len, operands, ())[0]
        for operands in ((x, None, x), (x, x, None), (x, x.half(), None), (x, x[1:], x))
    }
    assert len(keys) == 4


# --- What is replayed. ----------------------------------------------------------------------------


class Kernel:
    """Stands in for a jitted kernel; every launch of Triton's is noted."""

    arg_names = ("x", "y", "N")
    __name__ = "kernel"

    def __init__(self) -> None:
        self.by_jit = 0
        self.direct: list[tuple[int, list[int]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Kernel:
            self.by_jit += 1
            return self

        return run


class Direct:
    """Stands in for a direct launch of :class:`Kernel`."""

    def __init__(self, compiled: Kernel, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        self.kernel = compiled

    def bind(self, stream: int, addresses: Sequence[int]) -> Callable[[], None]:
        return lambda: self.kernel.direct.append((stream, list(addresses)))


class Side:
    """Stands in for a side stream."""

    handle = 8

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.stream = None

    def fork(self, current: Any) -> None:
        self.kernel.direct.append((-1, []))

    def join(self, current: Any) -> None:
        self.kernel.direct.append((-2, []))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    monkeypatch.setattr(recorder, "RawLaunch", Direct)
    monkeypatch.setattr(recorded_calls, "replayable", lambda _: True)
    monkeypatch.setattr(recording, "current_handle", lambda _: 7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=7))
    for module in (recording, recorder):
        monkeypatch.setattr(module, "side_stream", lambda _: Side(made))
    recorded_calls.reset()
    yield made
    recorded_calls.reset()


def by_replay(kernel: Kernel, run: Callable[[], Any]) -> bool:
    """Whether ``run`` launched past Triton's JIT."""
    before = kernel.by_jit
    kernel.direct.clear()
    run()
    assert (kernel.by_jit == before) == bool(kernel.direct)
    return kernel.by_jit == before


def two_steps(kernel: Kernel) -> Callable[..., tuple[Tensor | None, ...]]:
    def function(x: Tensor, factor: int = 1) -> tuple[Tensor | None, ...]:
        between = torch.empty(len(x), dtype=torch.float32, device=x.device)
        y = torch.empty_like(x)
        launch(kernel, (factor,), x=x, y=between, N=len(x), num_warps=4)
        launch(kernel, (factor,), x=between, y=y.view(-1)[2:], N=len(x), num_warps=4)
        return y, None

    return function


def test_from_the_third_call_on(kernel: Kernel) -> None:
    function = two_steps(kernel)
    x = torch.empty(6, 2, dtype=torch.float16)

    def repeated() -> bool:
        return by_replay(kernel, lambda: recorded_calls.replayed(function, (x,), ()))

    assert [repeated() for _ in range(3)] == [False, False, True]
    other = torch.empty_like(x)
    y, nothing = recorded_calls.replayed(function, (other,), ())
    assert nothing is None
    assert y is not None
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    (stream, (first, between)), (_, (again, into)) = kernel.direct[-2:]
    assert (stream, first, into) == (7, other.data_ptr(), y.data_ptr() + 4)
    assert between == again not in (first, into)


def test_what_is_kept_for_addresses_is_for_these_and_the_stream(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "BOUND", 3)
    function = two_steps(kernel)
    operands = [torch.empty(6, 2, dtype=torch.float16) for _ in range(5)]
    for _ in range(2):
        recorded_calls.replayed(function, (operands[0],), ())
    for stream in (7, 9, 7):
        monkeypatch.setattr(recording, "current_handle", lambda _, stream=stream: stream)
        for x in operands * 3:
            kernel.direct.clear()
            y, _ = recorded_calls.replayed(function, (x,), ())
            assert y is not None
            (one, (first, between)), (two, (again, into)) = kernel.direct
            assert (one, two) == (stream, stream)
            assert (first, again, into) == (x.data_ptr(), between, y.data_ptr() + 4)
    assert len(next(iter(recorded_calls._recordings.values()))._bound) <= 3


def test_other_calls_are_not_taken_for_it(kernel: Kernel) -> None:
    function = two_steps(kernel)
    x = torch.empty(34, 4, dtype=torch.float16)[1:33]

    def call(operand: Tensor, *options: Any) -> bool:
        return by_replay(kernel, lambda: recorded_calls.replayed(function, (operand,), options))

    assert [call(x) for _ in range(3)] == [False, False, True]
    assert not call(x, 2)
    assert not call(x[1:])
    assert not call(x[:, :2])
    assert not call(x.bfloat16())
    assert not call(torch.empty(34, 4, dtype=torch.float16)[:32])  # another alignment
    assert call(x)


def test_a_hook_sees_every_launch(kernel: Kernel) -> None:
    function = two_steps(kernel)
    x = torch.empty(4)
    call = lambda: by_replay(kernel, lambda: recorded_calls.replayed(function, (x,), ()))  # noqa: E731
    assert [call() for _ in range(3)] == [False, False, True]
    hook = lambda _: None  # noqa: E731
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            assert recorded_calls.hooked()
            assert not call()
        finally:
            chain.remove(hook)
    assert call()


def test_a_kernel_with_hooks_of_its_own_is_left_to_triton(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kernel, "pre_run_hooks", [print], raising=False)
    function = two_steps(kernel)
    x = torch.empty(4)
    assert not any(
        by_replay(kernel, lambda: recorded_calls.replayed(function, (x,), ())) for _ in range(4)
    )
    assert "hooks of its own" in recorded_calls.obstacles()[0]


def test_recordings_are_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_calls, "RECORDINGS", 3)
    function = two_steps(kernel)
    for size in range(1, 9):
        for _ in range(2):
            recorded_calls.replayed(function, (torch.empty(size),), ())
    assert recorded_calls.counts() == {"replayed": 3, "run": 0, "met": 3}
    newest = torch.empty(8)
    assert by_replay(kernel, lambda: recorded_calls.replayed(function, (newest,), ()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, y: y.zero_(), "aten.zero_"),
        (lambda x, y: y.add_(x), "aten.add_"),
        (lambda x, y: x.sum().item(), "aten.sum"),
        (lambda x, y: x, "something else than new tensors"),
        (lambda x, y: y[1:], "something else than new tensors"),
    ],
)
def test_what_a_recording_cannot_repeat_is_run_as_it_is(
    kernel: Kernel, caplog: pytest.LogCaptureFixture, change: Callable[..., Any], reason: str
) -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        y = torch.empty_like(x)
        launch(kernel, (1,), x=x, y=y, N=3)
        changed = change(x, y)
        return (changed if isinstance(changed, Tensor) else y,)

    x = torch.ones(4)
    assert not any(
        by_replay(kernel, lambda: recorded_calls.replayed(function, (x,), ())) for _ in range(4)
    )
    (obstacle,) = recorded_calls.obstacles()
    assert reason in obstacle
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"


def test_nothing_is_recorded_for_no_tokens(kernel: Kernel) -> None:
    function = two_steps(kernel)
    x = torch.empty(0, 3)
    assert not any(
        by_replay(kernel, lambda: recorded_calls.replayed(function, (x,), ())) for _ in range(4)
    )
    assert not recorded_calls.obstacles()


def test_a_foreign_tensor_is_no_operand(kernel: Kernel) -> None:
    table = torch.empty(4)

    def function(x: Tensor) -> tuple[Tensor]:
        y = torch.empty_like(x)
        launch(kernel, (1,), x=table, y=y, N=3)
        return (y,)

    x = torch.ones(4)
    assert not any(
        by_replay(kernel, lambda: recorded_calls.replayed(function, (x,), ())) for _ in range(4)
    )
    assert "neither an operand nor its own" in recorded_calls.obstacles()[0]


def test_operands_that_cannot_be_told_apart_are_not_recorded(kernel: Kernel) -> None:
    def function(x: Tensor, dy: Tensor) -> tuple[Tensor]:
        y = torch.empty_like(x)
        launch(kernel, (1,), x=x.t(), y=y, N=3)
        launch(kernel, (1,), x=dy, y=y, N=3)
        return (y,)

    x, dy = torch.empty(4, 4), torch.empty(4, 4)
    both = torch.empty(8, 4)

    def call(*operands: Tensor) -> bool:
        return by_replay(kernel, lambda: recorded_calls.replayed(function, operands, ()))

    assert not any(call(x, x) for _ in range(4))
    assert not any(call(both[:4], both[4:]) for _ in range(4))
    assert [call(x, dy) for _ in range(2)] == [False, True]
    assert call(x, x)
    assert [addresses[0] for _, addresses in kernel.direct] == [x.data_ptr()] * 2
    assert not recorded_calls.obstacles()


def test_an_unknown_launcher_is_left_to_triton(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedLaunch("its launcher is a later.Triton")

    monkeypatch.setattr(recorder, "RawLaunch", refuse)
    x = torch.empty(4)
    function = two_steps(kernel)
    assert not any(
        by_replay(kernel, lambda: recorded_calls.replayed(function, (x,), ())) for _ in range(4)
    )
    assert recorded_calls.obstacles() == [
        "kernel cannot be launched directly: its launcher is a later.Triton"
    ]


def test_a_side_stream_is_forked_used_and_joined(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = torch.empty_like(x), torch.empty_like(x)
        here, there = torch.empty(400), torch.empty(400)
        side = fork(x.device)
        launch(kernel, (1,), x=x, y=here, N=3)
        launch(kernel, (1,), x=here, y=y, N=3)
        launch(kernel, (1,), x=x, y=there, N=3, side=side)
        launch(kernel, (1,), x=there, y=z, N=3, side=side)
        join(side, x.device)
        return y, z

    x = torch.empty(4)
    for _ in range(3):
        kernel.direct.clear()
        y, z = recorded_calls.replayed(function, (x,), ())
    assert [stream for stream, _ in kernel.direct] == [-1, 7, 7, 8, 8, -2]
    (_, (_, here)), _, (_, (_, there)), _ = kernel.direct[1:5]
    assert kernel.direct[2] == (7, [here, y.data_ptr()])
    assert kernel.direct[4] == (8, [there, z.data_ptr()])
    # Written down one after the other, they run at the same time.
    assert abs(here - there) >= 1600


def test_a_side_stream_that_is_not_joined_is_an_obstacle(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        fork(x.device)
        y = torch.empty_like(x)
        launch(kernel, (1,), x=x, y=y, N=3)
        return (y,)

    x = torch.empty(4)
    for _ in range(3):
        recorded_calls.replayed(function, (x,), ())
    assert recorded_calls.obstacles() == ["its side stream is not joined"]


# --- Memory. ------------------------------------------------------------------------------------


def test_temporaries_alive_together_do_not_overlap() -> None:
    draw = random.Random(0)
    for _ in range(300):
        lives = []
        for _ in range(draw.randrange(1, 10)):
            first = draw.randrange(8)
            lives.append(Lifetime(draw.randrange(1, 3000), first, draw.randrange(first, 8)))
        offsets, size = pack(lives)
        assert all(offset % ALIGNMENT == 0 for offset in offsets)
        assert size == max(o + life.size for o, life in zip(offsets, lives, strict=True))
        placed = zip(offsets, lives, strict=True)
        for (at, one), (other_at, other) in itertools.combinations(placed, 2):
            together = one.first <= other.last and other.first <= one.last
            apart = at + one.size <= other_at or other_at + other.size <= at
            assert apart or not together


def test_memory_is_used_again() -> None:
    weight, parts = Lifetime(1 << 20, 0, 1), Lifetime(1 << 19, 2, 3)
    assert pack([weight, parts, weight]) == ([0, 0, 1 << 20], 2 << 20)
    assert pack([]) == ([], 0)


# --- Nothing is launched past the recorder. -----------------------------------------------------


def test_every_kernel_is_launched_by_launch() -> None:
    for path in Path(kernels.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched = ast.unparse(node.func.value)
                assert path.name == "recorder.py" or "kernel" not in launched, (path, launched)
