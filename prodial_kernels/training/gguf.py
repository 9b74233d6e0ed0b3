"""What becomes of a merged model as a GGUF file, told by its configuration before it is loaded.

llama.cpp's ``convert_hf_to_gguf.py`` makes one from transformers' format, so nothing is written
here. Read from that converter (ggml-org/llama.cpp, ``conversion/mamba.py`` at 32e9e044 and
``conversion/granite.py`` at 010f22d8) and from gguf 0.19.0, 2026-11.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

# Mamba families of transformers that the converter has no architecture for.
_UNKNOWN = ("zamba", "zamba2")
# Those of which it takes d_inner for twice the width.
_TWICE = ("mamba", "mamba2", "falcon_mamba")


class GGUFError(ValueError):
    """A model cannot become a GGUF file that computes the same."""


def gguf_notes(config: Any) -> list[str]:
    """Check that llama.cpp's converter takes a model, and return what is to be known of the file.

    Args:
        config: The model's configuration, of transformers.

    Returns:
        A line each; empty where nothing is known against it.

    Raises:
        GGUFError: The converter has no architecture for the model, or refuses its sizes.
    """
    kind = getattr(config, "model_type", "")
    if kind in _UNKNOWN:
        raise GGUFError(
            f"llama.cpp's converter has no architecture for {kind} (gguf 0.19), so there would be "
            "nothing to convert the merged model with; leave --for out"
        )
    if kind in _TWICE:
        width = config.hidden_size
        inner = int(config.expand * width)
        if inner != 2 * width:
            raise GGUFError(
                f"llama.cpp's converter takes {kind} models whose inner width is twice the hidden "
                f"one only: {inner} here, of {width}; leave --for out"
            )
    return list(_notes(config, kind))


def _notes(config: Any, kind: str) -> Iterator[str]:
    if kind == "falcon_mamba":
        yield (
            "a GGUF file calls Falcon-Mamba 'mamba' and says by ssm.dt_b_c_rms that B, C and dt "
            "are normed: llama.cpp obeys, but transformers' own reader of GGUF files does not, and "
            "computes a plain Mamba without a word"
        )
    low, high = _limits(config, kind)
    if low > 0 or high < math.inf:
        yield (
            f"this model limits dt to {low:g} … {high:g}, for which GGUF has no field: what runs "
            "the file computes without the limits"
        )


def _limits(config: Any, kind: str) -> tuple[float, float]:
    if kind == "nemotron_h":
        return float(config.time_step_min), math.inf
    limits = getattr(config, "time_step_limit", None)
    return (0.0, math.inf) if limits is None else (float(limits[0]), float(limits[1]))
