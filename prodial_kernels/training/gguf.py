"""What becomes of a merged model as a GGUF file, told by its configuration before it is loaded.

llama.cpp's ``convert_hf_to_gguf.py`` makes one from transformers' format; here the merged model is
named so that it can. Tried on 2026-12-01 with a tiny merged model of every family, in fp32: the
converter that llama-cpp-python 0.3.36 ships, with the transformers that it asks for (4.57.6), and
llama.cpp of xllamacpp 2026.10.11549 on a CPU. Largest difference of a log probability from
transformers 5.24's: Mamba and Mamba-2 3e-6, Nemotron-H 2e-5, Jamba and Granite 3e-4, Falcon-Mamba
5e-4 (its norms have another epsilon there), Falcon-H1 7e-4. What is refused below was seen to fail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Mamba families of transformers that the converter has no architecture for.
_UNKNOWN = ("zamba", "zamba2")
# Those of which it takes d_inner for twice the width.
_TWICE = ("mamba", "mamba2", "falcon_mamba")
# The options that give a mixer's projectors a bias.
_BIASES = ("use_bias", "mamba_proj_bias")
_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
"""What transformers 5 calls kinds of layers, and what the converter looks for."""


class GGUFError(ValueError):
    """A model cannot become a GGUF file that computes the same."""


def gguf_notes(config: Any) -> list[str]:
    """Check that llama.cpp's converter takes a model, and return what is to be known of the file.

    Args:
        config: The model's configuration, of transformers.

    Returns:
        A line each; empty where nothing is known against it.

    Raises:
        GGUFError: The converter has no architecture for the model or refuses its sizes, or its file
            is not loaded, or computes something else.
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
    biases = [name for name in _BIASES if getattr(config, name, False)]
    if biases:
        raise GGUFError(
            f"the projectors of this {kind} have biases ({', '.join(biases)}), which the converter "
            "writes and llama.cpp then refuses to load ('wrong number of tensors'); leave --for out"
        )
    rotated = _rotated_share(config)
    if kind == "bamba" and rotated != 1:
        raise GGUFError(
            f"this bamba rotates {rotated:g} of each head by position, and llama.cpp's converter "
            "orders queries and keys as if it were all: the file would load, and compute something "
            "else; leave --for out"
        )
    return list(_notes(config, kind))


def rename_for_converter(directory: Path) -> None:
    """Write the names that the converter and its transformers know, where newer ones have others.

    Granite's kinds of layers: by those of transformers 5 the converter finds no attention, and
    writes a file that llama.cpp cannot load. And the class of a tokenizer that is all in
    ``tokenizer.json``, which transformers 4 does not know. Every transformers reads the result.

    Args:
        directory: A model that ``save_pretrained`` wrote, with its tokenizer; changed in place.
    """
    config = directory / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.get("model_type") == "granitemoehybrid" and values.get("layer_types"):
        values["layer_types"] = [_LAYER_TYPES.get(kind, kind) for kind in values["layer_types"]]
        _write(config, values)
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        values = json.loads(tokenizer.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
            _write(tokenizer, values)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rotated_share(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("partial_rotary_factor", 1.0))


def _notes(config: Any, kind: str) -> Iterator[str]:
    if kind == "falcon_mamba":
        yield (
            "a GGUF file calls Falcon-Mamba 'mamba' and says by ssm.dt_b_c_rms that B, C and dt "
            "are normed: llama.cpp obeys, but transformers' own reader of GGUF files does not, and "
            "computes a plain Mamba without a word"
        )
    if kind == "granitemoehybrid":
        yield (
            "convert it with the transformers that llama.cpp's requirements name (4.57.6): a newer "
            "one renames the kinds of layers while it reads, the converter then finds no "
            "attention, and llama.cpp cannot load its file"
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
