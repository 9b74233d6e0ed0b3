"""The embedded model's shape, how it is stored, and which Mamba-2 code path runs it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_model", "has_fused_kernels", "limit_autotuning", "save_model", "torch_path"]

_KERNEL_FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba2_chunk_scan",
    "mamba2_selective_state_update",
    "mamba2_split_conv1d_scan_combined",
)


def build_model(vocab_size: int, hidden_size: int = 192, num_layers: int = 8) -> Any:
    """Create the untrained ``Mamba2ForCausalLM``.

    The shape is chosen for training on a CPU: on transformers' PyTorch path the time goes with
    ``chunk_size`` and ``num_heads`` as much as with the parameters, so both are small. The widths
    of ``in_proj`` and the convolution are multiples of 8, which the CUDA convolution requires.

    Args:
        vocab_size: Number of tokens; token 0 is bos, eos and pad.
        hidden_size: Model width; a multiple of 8.
        num_layers: Number of blocks.

    Returns:
        The model in float32, on the CPU, with tied embeddings.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        state_size=32,
        expand=2,
        num_heads=8,
        head_dim=hidden_size // 4,
        n_groups=1,
        conv_kernel=4,
        chunk_size=32,
        initializer_range=0.04,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Mamba2ForCausalLM(config)
    # The scaling above belongs to the initialisation alone, but from_pretrained would apply it to
    # the loaded out_proj weights again.
    model.config.rescale_prenorm_residual = False
    return model


def save_model(model: Any, folder: Path) -> None:
    """Write a model in transformers' format, its matrices in float16.

    Vectors (norms, biases, ``A_log``, ``D``, ``dt_bias``) stay in float32: they are a percent of
    the bytes. ``config.json`` says float32, so that ``from_pretrained`` computes in float32.

    Args:
        model: A ``Mamba2ForCausalLM`` in float32, on any device.
        folder: Where to write ``config.json``, ``generation_config.json``, ``model.safetensors``.
    """
    state = {
        name: value.detach().to("cpu", torch.float16 if value.dim() > 1 else torch.float32)
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    # It only shapes the initial values, but transformers 5.23 applies it to loaded weights as well:
    # every from_pretrained would divide the trained out_proj by sqrt(num_layers).
    model.config.rescale_prenorm_residual = False
    model.save_pretrained(folder, state_dict=state)


def has_fused_kernels() -> bool:
    """Whether transformers runs Mamba-2 training on mamba_ssm's kernels here."""
    from transformers.models.mamba2 import modeling_mamba2

    if not torch.cuda.is_available():
        return False
    fused = modeling_mamba2.mamba2_split_conv1d_scan_combined
    implementation = inspect.getclosurevars(fused).nonlocals.get("implementation")
    return getattr(implementation, "__module__", "").startswith("mamba_ssm")


@contextmanager
def torch_path() -> Iterator[None]:
    """Make transformers run Mamba-2 in plain PyTorch, even where mamba_ssm is installed."""
    from transformers.models.mamba2 import modeling_mamba2

    saved = {name: getattr(modeling_mamba2, name) for name in _KERNEL_FUNCTIONS}
    for name, function in saved.items():
        setattr(modeling_mamba2, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(modeling_mamba2, name, function)


def limit_autotuning() -> int:
    """Leave each mamba_ssm Triton kernel three launch candidates that suit a narrow model.

    Every candidate costs a compilation at first use, more than a minute in all; large tiles cannot
    win at a head size of 48 and a state size of 32.

    Returns:
        The number of kernels changed.
    """
    from mamba_ssm.ops.triton import (
        ssd_bmm,
        ssd_chunk_scan,
        ssd_chunk_state,
        ssd_combined,
        ssd_state_passing,
    )

    changed = 0
    for module in (ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing):
        for kernel in vars(module).values():
            configs = getattr(kernel, "configs", None)
            if isinstance(configs, list) and len(configs) > 3:
                kernel.configs = [configs[-1], configs[-2], configs[len(configs) // 2 - 1]]
                changed += 1
    return changed
