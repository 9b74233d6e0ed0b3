"""Sections as CUDA graphs in one memory pool, in which a replayed step needs no more than an eager.

Sections are captured in the order of execution: forwards, then backwards in reverse. A tensor is
held until the last section that reads it has been captured; then the allocator reuses its memory
for what is captured later, as in an eager step. Afterwards a tensor is known by its address only:
:func:`alias`.

During capture a block's input is no leaf of autograd and its result no root, since both would keep
their memory. Two nodes that keep none take their places (:class:`_Enter`, :class:`_Leave`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from prodial_kernels.captured.engine import Flat, Graphed, Leaf, Section, Source
from prodial_kernels.captured.leaves import OwnLeaves
from prodial_kernels.kernels.replay.streams import watched_for_waits

Result = TypeVar("Result")


class CudaEngine:
    """Captures on its own stream, into one pool for all shapes, which never run concurrently."""

    def __init__(self, device: torch.device) -> None:
        """Create the stream."""
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)
        self._generator = torch.cuda.default_generators[index]
        self._pool: Any = None
        self._reserving: torch.cuda.CUDAGraph | None = None

    def busy(self) -> bool:
        """See :class:`Engine`."""
        return torch.cuda.is_current_stream_capturing()

    def drawn(self) -> int:
        """See :class:`Engine`; the generator's offset, which is on the host."""
        return self._generator.get_offset()

    def allocated(self) -> int:
        """See :class:`Engine`."""
        stats = torch.cuda.memory_stats(self.device)
        return int(stats.get("allocated_bytes.large_pool.current", 0))

    def watched(self, function: Callable[[], Result]) -> tuple[Result, list[str]]:
        """See :class:`Engine`."""
        return watched_for_waits(function)

    def release(self) -> None:
        """See :class:`Engine`."""
        torch.cuda.synchronize(self.device)
        self._pool = self._reserving = None
        # Some of cuBLAS's workspaces lie in the pool.
        torch._C._cuda_clearCublasWorkspaces()
        gc.collect()
        torch.cuda.empty_cache()

    def pool_bytes(self) -> int:
        """Bytes of the pool."""
        if self._pool is None:
            return 0
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment.get("segment_pool_id", ())) == tuple(self._pool)
        )

    def capture(self, sections: Sequence[Section], held: int = 0) -> list[Graphed]:
        """See :class:`Engine`."""
        torch.cuda.synchronize(self.device)
        # Memory cached by earlier steps would stay allocated beside the pool.
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        fresh = self._pool is None
        if fresh:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            # Kernels are loaded here, since loading one during capture is an error.
            for section in sections:
                _flattened([p.detach() for p in section.parameters], section.parameters)
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            if fresh and held:
                self._reserve(held + self._workspace())
            capturing = _Capturing(self, sections)
            for position in range(len(sections)):
                capturing.forward(position)
            for position in reversed(range(len(sections))):
                capturing.backward(position)
            torch.cuda.synchronize(self.device)
        return list(capturing.graphs)

    def _workspace(self) -> int:
        """Bytes that cuBLAS takes on the capturing stream, in the pool as soon as it is needed."""
        square = torch.zeros(16, 16, device=self.device)
        before = torch.cuda.memory_allocated(self.device)
        product = square @ square
        size = torch.cuda.memory_allocated(self.device) - before
        del product
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return size

    def _reserve(self, size: int) -> None:
        """Reserve so many bytes of the pool in one segment.

        In segments of their own, large tensors would each be rounded up to 2 MiB, and smaller ones
        lie in segments of 20 MiB.
        """
        self._reserving = torch.cuda.CUDAGraph()
        with self.recording(self._reserving):
            # A graph must not be empty.
            torch.empty(size, dtype=torch.uint8, device=self.device)[:1].zero_()

    @contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture into a graph; other threads may call CUDA meanwhile."""
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            # A backward thread would allocate its own cuBLAS workspace (32 MiB).
            with torch.autograd.set_multithreading_enabled(False):
                yield
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        # The workspace lies in the pool, and only this graph uses it: the next may overwrite it.
        torch._C._cuda_clearCublasWorkspaces()


class CudaGraphed:
    """The graphs of one section; see :class:`Graphed`."""

    def __init__(self, section: Section, generator: torch.Generator) -> None:
        """Create empty graphs."""
        self.inputs: list[Tensor] = []
        self.results: list[Tensor] = []
        self.result_gradients: list[Tensor | None] = []
        self.leaf_gradients: list[Tensor | None] = [None] * len(section.leaves)
        self.parameter_gradients: list[Flat] = []
        self.forward_graph = torch.cuda.CUDAGraph()
        self.backward_graph: torch.cuda.CUDAGraph | None = None
        # A section that is recomputed in backward draws the same numbers there.
        self._generator = generator if section.checkpointed and section.draws else None

    def forward(self) -> Any:
        """Replay the forward."""
        given = None if self._generator is None else self._generator.get_offset()
        self.forward_graph.replay()
        return given

    def backward(self, given: Any) -> None:
        """Replay the backward."""
        if self.backward_graph is None:
            return
        if self._generator is None:
            self.backward_graph.replay()
            return
        now = self._generator.get_offset()
        self._generator.set_offset(given)
        self.backward_graph.replay()
        self._generator.set_offset(now)


class _Capturing:
    """Captures section by section, holding the tensors that later captures still read."""

    def __init__(self, engine: CudaEngine, sections: Sequence[Section]) -> None:
        self._engine = engine
        self._sections = sections
        self.graphs = [CudaGraphed(section, engine._generator) for section in sections]
        self._anchor = torch.empty((), device=engine.device, requires_grad=True)
        self._own = [OwnLeaves(section.parameters, section.held) for section in sections]
        # Results and slots that later sections read, and the last section that reads each.
        self._held: dict[Source | int, Tensor] = {}
        self._last: dict[Source | int, int] = {}
        self._readers: dict[Source, list[tuple[int, int]]] = {}
        for position, section in enumerate(sections):
            for number, leaf in enumerate(section.leaves):
                self._last[leaf.place] = position
                if isinstance(leaf.place, Source):
                    self._readers.setdefault(leaf.place, []).append((position, number))
        # Of each section until its backward is captured: what the backward starts from.
        self._ends: dict[int, tuple[_Ends, Tensor]] = {}
        self._again: dict[int, list[Tensor]] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}

    def forward(self, position: int) -> None:
        section, graphed = self._sections[position], self.graphs[position]
        with self._engine.recording(graphed.forward_graph):
            data = [self._leaf(leaf) for leaf in section.leaves]
            if section.checkpointed:
                with torch.no_grad():
                    results = section.function(data)
                self._again[position] = data
                differentiable = [result.is_floating_point() for result in results]
            else:
                ends, results, root = self._differentiable(position, data)
                differentiable = [result.requires_grad for result in results]
                if root is not None:
                    self._ends[position] = ends, root
        graphed.inputs = [alias(tensor) for tensor in data]
        graphed.results = [alias(result) for result in results]
        # Their addresses are known when the backward is captured.
        graphed.result_gradients = [
            result if one else None
            for result, one in zip(graphed.results, differentiable, strict=True)
        ]
        for number, result in enumerate(results):
            if Source(position, number) in self._last:
                self._held[Source(position, number)] = result.detach()
        for place in {leaf.place for leaf in section.leaves}:
            if self._last[place] == position:
                self._held.pop(place, None)

    def backward(self, position: int) -> None:
        section, graphed = self._sections[position], self.graphs[position]
        if position not in self._ends and position not in self._again:
            return
        if not (section.parameters or any(leaf.requires_grad for leaf in section.leaves)):
            graphed.result_gradients = [None] * len(graphed.results)
            return
        graph = torch.cuda.CUDAGraph()
        with self._engine.recording(graph), torch.autocast("cuda", enabled=False):
            if position in self._again:
                ends, results, root = self._differentiable(position, self._again.pop(position))
                graphed.result_gradients = [
                    place if result.requires_grad else None
                    for place, result in zip(graphed.results, results, strict=True)
                ]
                del results
            else:
                ends, root = self._ends.pop(position)
            ends.given = [
                None if like is None else self._result_gradient(position, number, like)
                for number, like in enumerate(graphed.result_gradients)
            ]
            found = self._own[position].gradients(root, torch.empty_like(root), [self._anchor])
            flats = _flattened(found, section.parameters)
        graphed.backward_graph = graph
        graphed.result_gradients = [None if g is None else alias(g) for g in ends.given]
        graphed.leaf_gradients = [
            alias(ends.found[number]) if number in ends.found else None
            for number in range(len(section.leaves))
        ]
        graphed.parameter_gradients = [Flat(alias(flat.tensor), flat.parameters) for flat in flats]
        # The section before reads them in place; after its capture their memory is free.
        self._gradients = {(position, number): g for number, g in ends.found.items()}

    def _leaf(self, leaf: Leaf) -> Tensor:
        held = self._held.get(leaf.place)
        if held is None:
            held = torch.empty_strided(
                leaf.shape, leaf.stride, dtype=leaf.dtype, device=self._engine.device
            )
            self._held[leaf.place] = held
        return held

    def _differentiable(
        self, position: int, data: Sequence[Tensor]
    ) -> tuple[_Ends, list[Tensor], Any]:
        ends, section = _Ends(), self._sections[position]
        with torch.enable_grad(), self._own[position].in_place():
            entered = [
                _Enter.apply(self._anchor, ends, number, tensor) if leaf.requires_grad else tensor
                for number, (leaf, tensor) in enumerate(zip(section.leaves, data, strict=True))
            ]
            results = section.function(entered)
            of_graph = [result for result in results if result.requires_grad]
            root = _Leave.apply(ends, *of_graph) if of_graph else None
        return ends, results, root

    def _result_gradient(self, position: int, number: int, like: Tensor) -> Tensor:
        """Where a result's gradient is read: as its only reader wrote it, else in a new tensor."""
        readers = self._readers.get(Source(position, number), [])
        if len(readers) == 1:
            left = self._gradients.get(readers[0])
            if left is not None and left.dtype == like.dtype:
                return left
        return torch.empty_like(like)


