"""Pretraining of a base in pieces: each goes on from a checkpoint, and may be killed at any time.

The learning rate is constant after its warm-up; a piece with ``final`` lowers it linearly to zero
over its last part. Batches depend on the seed and what was seen before alone, so pieces see
what one long run would have seen. On a GPU the whole step is one CUDA graph.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.bases.checkpoint import load_state, read_record, restore, save_state
from prodial_kernels.training.step.graphed import CudaGraphs
from prodial_kernels.training.step.optimizers import set_learning_rate

__all__ = ["Images", "Options", "Progress", "Text", "pretrain"]

_AHEAD = 10  # steps the host may run ahead of the device, so that the clock stays honest


@dataclass(frozen=True)
class Options:
    """How a piece is trained.

    Attributes:
        max_seconds: Wall time of the piece's loop, compilation included.
        max_steps: Most steps of the piece.
        batch_size: Windows (or images) a step.
        learning_rate: Peak of AdamW's rate.
        warmup_steps: Steps of linear warm-up, in the first piece.
        final: Lower the rate to zero at the end of this piece.
        decay_share: Over which last part of the piece.
        weight_decay: Decoupled decay of matrices.
        clip: Largest gradient norm.
        save_seconds: Between checkpoints.
        evaluate_seconds: Between measurements on held-out data.
        seed: Of batches.
        cuda_graph: Record the step as a CUDA graph, on a GPU.
    """

    max_seconds: float
    max_steps: int = 10**9
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    final: bool = False
    decay_share: float = 0.3
    weight_decay: float = 0.1
    clip: float = 1.0
    save_seconds: float = 60.0
    evaluate_seconds: float = 30.0
    seed: int = 0
    cuda_graph: bool = True


@dataclass
class Progress:
    """What all pieces together did; ``history`` has a line per measurement on held-out data."""

    step: int = 0
    examples: int = 0
    seconds: float = 0.0
    pieces: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Data(Protocol):
    """Batches and measurements of one kind of base."""

    def shapes(self, batch: int) -> list[tuple[tuple[int, ...], torch.dtype]]: ...
    def draw(self, first: int, batch: int, seed: int) -> tuple[Tensor, Tensor]: ...
    def loss(self, model: Any, x: Tensor, y: Tensor) -> Tensor: ...
    def evaluate(self, model: Any, whole: bool) -> dict[str, float]: ...
    def seen(self, examples: int) -> int: ...


def _order(count: int, epoch: int, seed: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(count, generator=generator), int(
        torch.randint(0, 2**31, (), generator=generator)
    )


class _Epochs:
    """Indices of batches: every example once an epoch, in an order of the epoch's own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._held: dict[int, tuple[Tensor, int]] = {}

    def take(self, first: int, batch: int, seed: int) -> tuple[Tensor, int]:
        """Return [batch] indices, after ``first`` examples, and a number of their first epoch."""
        found: list[int] = []
        jitter = 0
        while len(found) < batch:
            epoch, position = divmod(first + len(found), self.count)
            if epoch not in self._held:
                self._held = {e: v for e, v in self._held.items() if e >= epoch - 1}
                self._held[epoch] = _order(self.count, epoch, seed)
            order, number = self._held[epoch]
            jitter = jitter or number
            found += order[position : position + batch - len(found)].tolist()
        return torch.tensor(found), jitter


