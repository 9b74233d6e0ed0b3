"""``ProdialTuner``, PEFT's interface of a method: adding, switching, merging, removing adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from packaging.version import Version
from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from prodial_kernels.linear import forget_decoding_graphs
from prodial_kernels.models.adapt.combine import (
    Combination,
    check_combination,
    combination_of,
    fill_combination,
)
from prodial_kernels.models.adapt.families import adapt_mixers
from prodial_kernels.models.adapt.foreign_bases import (
    dense_between,
    has_foreign_bases,
    note_dense_layers,
)
from prodial_kernels.models.adapt.masters import make_masters
from prodial_kernels.models.adapt.snapshot import all_or_nothing
from prodial_kernels.models.adapt.targets import Target
from prodial_kernels.module_tree import place, replace_each
from prodial_kernels.peft.available import PEFT_VERSION
from prodial_kernels.peft.config import DEFAULT_TARGETS, ProdialPeftConfig
from prodial_kernels.peft.layer import ProdialPeftLinear
from prodial_kernels.peft.register import PREFIX
from prodial_kernels.peft.targets import check_lora_targets, find_layers, resolve_targets
from prodial_kernels.quantization.model import make_dense
from prodial_kernels.quantization.saving import release_saving, settle_configuration

_MIXERS = "_prodial_peft_mixers"
"""The attribute of an adapted model that holds what gives its mixers their own paths back."""
_MASTERS = "_prodial_peft_masters"
"""The attribute that holds what rounds the fp32 masters of ``modules_to_save`` again."""


class ProdialTuner(BaseTuner):
    """A model whose linear layers carry ProDiaL adapters: ``base_model`` of a ``PeftModel``."""

    prefix = PREFIX
    # PEFT's operations on the method's layers include LoRA's layers beside ours.
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, **options: Any
    ) -> None:
        """Put the first adapter into ``model``; PEFT calls it.

        Raises:
            ValueError: The model is adapted by another method, or the configuration does not fit.
        """
        self._new_layers: dict[nn.Module, Target] = {}
        if isinstance(peft_config, PeftConfig):
            _check_without_peft_model(model, peft_config)
        super().__init__(model, peft_config, adapter_name, **options)

    # --- Adding adapters. -----------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the layers that its configuration means; PEFT calls it.

        Raises:
            ValueError: The configuration does not fit the model, which is then as it was.
        """
        config = self._prepare_adapter_config(self.peft_config[adapter_name], {})
        resolve_targets(model, config)
        with _own_mixers(model), all_or_nothing(model):
            if state_dict is None:
                self._new_layers = find_layers(model, config, lambda path: _is_ours(config, path))
            else:
                paths = {name.rpartition(f".{PREFIX}")[0] for name in state_dict}
                self._new_layers = find_layers(model, config, paths.__contains__)
            if config.lora is not None:
                _require_two_methods()
                check_lora_targets(
                    model, config,
                    lambda path: _is_ours(config, path), lambda path: _is_lora(config, path),
                )  # fmt: skip
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )

    def _prepare_adapter_config(
        self, peft_config: ProdialPeftConfig, model_config: Any
    ) -> ProdialPeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = list(DEFAULT_TARGETS)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: ProdialPeftConfig, key: str) -> Any:
        return _is_lora(peft_config, key) or check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: ProdialPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if _is_lora(peft_config, current_key):
            _LoraBeside(self.model, self.active_adapters)._create_and_replace(
                peft_config.lora, adapter_name, target, target_name, parent, current_key=current_key
            )
            return
        options = peft_config.for_layer(current_key)
        if isinstance(target, ProdialPeftLinear):
            target.add_adapter(adapter_name, options)
            return
        new = self._new_layers[target]
        layer = ProdialPeftLinear(new.linear, new.original)
        layer.add_adapter(adapter_name, options)
        place(self.model, new.paths, layer)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep what ``modules_to_save`` trains in fp32 too; PEFT calls it after an injection."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        saved = [
            module.modules_to_save[adapter_name]
            for module in self.model.modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        ]
        parameters = [parameter for module in saved for parameter in module.parameters()]
        if autocast_adapter_dtype and parameters:
            made = make_masters(self.model, parameters)
            setattr(self.model, _MASTERS, [*vars(self.model).get(_MASTERS, ()), *made])

    # --- Several adapters. ----------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter active, and trainable but in ``inference_mode``.

        ValueError for several adapters that one layer has.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in _layers(self.model).values():
            layer.check_one_of(names)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        forget_decoding_graphs(self.model)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again; PEFT calls it after ``disable_adapter``."""
        super().enable_adapter_layers()
        forget_decoding_graphs(self.model)

    def disable_adapter_layers(self) -> None:
        """Switch every adapter off; PEFT calls it."""
        super().disable_adapter_layers()
        forget_decoding_graphs(self.model)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **_: Any,
    ) -> None:
        """Add an adapter whose effect is the weighted sum of others': W + Σ w_i (W'_i − W).

        Exact, up to rounding, where that sum has the form of an adapter: among adapters without
        s, and among adapters without D_b; plain LoRA is both. Ranks add up. Dropout is that of the
        first. The new adapter is not made active.

        Raises:
            ValueError: The sum is no adapter, an unknown adapter, or a name that is taken.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or adapter_name in self.peft_config:
            raise ValueError(
                f"adapters are {[*self.peft_config]}; cannot combine {adapters} as {adapter_name!r}"
            )
        if combination_type != "cat":
            raise ValueError(
                'combination_type must be "cat", the only one whose result is the weighted sum of '
                f"the adapters' effects, got {combination_type!r}"
            )
        configs = {name: self.peft_config[name] for name in adapters}
        check_combination(configs, weights)
        layers = _layers(self.model)
        form = combination_of(configs, weights, layers)
        self.peft_config[adapter_name] = _combined(next(iter(configs.values())), form)
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for layer in layers.values():
            if adapter_name in layer.adapter_names:
                fill_combination(layer, adapter_name, adapters, weights)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls it around every call, and takes its own arguments out of the model's."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names, an adapter for each row of a batch, is not supported by ProDiaL; "
                "call set_adapter and run the rows of each adapter by themselves"
            )
        yield

    # --- Removing adapters. ---------------------------------------------------------------------

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """``merge_and_unload`` and ``unload``: restore the model's layers and mixers."""
        for layer in _layers(self.model).values() if merge else ():
            layer.check_one_of(adapter_names or ())
        foreign = merge and has_foreign_bases(self.model)

        def plain(_: str, layer: ProdialPeftLinear) -> nn.Module:
            made = layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            return dense_between(self.model, layer, made) if type(made) is nn.Linear else made

        replace_each(self.model, ProdialPeftLinear, plain)
        # Before PEFT hands their weights on.
        inner: nn.Module = self.model
        for undo in vars(inner).pop(_MASTERS, ()):
            undo.remove()
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        for undo in vars(model).pop(_MIXERS, ()):
            undo.remove()
        # PEFT before 0.20 leaves it behind.
        vars(model).pop("peft_config", None)
        if merge:
            make_dense(model)
            settle_configuration(model)
            release_saving(model)
        if foreign:
            note_dense_layers(model)
        return model


