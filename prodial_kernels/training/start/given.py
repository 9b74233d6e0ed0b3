"""What a caller of ``finetune()`` hands in itself, instead of naming it in the configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prodial_kernels import embedded
from prodial_kernels.models.adapt.inject import remove_prodial
from prodial_kernels.models.adapt.state import is_adapted
from prodial_kernels.models.loading.load import EMBEDDED, LoadedModel, load_model
from prodial_kernels.training.config import ConfigError, FinetuneConfig, ResolvedConfig
from prodial_kernels.training.data.sources.objects import GIVEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Given:
    """Objects in the place of names; None for what the configuration names.

    Attributes:
        model: A causal language model of transformers, without an adapter.
        tokenizer: Its tokenizer, or one to use with the model that is named.
        data: Rows to train on, as ``data/sources/objects.py`` takes them.
        held_out: Rows to evaluate on.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    data: Any = None
    held_out: Any = None

    def noted_in(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return a configuration that says where objects took the place of names.

        Raises:
            ConfigError: Something is named and handed in, or cannot be trained.
        """
        changes: dict[str, Any] = {}
        if self.model is not None:
            changes["model"] = self._name(self.model, config)
        for name, rows in (("data", self.data), ("held_out", self.held_out)):
            named = getattr(config, name)
            if rows is None:
                continue
            if isinstance(rows, (str, os.PathLike)):
                raise ConfigError(
                    f"`{name}` handed in must be rows; the name of a file or data set goes into "
                    f"the configuration: FinetuneConfig({name}={str(rows)!r:.60})"
                )
            if named not in (getattr(FinetuneConfig, name), GIVEN):
                raise ConfigError(
                    f"`{name}` is {named!r} in the configuration, and handed in beside it; give it "
                    "once"
                )
            changes[name] = GIVEN
        return replace(config, **changes)

    def _name(self, model: Any, config: FinetuneConfig) -> str:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"`model` must be a causal language model of transformers, got a "
                f"{type(model).__name__}; of a wrapper give the model in it"
            )
        if is_adapted(model) or hasattr(model, "peft_config"):
            raise ConfigError(
                "`model` carries an adapter; merge or remove it first, or give the plain model and "
                "`init_adapter`"
            )
        if self.tokenizer is None:
            raise ConfigError("`model` is handed in without its tokenizer; give tokenizer= too")
        if model.dtype not in _DTYPES:
            raise ConfigError(
                f"`model` is in {model.dtype}; convert it first: model.float() or model.bfloat16()"
            )
        if config.quantize is not None:
            raise ConfigError(
                "`quantize` is for models that are loaded by name, tensor by tensor; quantise this "
                f"one first: prodial_kernels.quantize_model(model, {config.quantize!r})"
            )
        own = model.name_or_path
        name = own if own and own.isprintable() else type(model).__name__
        if own and Path(embedded.__file__).parent in Path(own).parents:
            name = EMBEDDED
        if config.model not in (FinetuneConfig.model, name):
            raise ConfigError(
                f"`model` is {config.model!r} in the configuration, and handed in beside it as "
                f"{name!r}; give it once"
            )
        return name

    def dtype(self, chosen: torch.dtype, config: FinetuneConfig) -> torch.dtype:
        """Return the compute dtype: with ``"auto"`` that of the model, where one is handed in."""
        auto = config.dtype == "auto" and config.method != "full"
        return self.model.dtype if self.model is not None and auto else chosen

    def load(
        self, config: ResolvedConfig, *, device: torch.device, dtype: torch.dtype
    ) -> LoadedModel:
        """Load the model that is named, or bring the one at hand to a device and dtype.

        ModelError as :func:`~prodial_kernels.models.loading.load.load_model`.
        """
        if self.model is None:
            loaded = load_model(
                config.model, device=device, dtype=dtype, quantize=config.quantize,
                quantize_modules=config.quantize_modules, keep_dense=config.modules_to_save or (),
                experts_on_host=config.experts == "host",
            )  # fmt: skip
            return loaded if self.tokenizer is None else replace(loaded, tokenizer=self.tokenizer)
        if self.tokenizer is None:
            raise ConfigError("`model` is handed in without its tokenizer; give tokenizer= too")
        stored = self.model.dtype
        model: Any = self.model.to(device=device)
        if stored != dtype:
            model = model.to(dtype=dtype)
        return LoadedModel(config.model, model.eval(), self.tokenizer, stored_dtype=stored)

    def give_back(self) -> None:
        """Take the adapter off the caller's model again, after a run that did not end well."""
        if self.model is not None and is_adapted(self.model):
            remove_prodial(self.model)