class Text:
    """Windows of a token stream; measured in bits per byte."""

    def __init__(
        self,
        tokens: Tensor,
        held_out: dict[str, Tensor],
        byte_lengths: Tensor,
        length: int = 512,
        sample: int = 200_000,
    ) -> None:
        """Take streams of ids.

        Args:
            tokens: Training stream, on the device of the model.
            held_out: Streams to measure on, by name, there too.
            byte_lengths: Bytes of each token.
            length: Tokens a window.
            sample: Tokens of a held-out stream that a measurement between uses; the last one takes
                five times as many.

        Raises:
            ValueError: The stream is shorter than two windows.
        """
        if tokens.numel() < 2 * length + 1:
            raise ValueError(f"tokens: expected at least {2 * length + 1}, got {tokens.numel()}")
        self.tokens, self.held_out, self.byte_lengths = tokens, held_out, byte_lengths
        self.length, self.sample = length, sample
        self._epochs = _Epochs((tokens.numel() - 1 - length) // length)
        self._offsets = torch.arange(length + 1, device=tokens.device)

    def shapes(self, batch: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of a batch's inputs and targets."""
        return [((batch, self.length), torch.long)] * 2

    def draw(self, first: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """The next windows after ``first``; those of an epoch begin at an offset of its own."""
        index, jitter = self._epochs.take(first, batch, seed)
        starts = (index * self.length + jitter % self.length).to(self.tokens.device)
        window = self.tokens[starts[:, None] + self._offsets].long()
        return window[:, :-1], window[:, 1:]

    def loss(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        """Mean nats a token."""
        logits = model(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    def evaluate(self, model: Any, whole: bool) -> dict[str, float]:
        """Bits per byte of every held-out stream."""
        from prodial_kernels.embedded.making.evaluate import bits_per_byte

        return {
            name: bits_per_byte(
                model, stream[: self.sample * (5 if whole else 1)], self.byte_lengths, self.length
            )
            for name, stream in self.held_out.items()
            if stream.numel() > 1
        }

    def seen(self, examples: int) -> int:
        """Tokens of so many windows."""
        return examples * self.length


class Images:
    """Grey or colour images with classes; measured in error."""

    def __init__(self, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> None:
        """Take uint8 images [n, c, h, w], of one or three channels, and int64 classes [n]."""
        self.images, self.labels = train
        self.held_out = held_out
        self._epochs = _Epochs(len(self.labels))

    def shapes(self, batch: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of a batch's images and classes."""
        side = self.images.shape[-1]
        return [((batch, 3, side, side), torch.float32), ((batch,), torch.long)]

    def draw(self, first: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """The next images after ``first``, moved by up to two pixels."""
        index, _ = self._epochs.take(first, batch, seed)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        index = index.to(self.images.device)
        images = torch.roll(as_input(self.images[index]), shift, dims=(2, 3))
        return images, self.labels[index]

    def loss(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        """Mean nats an image."""
        return F.cross_entropy(model(x).float(), y)

    @torch.no_grad()
    def evaluate(self, model: Any, whole: bool) -> dict[str, float]:
        """Share of held-out images that are given another class."""
        images, labels = self.held_out
        if not whole:
            images, labels = images[:2000], labels[:2000]
        wrong = 0
        for i in range(0, len(labels), 256):
            guess = model(as_input(images[i : i + 256])).argmax(-1)
            wrong += int((guess != labels[i : i + 256]).sum())
        return {"error": wrong / len(labels)}

    def seen(self, examples: int) -> int:
        """The same."""
        return examples


def as_input(images: Tensor) -> Tensor:
    """uint8 [n, c, h, w] -> float [n, 3, h, w] in [-1, 1]."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


class _Step:
    """One optimiser step on static inputs, recorded as a CUDA graph where there is one."""

    def __init__(
        self, model: nn.Module, data: Data, options: Options, device: torch.device
    ) -> None:
        self.model, self.data, self.options, self.device = model, data, options, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        on_gpu = device.type == "cuda"
        decayed = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        # A CUDA graph reads the rate from the device's memory.
        rate = torch.tensor(0.0, device=device) if on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(
            groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu
        )
        self.inputs = [
            torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype in data.shapes(options.batch_size)
        ]
        self.loss = torch.zeros((), device=device)
        self.graphs = CudaGraphs(device) if on_gpu else None
        self.replay: Callable[[], None] | None = None

    def _update(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        # The cast weights must be made anew in every replay, hence no cache.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda",
            cache_enabled=False,
        ):  # fmt: skip
            loss = self.data.loss(self.model, *self.inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip, foreach=True)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def record(self) -> None:
        if self.graphs is not None:
            self.replay = self.graphs.capture(self._update)

    def run(self, first: int, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)
        drawn = self.data.draw(first, self.options.batch_size, self.options.seed)
        for held, value in zip(self.inputs, drawn, strict=True):
            held.copy_(value)
        if self.replay is not None:
            self.replay()
        elif self.graphs is not None:
            self.graphs.run(self._update)
        else:
            self._update()


def _measure(model: nn.Module, data: Data, device: torch.device, whole: bool) -> dict[str, float]:
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        figures = data.evaluate(model, whole)
    model.train()
    return {name: round(value, 4) for name, value in figures.items()}


def pretrain(
    model: nn.Module,
    data: Data,
    options: Options,
    folder: Path,
    *,
    about: dict[str, Any] | None = None,
    matrices: torch.dtype = torch.bfloat16,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Progress:
    """Train one piece, from the checkpoint in ``folder`` where there is one.

    Args:
        model: fp32, on its device; trained in place.
        data: Batches and measurements.
        options: Limits and hyperparameters of this piece.
        folder: Of the checkpoint, which is renewed every ``save_seconds`` and at the end.
        about: Facts for the checkpoint's record: the base's shape, the corpus.
        matrices: In which a checkpoint keeps matrices.
        say: Is given one JSON object a line.

    Returns:
        What all pieces did so far.

    Raises:
        CheckpointError: The checkpoint is broken or of another model.
        FloatingPointError: The loss is not finite; the last checkpoint stays.
    """
    device = next(model.parameters()).device
    model.train()
    step = _Step(model, data, options, device)
    progress = Progress()
    if (record := read_record(folder)) is not None:
        progress = Progress(**record["progress"])
        restore(load_state(folder), model, step.optimizer, progress.step)
        say(json.dumps({"resumed": progress.step, "seconds": round(progress.seconds, 1)}))
    progress.pieces += 1
    first, before = progress.step, progress.seconds
    start = saved = measured = time.monotonic()
    final_loss = math.nan

    def keep() -> None:
        facts = {"progress": asdict(progress), "options": asdict(options), **(about or {})}
        size = save_state(folder, model, step.optimizer, facts, matrices)
        say(json.dumps({"saved": progress.step, "bytes": size}))

    def look(whole: bool) -> None:
        line = {
            "step": progress.step,
            "seen": data.seen(progress.examples),
            "seconds": round(progress.seconds, 1),
            "loss": round(final_loss, 4),
            **_measure(model, data, device, whole),
        }
        progress.history.append(line)
        say(json.dumps(line))

    while True:
        done = (time.monotonic() - start) / options.max_seconds
        done = max(done, (progress.step - first) / options.max_steps)
        if done >= 1:
            break
        rate = options.learning_rate * min(1.0, (progress.step + 1) / options.warmup_steps)
        if options.final:
            rate *= min(1.0, (1 - done) / options.decay_share)
        made = progress.step - first
        step.run(progress.examples, rate)
        if made == 2 and options.cuda_graph and device.type == "cuda":
            try:
                step.record()
                say(json.dumps({"cuda_graph": True}))
            except RuntimeError as error:  # slower, but the same computation
                say(json.dumps({"cuda_graph": False, "why": str(error)[:300]}))
        progress.step += 1
        progress.examples += options.batch_size
        if made < 3 or progress.step % _AHEAD == 0:
            final_loss = step.loss.item()
            if not math.isfinite(final_loss):
                raise FloatingPointError(
                    f"pretraining: the loss is {final_loss} at step {progress.step}; go on from "
                    "the last checkpoint at half the learning rate"
                )
        now = time.monotonic()
        progress.seconds = before + now - start
        if made in (0, 2, 10, 100):
            say(
                json.dumps({"step": progress.step, "loss": final_loss, "at": round(now - start, 1)})
            )
        if now - saved > options.save_seconds:
            keep()
            saved = time.monotonic()
        if now - measured > options.evaluate_seconds:
            look(whole=False)
            measured = time.monotonic()
    final_loss = step.loss.item()
    progress.seconds = before + time.monotonic() - start
    # First the checkpoint: the last measurement may be cut off.
    keep()
    look(whole=True)
    keep()
    return progress
