"""What single blocks keep and take, measured beside the memory plan's formulas.

``python -m benchmarks.training.block_memory [MODEL ...]`` builds a few blocks of each kind that a
model has, at its dimensions and with everything stored in NF4 (``--format none``: dense), runs a
training step at each level, and prints one line a block: MiB from its forward to its backward, and
MiB of its backward beyond what was kept. ``--json FILE`` writes the lines as well.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.random_weights import random_packed
from benchmarks.training.sizes import SIZES, transformers_config
from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.head import find_head
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP, prepare_blocks
from prodial_kernels.models.loading.quantized import model_on_meta
from prodial_kernels.training.memory.activations import kept, levels_of, workspace
from prodial_kernels.training.memory.part_bytes import Tokens
from prodial_kernels.training.memory.shapes import LayerShape, describe_model
from prodial_kernels.training.step.loss import ChunkedLoss

MIB = 2**20
VOCABULARY = 4096
# Lists of a configuration that say what each block is.
_LISTS = ("layers_block_type", "layer_types")


@dataclass
class BlockRow:
    """One block at one level; bytes."""

    model: str
    format: str
    kind: str
    level: str
    batch: int
    length: int
    kept: int
    predicted_kept: int
    workspace: int
    predicted_workspace: int

    def __str__(self) -> str:
        def pair(measured: int, predicted: int) -> str:
            return f"{measured / MIB:9.1f} ({predicted / MIB:9.1f})"

        return (
            f"{self.model:24} {self.format:5} {self.kind:20} {self.level:10} "
            f"{self.batch}×{self.length}  kept {pair(self.kept, self.predicted_kept)}  "
            f"workspace {pair(self.workspace, self.predicted_workspace)}"
        )


@dataclass
class Watch:
    """Notes what is allocated around each block's forward and backward.

    Attributes:
        before: When a block's forward begins.
        started: When its backward begins.
        peaks: The most during its backward.
        streams: Bytes of its output, whose gradient is there when its backward begins.
    """

    before: list[int] = field(default_factory=list)
    started: dict[int, int] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    streams: dict[int, int] = field(default_factory=dict)

    def attach(self, blocks: Sequence[nn.Module]) -> list[Any]:
        """Watch ``blocks``; return what takes that back."""
        handles = []
        for index, block in enumerate(blocks):

            def enter(_: nn.Module, _args: Any, index: int = index) -> None:
                if len(self.before) == index:
                    self.before.append(torch.cuda.memory_allocated())

            def leave(_: nn.Module, _args: Any, output: Any, index: int = index) -> None:
                tensor: Tensor = output if isinstance(output, Tensor) else output[0]
                if tensor.requires_grad and index not in self.streams:
                    self.streams[index] = tensor.nbytes
                    tensor.register_hook(lambda grad: self._between(index))

            handles.append(block.register_forward_pre_hook(enter))
            handles.append(block.register_forward_hook(leave))
        return handles

    def _between(self, index: int) -> None:
        """The backward of the next block is done, that of this one begins."""
        torch.cuda.synchronize()
        self.peaks[index + 1] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.started[index] = torch.cuda.memory_allocated()


def few_blocks(model: str) -> Any:
    """A model's configuration with two blocks of each kind that it has, and a small vocabulary."""
    config = transformers_config(model)
    values = config.to_dict()
    for name in _LISTS:
        kinds = values.get(name)
        if kinds and model.partition("-")[0] != "bamba":
            chosen = [kind for kind in dict.fromkeys(kinds) for _ in range(2)]
            # One more of the first: the first block's input needs no gradient, and the last one's
            # output is not another block's input.
            values[name] = [chosen[0], *chosen, chosen[0]]
            values["num_hidden_layers"] = len(values[name])
            break
    else:
        values["num_hidden_layers"] = 4
        if "attn_layer_indices" in values:
            values["attn_layer_indices"] = [2]
            values.pop("layers_block_type", None)
            values.pop("layer_types", None)
            values["num_hidden_layers"] = 5
    values["vocab_size"] = VOCABULARY
    return type(config).from_dict(values)


def kind_of(block: nn.Module, shape: LayerShape) -> str:
    """What a block is, for people."""
    named = getattr(block, "block_type", getattr(block, "layer_type", None))
    return str(named or shape.mixer)


def measure(model: str, format: str | None, batch: int, length: int, level: str) -> list[BlockRow]:
    """Run one step with every block at ``level``, or at its keep level where it has no such."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    config = few_blocks(model)
    empty = model_on_meta(config, dtype)
    apply_prodial(empty, ProdialConfig(r=16))
    loaded: Any = random_packed(config, device, dtype, format, "all")
    apply_prodial(loaded, ProdialConfig(r=16))
    fuse_norms(empty)
    shapes = describe_model(empty, kernels=True).layers
    levels = [level if level in levels_of(shape) else KEEP for shape in shapes]
    loaded.train()
    head = find_head(loaded)
    applied = prepare_blocks(loaded, levels, device=device)
    loss = ChunkedLoss(head)
    ids = torch.randint(3, VOCABULARY, (batch, length), device=device)
    blocks = blocks_of(loaded)
    rows = []
    # The first step compiles and tunes.
    for step in range(2):
        watch = Watch()
        handles = watch.attach(blocks) if step else []
        loss(ids, ids, 1 / ids.numel()).backward()
        for handle in handles:
            handle.remove()
        loaded.zero_grad(set_to_none=True)
        gc.collect()
    stored = format is not None
    tokens = Tokens(batch, length, dtype.itemsize, stored, stored)
    for index in range(1, len(blocks) - 1):
        if index not in watch.started or index not in watch.peaks:
            continue
        taken = watch.peaks[index] - watch.started[index] + watch.streams[index]
        rows.append(
            BlockRow(
                model, format or "bf16", kind_of(blocks[index], shapes[index]), levels[index],
                batch, length,
                watch.before[index + 1] - watch.before[index],
                kept(shapes[index], tokens, levels[index]),
                taken, workspace(shapes[index], tokens, levels[index]),
            )
        )  # fmt: skip
    applied.remove()
    del loaded, loss, head, blocks
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models that are named, else all hybrids."""
    parser = argparse.ArgumentParser("python -m benchmarks.training.block_memory")
    parser.add_argument("models", nargs="*", help="names of sizes.py")
    parser.add_argument("--format", default="nf4", help="nf4, int8, fp8 or none (%(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--levels", nargs="+", default=[KEEP, "norm", CHECKPOINT])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    names = options.models or [name for name in SIZES if not name.startswith(("mamba", "tiny"))]
    format = None if options.format == "none" else options.format
    found: list[BlockRow] = []
    for name in names:
        for level in options.levels:
            rows = measure(name, format, options.batch, options.length, level)
            seen = set()
            for row in rows:
                if str(row) not in seen:
                    seen.add(str(row))
                    print(row, flush=True)
            found += rows
            if options.json:
                text = json.dumps([asdict(row) for row in found], indent=1)
                options.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
