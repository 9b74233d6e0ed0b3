"""A checkpoint's configuration and tensors as loading by transformers would make them.

Two things differ from what is in the files: mamba_ssm's own format (:mod:`.mamba_ssm_format`), and
the setting ``rescale_prenorm_residual``, by which transformers divides every ``out_proj`` of some
models whenever it loads them. The setting shapes initial values only, but what transformers makes
of loaded weights is the model that its users know.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prodial_kernels.models.loading.mamba_ssm_format import (
    TOKENIZER,
    config_of,
    has_its_names,
    is_mamba_ssm,
    published_vocabulary,
    renamed,
)
from prodial_kernels.quantization import TensorFiles
from prodial_kernels.quantization.groups.checkpoints import Tensors
from prodial_kernels.quantization.saving import RESCALING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_RESCALED = ("mamba", "mamba2", "falcon_mamba")


def read_configuration(source: Path | str, **options: Any) -> PretrainedConfig:
    """Read the configuration of a checkpoint in transformers' or mamba_ssm's format.

    Args:
        source: A directory or a hub id.
        options: For transformers' ``from_pretrained``.

    Raises:
        OSError: It is not there.
        ValueError: It asks for what transformers does not have.
    """
    from transformers import AutoConfig

    content = _content(source, options)
    if content is not None:
        return config_of(content)
    config: PretrainedConfig = AutoConfig.from_pretrained(source, **options)
    return config


def read_tokenizer(
    source: Path | str, config: PretrainedConfig, **options: Any
) -> tuple[PreTrainedTokenizerBase, bool]:
    """Read the tokenizer of a checkpoint; and whether it is the checkpoint's own.

    mamba_ssm's format has none. One that was saved beside it is taken; else, for a vocabulary of
    that size, the one of the models that mamba_ssm's authors published, with a warning.

    Raises:
        OSError, ValueError: There is none that can be read.
    """
    from transformers import AutoTokenizer

    content = _content(source, options)
    if content is None:
        return AutoTokenizer.from_pretrained(source, **options), True
    if _has_tokenizer(source, options):
        # transformers asks the configuration for the class, which this config.json does not name.
        return AutoTokenizer.from_pretrained(source, config=config, **options), True
    if not published_vocabulary(content):
        raise ValueError("mamba_ssm's format holds none, and none was saved beside it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, **options)
    except Exception as error:
        raise ValueError(
            f"mamba_ssm's format holds none, and {TOKENIZER}, which the published models of its "
            "authors use, cannot be fetched"
        ) from error
    warnings.warn(
        f"{source} is in mamba_ssm's format, which holds no tokenizer; that of {TOKENIZER} is "
        "used, as for the models that mamba_ssm's authors published. Save another one there to "
        "have it used",
        stacklevel=3,
    )
    return tokenizer, False


def is_named_as_mamba_ssm(tensors: TensorFiles) -> bool:
    """Whether a checkpoint's tensors have mamba_ssm's names; transformers would not find them."""
    return has_its_names(tensors)


def rescaled(config: PretrainedConfig) -> bool:
    """Whether transformers changes the weights of a checkpoint whenever it loads them."""
    return bool(getattr(config, RESCALING, False)) and config.model_type in _RESCALED


class AsTransformers(Mapping[str, Tensor]):
    """Name -> tensor, by transformers' names, with the values that it would have after loading."""

    def __init__(self, tensors: Tensors, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """Look up the names.

        Args:
            tensors: The checkpoint's.
            config: The model's.
            dtype: What weights are cast to before they are changed.
        """
        self._tensors, self._dtype = tensors, dtype
        self._names = {renamed(name): name for name in tensors}
        self._divisor = math.sqrt(config.num_hidden_layers) if rescaled(config) else 1.0

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor = self._tensors[self._names[name]]
        if self._divisor != 1 and name.endswith(".out_proj.weight"):
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{name} is stored quantised, and config.json sets {RESCALING}, so that "
                    "transformers would divide its values when it loads them, which is not done "
                    "here; set it to false there if the weights are used as they are"
                )
            return tensor.to(self._dtype) / self._divisor
        return tensor

    def part(self, name: str, index: int) -> Tensor:
        """Read ``self[name][index]`` of a mixture's experts, alone; nothing of theirs is scaled."""
        return self._tensors.part(self._names[name], index)

    def __iter__(self) -> Iterator[str]:
        """Names, those of one file together."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)

    def dtype(self, name: str) -> str:
        """Dtype that a tensor is stored in, as safetensors calls it; nothing is read."""
        return self._tensors.dtype(self._names[name])


def _has_tokenizer(source: Path | str, options: Mapping[str, Any]) -> bool:
    file = "tokenizer_config.json"
    if isinstance(source, Path):
        return (source / file).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        offline = bool(options.get("local_files_only", False))
        hf_hub_download(source, file, local_files_only=offline)
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return False
    return True


def _content(source: Path | str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ``config.json`` holds if it is in mamba_ssm's format, else None."""
    from transformers import PretrainedConfig

    if isinstance(source, Path):
        try:
            content = json.loads((source / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            # Whoever reads it next says what is wrong.
            return None
    else:
        content, _ = PretrainedConfig.get_config_dict(source, **options)
        content = {name: value for name, value in content.items() if not name.startswith("_")}
    return content if isinstance(content, dict) and is_mamba_ssm(content) else None
