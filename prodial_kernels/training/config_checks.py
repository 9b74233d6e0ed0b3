"""What options of a fine-tuning run say of each other, as far as no model is needed to tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prodial_kernels.training.config_values import ConfigError
from prodial_kernels.training.sizes import parse_budget

MOST_TOKENS_IN_A_STEP = 2**26
"""The largest product of batch_size, seq_len and grad_accumulation."""


def check_together(
    config: Any, *, sizes: Mapping[str, Any], adapter_options: Iterable[str]
) -> None:
    """Raise where options contradict each other.

    Args:
        config: A ``FinetuneConfig``, each of whose options is possible by itself.
        sizes: The sizes of a step that are not given.
        adapter_options: Names of the options that an adapter has.

    Raises:
        ConfigError: Names the options, and what to do.
    """
    if not 0.0 < config.held_out_fraction < 1.0:
        raise ConfigError(
            f"`held_out_fraction` must lie between 0 and 1, got {config.held_out_fraction}"
        )
    if config.lora_dropout is not None and not 0.0 <= config.lora_dropout < 1.0:
        raise ConfigError(
            f"`lora_dropout` must be at least 0 and less than 1, got {config.lora_dropout}"
        )
    if config.steps is not None and config.epochs is not None:
        raise ConfigError(
            f"give `steps` or `epochs`, not both (got {config.steps} and {config.epochs:g})"
        )
    if config.n_blocks is not None and config.block_size is not None:
        raise ConfigError("give `n_blocks` or `block_size`, not both")
    if config.memory_budget is not None:
        try:
            parse_budget(config.memory_budget)
        except ValueError as error:
            raise ConfigError(f"`memory_budget`: {error}") from error
    if config.gradient_checkpointing and config.activations not in ("auto", "checkpoint"):
        raise ConfigError(
            "`gradient_checkpointing` means `activations` 'checkpoint', and contradicts "
            f"`activations` {config.activations!r}; give one of them"
        )
    if config.method == "full" and config.impl != "auto":
        raise ConfigError(
            "`impl` says how adapted projectors are computed, and `method` 'full' adapts none; "
            "leave it out"
        )
    options = (*adapter_options, "quantize")
    given = [name for name in options if getattr(config, name) is not None]
    if config.method == "full" and given:
        named = ", ".join(f"`{name}`" for name in given)
        raise ConfigError(
            f"`method` 'full' trains every weight and has no adapter: leave out {named}, or take "
            "another method"
        )
    _check_step(config, sizes)
    without = config.train_scale is False and config.train_diagonal is False
    if config.r == 0 and (without or config.method == "lora"):
        raise ConfigError(
            "nothing would be trained: `r` is 0, and there is neither an output scale nor a "
            "diagonal factor; give a larger `r`"
            + ("" if config.method == "lora" else ", or leave one of them on")
        )
    if config.lora_alpha == 0 and config.r != 0:
        raise ConfigError(
            "`lora_alpha` 0 multiplies A and B by 0, and they would learn nothing: leave it out"
            + ("" if config.method == "lora" else ", or leave A and B out with `r` 0")
        )


def _check_step(config: Any, sizes: Mapping[str, Any]) -> None:
    given = {name: getattr(config, name) for name in ("batch_size", "seq_len", "grad_accumulation")}
    step = {name: sizes[name] if value is None else value for name, value in given.items()}
    tokens = math.prod(step.values())
    if tokens > MOST_TOKENS_IN_A_STEP:
        product = " × ".join(f"`{name}` {size:,}" for name, size in step.items())
        raise ConfigError(
            f"{product} are {tokens:,} tokens in a step; it must be at most "
            f"{MOST_TOKENS_IN_A_STEP:,}"
        )
