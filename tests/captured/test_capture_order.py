"""What is captured, in which memory: the code that fills the graphs, run on a CPU as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from prodial_kernels.captured import cuda
from prodial_kernels.captured.engine import Leaf, Section, Source

SHAPE = torch.Size((2, 3))


class _Engine:
    device = torch.device("cpu")
    _generator = torch.default_generator

    @contextmanager
    def recording(self, graph: Any) -> Iterator[None]:
        yield


class _Capturing(cuda._Capturing):
    """With numbers where a graph has whatever is there."""

    def _leaf(self, leaf: Leaf) -> Tensor:
        fresh = leaf.place not in self._held
        data = super()._leaf(leaf)
        return data.normal_() if fresh else data

    def _result_gradient(self, position: int, number: int, like: Tensor) -> Tensor:
        place = super()._result_gradient(position, number, like)
        if not any(place is left for left in self._gradients.values()):
            place.normal_()
        return place


def section(
    weights: Sequence[Tensor], function: Any, *places: Source | int, checkpointed: bool = False,
    first: bool = False,
) -> Section:  # fmt: skip
    leaves = [Leaf(SHAPE, (3, 1), torch.float32, not first, place) for place in places]
    return Section("block", function, tuple(leaves), tuple(weights), checkpointed)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: object())
    monkeypatch.setattr(cuda, "alias", lambda tensor: tensor.detach())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_and_places(checkpointed: bool) -> None:
    """A chain of pairs, as mamba_ssm's blocks: (hidden, residual) -> (f(residual'), residual')."""
    weights = [torch.randn(3, 3, requires_grad=True) for _ in range(3)]

    def block(number: int) -> Any:
        def function(tensors: Sequence[Tensor]) -> list[Tensor]:
            residual = tensors[0] if len(tensors) == 1 else tensors[0] + tensors[1]
            return [torch.tanh(residual @ weights[number]), residual]

        return function

    sections = [
        section([weights[0]], block(0), 0, checkpointed=checkpointed, first=True),
        section([weights[1]], block(1), Source(0, 0), checkpointed=checkpointed),
        section([weights[2]], block(2), Source(1, 0), Source(1, 1), checkpointed=checkpointed),
    ]
    capturing = _Capturing(_Engine(), sections)  # type: ignore[arg-type]
    for position in range(3):
        capturing.forward(position)
    assert capturing._held == {}
    # Each reads what the one before has left, where it was left.
    first, second, third = capturing.graphs
    assert second.inputs[0].data_ptr() == first.results[0].data_ptr()
    assert [t.data_ptr() for t in third.inputs] == [t.data_ptr() for t in second.results]

    found = []
    for position in (2, 1, 0):
        capturing.backward(position)
        graphed = capturing.graphs[position]
        found.append(
            [
                [None if g is None else g.clone() for g in graphed.leaf_gradients],
                [flat.tensor.clone() for flat in graphed.parameter_gradients],
            ]
        )
    assert not capturing._ends
    assert not capturing._again
    assert second.result_gradients[0] is not None
    assert third.leaf_gradients[0] is not None
    assert second.result_gradients[0].data_ptr() == third.leaf_gradients[0].data_ptr()
    # The first block's residual is an input that needs no gradient.
    assert [g is None for g in first.result_gradients] == [False, True]
    assert first.leaf_gradients == [None]

    for position in range(3):
        graphed = capturing.graphs[position]
        leaves = [
            tensor.clone().requires_grad_(leaf.requires_grad)
            for tensor, leaf in zip(graphed.inputs, sections[position].leaves, strict=True)
        ]
        results = block(position)(leaves)
        pairs = [
            (r, g) for r, g in zip(results, graphed.result_gradients, strict=True) if g is not None
        ]
        expected = torch.autograd.grad(
            [r for r, _ in pairs],
            [*[leaf for leaf in leaves if leaf.requires_grad], weights[position]],
            [g for _, g in pairs],
        )
        of_leaves, of_weights = found[2 - position]
        got = [*[g for g in of_leaves if g is not None], of_weights[0].view(3, 3)]
        torch.testing.assert_close(got, list(expected))


def test_what_is_not_trained_has_no_backward() -> None:
    frozen = section([], lambda tensors: [tensors[0] * 2, torch.arange(3)], 0, first=True)
    capturing = _Capturing(_Engine(), [frozen])  # type: ignore[arg-type]
    capturing.forward(0)
    capturing.backward(0)
    assert capturing.graphs[0].backward_graph is None
    assert capturing.graphs[0].result_gradients == [None, None]
    capturing.graphs[0].backward(None)


def test_gradients_are_flattened_by_dtype_and_none_is_left_out() -> None:
    parameters = [torch.zeros(2, 2), torch.zeros(3), torch.zeros(2, dtype=torch.float64)]
    found = [torch.ones(2, 2), None, torch.full((2,), 2.0, dtype=torch.float64)]
    flats = cuda._flattened(found, parameters)
    assert [flat.parameters for flat in flats] == [(0,), (2,)]
    assert [flat.tensor.tolist() for flat in flats] == [[1.0] * 4, [2.0] * 2]


def test_a_failed_capture_ends() -> None:
    class Graph:
        ended = 0

        def capture_begin(self, **options: Any) -> None:
            assert options == {"pool": None, "capture_error_mode": "thread_local"}

        def capture_end(self) -> None:
            self.ended += 1
            raise RuntimeError("invalidated")

    engine = object.__new__(cuda.CudaEngine)
    engine._pool = None
    graph: Any = Graph()
    with pytest.raises(ValueError, match="the cause"), engine.recording(graph):
        raise ValueError("the cause")
    assert graph.ended == 1


def test_what_torch_says_of_its_own_check_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(mode: str) -> None:
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations", UserWarning, stacklevel=1,
            )  # fmt: skip

    def block() -> int:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        return 3

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", check)
    engine = object.__new__(cuda.CudaEngine)
    assert engine.watched(lambda: 4) == (4, [])
    result, places = engine.watched(block)
    assert result == 3
    assert places[0].startswith(__file__)
    with pytest.warns(FutureWarning, match="something else"):
        engine.watched(lambda: warnings.warn("something else", FutureWarning, stacklevel=1))
