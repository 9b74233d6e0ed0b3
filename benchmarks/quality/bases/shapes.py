"""The bases by name: their architecture and size, made with random weights, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prodial_kernels.models.vision_mamba import VisionMamba

__all__ = ["SHAPES", "Base", "Shape", "build", "load_base", "save_base"]

IMAGE_SIZE = 32


@dataclass(frozen=True)
class Shape:
    """A base that can be pretrained.

    Attributes:
        kind: ``"language"`` or ``"vision"``.
        make: From the number of tokens (or classes) to a model with random weights, fp32.
        learning_rate: Peak rate of its pretraining.
    """

    kind: str
    make: Callable[[int], nn.Module]
    learning_rate: float = 2e-3


def _language(family: str, **options: Any) -> Callable[[int], nn.Module]:
    def make(vocab_size: int) -> nn.Module:
        import transformers

        common = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        config = getattr(transformers, f"{family}Config")(
            vocab_size=vocab_size, tie_word_embeddings=True, **common, **options
        )
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
        if getattr(config, "rescale_prenorm_residual", False):
            # Else from_pretrained would scale the trained out_proj again.
            config.rescale_prenorm_residual = False
        return model

    return make


def _mamba1(width: int, layers: int, states: int) -> Shape:
    return Shape(
        "language",
        _language(
            "Mamba", hidden_size=width, num_hidden_layers=layers, state_size=states,
            initializer_range=0.04, rescale_prenorm_residual=True,
        ),
    )  # fmt: skip


def _mamba2(width: int, layers: int, states: int, head: int, chunk: int) -> Shape:
    return Shape(
        "language",
        _language(
            "Mamba2", hidden_size=width, num_hidden_layers=layers, state_size=states, expand=2,
            head_dim=head, num_heads=2 * width // head, n_groups=1, chunk_size=chunk,
            initializer_range=0.04, rescale_prenorm_residual=True,
        ),
    )  # fmt: skip


def _hybrid(width: int, layers: int, attention: list[int], head: int, states: int) -> Shape:
    return Shape(
        "language",
        _language(
            "Bamba", hidden_size=width, num_hidden_layers=layers, intermediate_size=8 * width // 3,
            attn_layer_indices=attention, num_attention_heads=width // head,
            num_key_value_heads=max(1, width // head // 3), mamba_expand=2, mamba_d_head=head,
            mamba_n_heads=2 * width // head, mamba_d_state=states, mamba_n_groups=1,
            mamba_chunk_size=64, initializer_range=0.03,
        ),
    )  # fmt: skip


def _vision(width: int, depth: int, patch: int, states: int = 16) -> Shape:
    def make(classes: int) -> nn.Module:
        return VisionMamba(
            width, depth=depth, num_classes=classes, image_size=IMAGE_SIZE, patch_size=patch,
            d_state=states,
        )  # fmt: skip

    return Shape("vision", make, 1e-3)


SHAPES: dict[str, Shape] = {
    "mamba1-31m": _mamba1(512, 16, 16),
    "mamba2-31m": _mamba2(512, 16, 64, 64, 128),
    "mamba1-10m": replace(_mamba1(384, 8, 16), learning_rate=3e-3),
    "mamba2-10m": replace(_mamba2(384, 8, 64, 32, 128), learning_rate=3e-3),
    "hybrid-29m": _hybrid(384, 12, [3, 8], 32, 64),
    "vim-tiny": _vision(192, 24, 4),
    "vim-3m": _vision(192, 12, 4),
    "mamba1-toy": _mamba1(32, 2, 4),
    "mamba2-toy": _mamba2(32, 2, 8, 16, 16),
    "hybrid-toy": _hybrid(48, 2, [1], 16, 8),
    "vim-toy": _vision(32, 2, 8, 4),
}
"""At a vocabulary of 8192 the ``…m`` have about as many million parameters as they are called."""


def build(name: str, outputs: int, seed: int = 0) -> nn.Module:
    """Make a base with random weights, fp32 on the CPU.

    Args:
        name: One of :data:`SHAPES`.
        outputs: Tokens of the vocabulary, or classes.
        seed: Of the weights.

    Raises:
        ValueError: An unknown name.
    """
    if name not in SHAPES:
        raise ValueError(f"base: expected one of {', '.join(SHAPES)}, got {name!r}")
    torch.manual_seed(seed)
    return SHAPES[name].make(outputs)


@dataclass
class Base:
    """A pretrained base, ready to be adapted.

    Attributes:
        name: What rows call it.
        kind: ``"language"`` or ``"vision"``.
        model: In fp32, on the CPU, in evaluation mode.
        tokenizer: Of a language base; None for vision.
        card: What is known of it.
    """

    name: str
    kind: str
    model: Any
    tokenizer: Any
    card: Mapping[str, Any]


def save_base(
    model: Any, folder: Path, card: Mapping[str, Any], tokenizer_from: Path | None
) -> None:
    """Write a base: transformers' format (or ``vision.safetensors``), and ``base.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_from is None:
        state = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
        save_file(state, folder / "vision.safetensors")
    else:
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    (folder / "base.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def load_base(folder: Path | str) -> Base:
    """Load a base.

    Args:
        folder: What :func:`save_base` wrote, or ``"embedded"`` for the package's own model.

    Raises:
        ValueError: No base is there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if str(folder) == "embedded":
        from prodial_kernels.embedded import embedded_model_path

        path = Path(embedded_model_path())
        card: dict[str, Any] = {"name": "embedded", "kind": "language"}
    else:
        path = Path(folder)
        if not (path / "base.json").is_file():
            raise ValueError(f"base: expected base.json in {path}; `export` a pretraining there")
        card = json.loads((path / "base.json").read_text(encoding="utf-8"))
    if card["kind"] == "vision":
        model: Any = build(card["shape"], card["outputs"])
        model.load_state_dict(load_file(path / "vision.safetensors"))
        return Base(card["name"], "vision", model.eval(), None, card)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Base(card["name"], "language", model.eval(), tokenizer, card)