class _LoraBeside(LoraModel):
    """PEFT's LoRA, creating layers in a model that another tuner manages."""

    def __init__(self, model: nn.Module, active_adapters: list[str]) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.active_adapter = active_adapters


def _combined(first: ProdialPeftConfig, form: Combination) -> ProdialPeftConfig:
    """Return the configuration of a combination, by exact paths."""
    return replace(
        first,
        target_modules=sorted(form.ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        r=max(form.ranks.values()),
        rank_pattern=form.ranks,
        lora_alpha=None,
        alpha_pattern=None,
        n_blocks=None,
        block_size=form.sizes,
        diagonal=form.diagonal,
        train_scale=form.train_scale,
        train_diagonal=form.train_diagonal,
    )


def _is_ours(config: ProdialPeftConfig, path: str) -> bool:
    return bool(check_target_module_exists(config, path))


def _is_lora(config: ProdialPeftConfig, path: str) -> bool:
    return config.lora is not None and bool(check_target_module_exists(config.lora, path))


def _check_without_peft_model(model: nn.Module, config: Any) -> None:
    """Raise ValueError for what transformers' ``load_adapter``, without ``PeftModel``, would lose.

    It logs, and does not raise, when a file's names fit no module.
    """
    instead = (
        "use get_peft_model, PeftModel.from_pretrained or AutoPeftModelForCausalLM.from_pretrained "
        "instead of inject_adapter_in_model or transformers' load_adapter, from_pretrained and "
        "pipeline"
    )
    if config.lora is not None:
        raise ValueError(
            f"LoRA beside ProDiaL needs a PeftModel, which loads the names of both; {instead}"
        )
    if Version("0.20") > PEFT_VERSION and hasattr(model, "load_adapter"):
        raise ValueError(
            f"PEFT {PEFT_VERSION} makes transformers look for tensors under names that a "
            f"{type(model).__name__} has not, and drop them; upgrade to PEFT 0.20 or newer, or "
            f"{instead}"
        )


def _require_two_methods() -> None:
    """Raise ValueError where PEFT saves only the tensors with one prefix."""
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        raise ValueError(
            f"LoRA beside ProDiaL needs PEFT 0.21 or newer, which saves both; this is "
            f"{PEFT_VERSION}: pip install --upgrade 'peft>=0.21'"
        )


def _layers(model: nn.Module) -> dict[str, ProdialPeftLinear]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ProdialPeftLinear)
    }


@contextmanager
def _own_mixers(model: nn.Module) -> Iterator[None]:
    """Restore the mixers' own classes meanwhile, then adapt the mixers of adapted layers."""
    for undo in vars(model).pop(_MIXERS, ()):
        undo.remove()
    try:
        yield
    finally:
        if _layers(model):
            setattr(model, _MIXERS, adapt_mixers(model))