class _Ends:
    """The gradients at a section's ends: given at its results, found at its leaves."""

    def __init__(self) -> None:
        self.given: list[Tensor | None] = []
        self.found: dict[int, Tensor] = {}


class _Enter(torch.autograd.Function):
    """A leaf as a section takes it; its backward stores the gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ends: _Ends, number: int, data: Tensor) -> Tensor:
        ctx.ends, ctx.number = ends, number
        # No view for autograd, so that a block may change it in place.
        return torch.ops.aten._unsafe_view(data, data.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.ends.found[ctx.number] = gradient
        return None, None, None, None


class _Leave(torch.autograd.Function):
    """A root over a section's results that keeps none of them."""

    @staticmethod
    def forward(ctx: Any, ends: _Ends, *results: Tensor) -> Tensor:
        ctx.ends = ends
        return results[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *[gradient for gradient in ctx.ends.given if gradient is not None])


def _flattened(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Flat]:
    """Concatenate gradients, one tensor for each dtype."""
    groups: dict[torch.dtype, list[int]] = {}
    for index, gradient in enumerate(found):
        if gradient is not None:
            groups.setdefault(gradient.dtype, []).append(index)
    flats = []
    for dtype, indices in groups.items():
        some = [gradient for i in indices if (gradient := found[i]) is not None]
        flat = torch.empty(sum(g.numel() for g in some), dtype=dtype, device=some[0].device)
        places = _unflatten_dense_tensors(flat, [parameters[i] for i in indices])
        torch._foreach_copy_(list(places), some)
        flats.append(Flat(flat, tuple(indices)))
    return flats


class _Memory:
    """Bytes of the device without ownership."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3
        }  # fmt: skip


def alias(tensor: Tensor) -> Tensor:
    """Return a tensor at the same address that does not keep its memory allocated.

    The allocator reuses that memory once nothing else refers to it; while a graph of the pool is
    alive, only the pool's graphs write there.
    """
    if tensor.numel() == 0:
        return tensor.detach()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps)
    memory = _Memory(tensor.data_ptr(), span * tensor.element_size())
    raw = torch.as_tensor(memory, device=tensor.device)
    return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
