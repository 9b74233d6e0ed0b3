"""Releases of libraries that are not as expected: said in one sentence, and right nevertheless."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial, upstream
from prodial_kernels.models import patch_point
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.recompute import apply_levels
from prodial_kernels.models.mixers import mamba2_scan, recomputed_norm
from prodial_kernels.models.mixers.arguments import cache_among, named_arguments
from prodial_kernels.models.mixers.structure import names_in, times_read, unknown_in, weight_reads
from prodial_kernels.ops import operators
from support.mixers import adapted_mamba_ssm, cuda_stand_ins, mamba_ssm_stand_ins, vim_stand_in
from support.mixers.adapted_families import (
    adapt,
    assert_alive_and_equal,
    fused_mixers,
    install_mamba_ssm,
    install_stand_in,
)
from support.models import FAMILIES, FUSED_FAMILIES, build, token_ids, training_step

ROOT = Path(__file__).parents[3]
SENTENCE = r"prodial_kernels is tested with {} \S+( to \S+)?; this is "


# --- What is said. ------------------------------------------------------------------------------


def test_the_sentence() -> None:
    oldest, newest = upstream.TESTED["transformers"]
    import transformers

    assert upstream.tested_with("transformers") == (
        f"prodial_kernels is tested with transformers {oldest} to {newest}; "
        f"this is {transformers.__version__}"
    )
    assert re.match(SENTENCE.format("mamba_ssm"), upstream.tested_with("mamba_ssm"))
    with pytest.warns(upstream.UpstreamWarning, match=r"^It hums; " + SENTENCE.format("torch")):
        upstream.warn("torch", "It hums")
    assert isinstance(upstream.error("torch", "It hums"), RuntimeError)
    assert upstream.library_of(nn.Linear) == "torch"
    assert upstream.library_of(Path) is upstream.library_of(test_the_sentence) is None


def test_the_oldest_tested_releases_are_the_oldest_that_pip_takes() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for library, (oldest, _) in upstream.TESTED.items():
        bound = re.search(rf'"{library.replace("_", "-")}>=([\d.]+)', project)
        assert bound is not None, library
        assert f"{oldest}.".startswith(f"{bound[1]}."), library


def test_the_readme_and_ci_name_the_tested_releases() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for library, releases in upstream.TESTED.items():
        oldest, newest = releases
        named = oldest if oldest == newest else f"{oldest} to {newest}"
        assert f"{library} {named}" in readme
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"for release in {upstream.TESTED['transformers'][0]} " in ci


# --- The installed transformers. ----------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_no_policy_names_an_argument_that_upstream_lacks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
    create = patch_point.AdaptedMixer.__init__

    def recorded(self: Any, mixer: nn.Module, policies: Any) -> None:
        taken.extend((policy, getattr(type(mixer), name)) for name, policy in policies.items())
        create(self, mixer, policies)

    monkeypatch.setattr(patch_point.AdaptedMixer, "__init__", recorded)
    model = adapt(name)
    fuse_norms(model)
    apply_levels(model, ["checkpoint"] * len(blocks_of(model)))
    assert len(taken) > len(blocks_of(model))
    for policy, method in taken:
        first, second, *own = inspect.signature(policy).parameters.values()
        assert (first.name, second.name) in [("mixer", "upstream"), ("block", "upstream"),
                                             ("norm", "upstream")]  # fmt: skip
        known = inspect.signature(method).parameters
        for parameter in own:
            handed_on = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            assert handed_on or parameter.name in known, (policy, parameter.name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tested_release_is_not_warned_of(name: str) -> None:
    targets = ("in_proj", "out_proj", "x_proj", "dt_proj")
    model = build(name)
    present = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", upstream.UpstreamWarning)
        apply_prodial(
            model, ProdialConfig(r=2, target_modules=[t for t in targets if t in present])
        )


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_what_the_paths_rely_on_is_there(name: str) -> None:
    for mixer in fused_mixers(build(name)):
        forward = type(mixer).forward
        assert times_read(forward, "training") == 1
        arguments = named_arguments(forward, [None] * 3, {})
        assert len(arguments) == 3
        assert cache_among(dict.fromkeys(arguments, object())) is not None


# --- Another release of transformers. -----------------------------------------------------------


def rewritten(
    monkeypatch: pytest.MonkeyPatch, name: str, *changes: tuple[str, str]
) -> type[nn.Module]:
    """Replace a family's mixer's ``forward`` by one whose source has been changed."""
    cls = type(fused_mixers(build(name))[0])
    forward = inspect.unwrap(cls.forward)
    source = textwrap.dedent(inspect.getsource(forward))
    source = "\n".join(line for line in source.splitlines() if not line.startswith("@"))
    for pattern, replacement in changes:
        source, times = re.subn(pattern, replacement, source)
        assert times, pattern
    scope: dict[str, Any] = {}
    exec(compile(source, "<rewritten>", "exec"), forward.__globals__, scope)
    monkeypatch.setattr(cls, "forward", scope["forward"])
    return cls


def fused_step_of_mamba(monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> None:
    """An adapted Mamba without a cache gives what it gave; on our block, or on separate kernels."""
    model = adapt("mamba")
    cuda_stand_ins.install(monkeypatch)
    mixers = fused_mixers(model)
    hidden = torch.randn(2, 7, 16)
    output = mixers[0](hidden)
    assert cuda_stand_ins.calls["scan_fwd"] == int(fused)
    torch.testing.assert_close(output, mixers[0].eval()(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spelling", ["layer_cache", "past", "recurrent_states"])
def test_another_name_of_the_cache(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(monkeypatch, "mamba", (r"\b(cache|cache_params)\b", spelling))
    model = adapt("mamba")
    cuda_stand_ins.install(monkeypatch)
    mixer, hidden = fused_mixers(model)[0], torch.randn(2, 7, 16)
    mixer(hidden)
    assert cuda_stand_ins.calls["scan_fwd"] == 1
    cache = transformers_cache(model)
    mixer(hidden, **{spelling: cache})
    assert cuda_stand_ins.calls["scan_fwd"] == 1
    assert cache.layers[0].is_conv_states_initialized is not False


def transformers_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def test_an_argument_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(monkeypatch, "mamba", (r"\*\*kwargs,\s*\)", "future=None, **kwargs)"))
    with pytest.warns(
        upstream.UpstreamWarning,
        match=r"MambaMixer: its forward takes future, which is unknown: it trains on separate "
        rf"kernels; {SENTENCE.format('transformers')}",
    ):
        fused_step_of_mamba(monkeypatch, fused=False)


def test_a_part_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our block would leave it out."""
    cls = rewritten(monkeypatch, "mamba", (r"self\.act\b|dtype = ", "self.later; dtype = "))
    monkeypatch.setattr(cls, "later", property(lambda self: self.conv1d), raising=False)
    with pytest.warns(upstream.UpstreamWarning, match="reads later, which is unknown"):
        fused_step_of_mamba(monkeypatch, fused=False)


def test_without_the_function_that_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(monkeypatch, "mamba", (r"apply_mask_to_padding_states", "_masked"))
    modeling = sys.modules[type(build("mamba")).__module__]
    masked = modeling.apply_mask_to_padding_states
    monkeypatch.setattr(modeling, "_masked", masked, raising=False)
    monkeypatch.delattr(modeling, "apply_mask_to_padding_states")
    with pytest.warns(upstream.UpstreamWarning, match="no apply_mask_to_padding_states"):
        fused_step_of_mamba(monkeypatch, fused=False)


def test_training_that_means_more_than_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(monkeypatch, "falcon_mamba", (r"dtype = ", "self.training; dtype = "))
    with pytest.warns(upstream.UpstreamWarning, match=r"reads self\.training 2 times, and"):
        adapt("falcon_mamba")


def test_another_fused_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, because the weight of an adapted layer is W', but slow, which is said."""
    expected = training_step(adapt("mamba2"), token_ids())
    calls = install_stand_in(monkeypatch, "mamba2")
    modeling = sys.modules[type(build("mamba2")).__module__]
    name = "mamba2_split_conv1d_scan_combined"
    rewritten(monkeypatch, "mamba2", (rf"\b{name}\b", "ssd_fused"))
    monkeypatch.setattr(modeling, "ssd_fused", getattr(modeling, name), raising=False)
    with pytest.warns(upstream.UpstreamWarning, match=r"forward\(\) reads out_proj\.weight for a"):
        model = adapt("mamba2")
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == 2


def test_a_fused_function_that_goes_on_without_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, "mamba2")
    modeling = sys.modules[type(build("mamba2")).__module__]
    monkeypatch.setattr(
        modeling, "mamba2_split_conv1d_scan_combined", lambda x, *_, **__: x[..., :5]
    )
    with pytest.raises(upstream.UpstreamError, match="does not return the 32 features that out_"):
        training_step(adapt("mamba2"), token_ids())


def test_what_else_a_mixer_might_ask_the_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, "mamba2")
    with monkeypatch.context() as patch:
        rewritten(patch, "mamba2", (r"dtype = ", "self.out_proj.in_features; dtype = "))
        training_step(adapt("mamba2"), token_ids())
    rewritten(monkeypatch, "mamba2", (r"dtype = ", "self.out_proj.gain; dtype = "))
    with pytest.raises(AttributeError, match="asked out_proj for 'gain' in training; prodial_k"):
        training_step(adapt("mamba2"), token_ids())


def test_decorators_of_a_forward_stay() -> None:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def decorated(*args: Any, **kwargs: Any) -> Any:
            return ("decorated", function(*args, **kwargs))

        return decorated

    @decorate
    @decorate
    def forward(x: int, *, y: int = 2) -> Any:
        return ROOT, x, y

    assert patch_point.rebound(forward, ROOT=3)(1) == ("decorated", ("decorated", (3, 1, 2)))
    assert forward(1)[1][1][0] is ROOT

    class Called:
        __wrapped__ = forward

        def __call__(self) -> None:
            pass

    for strange in (Called(), functools.wraps(forward)(lambda *args: None)):
        with pytest.raises(upstream.UpstreamError, match="is decorated in a way that cannot"):
            patch_point.rebound(strange, ROOT=3)


@pytest.mark.filterwarnings("ignore:`cache_params` is deprecated:FutureWarning")
def test_an_old_name_of_the_cache_reaches_a_fused_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decorator of transformers' renames it, which must not be left out."""
    model = adapt("mamba2")
    calls = install_mamba_ssm(monkeypatch, "mamba2")
    mixer, hidden = fused_mixers(model)[0], torch.randn(2, 7, 16)
    mixer(hidden)
    assert len(calls) == 1
    cache = transformers_cache(model)
    mixer(hidden, cache_params=cache)
    assert len(calls) == 1
    assert cache.has_previous_state(0)


# --- Reading code. ------------------------------------------------------------------------------


class Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.width = nn.Linear(2, 2), 2

    def forward(self, x: Tensor, cache: Any = None, padding_mask: Any = None) -> Tensor:
        return self.in_proj(x)[: self.width].float()


class Renamed(Known):
    def forward(self, x: Tensor, length: int = 0) -> Tensor:
        return self.in_proj(x)


class Method(Known):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.in_proj(x))

    def finish(self, x: Tensor) -> Tensor:
        return x


class Part(Known):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.in_proj(x) * self.gain


class Unread(Part):
    forward = Known.forward


@pytest.mark.parametrize(
    ("cls", "problem"),
    [
        (Known, None), (Unread, None), (Renamed, "its forward takes length, which is unknown"),
        (Method, "its forward calls finish(), which is unknown"),
        (Part, "its forward reads gain, which is unknown"),
    ],
)  # fmt: skip
def test_unknown_in(cls: type[nn.Module], problem: str | None) -> None:
    assert unknown_in(cls(), cls.forward, parts=("in_proj",)) == problem
    assert unknown_in(cls(), cls.forward, parts=("in_proj", "w")) == "it has no w"


def test_reads_are_found_below_decorators() -> None:
    class Decorated(Known):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.in_proj.weight

    assert list(weight_reads(Decorated, ["in_proj"])) == [("forward", "in_proj")]
    assert list(weight_reads(Decorated, [])) == []
    assert "in_proj" in names_in(Decorated.forward)


def test_reads_are_found_in_functions_within() -> None:
    class Nested(Known):
        def forward(self, x: Tensor) -> Tensor:
            def project() -> Tensor:
                return x @ self.in_proj.weight

            return project()

    assert list(weight_reads(Nested, ["in_proj"])) == [("forward", "in_proj")]


def test_a_mixer_of_a_known_library_is_refused_with_its_release() -> None:
    class Later(Known):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.in_proj.weight

    Later.__module__ = "mamba_ssm.modules.later"
    with pytest.raises(ValueError, match=rf"self\.in_proj\(x\) \({SENTENCE.format('mamba_ssm')}"):
        apply_prodial(nn.Sequential(Later()), ProdialConfig(r=1, target_modules=("in_proj",)))


# --- Other releases of mamba_ssm, causal-conv1d, Vim. --------------------------------------------


mamba_inner_fn = mamba_inner_fn_no_out_proj = None  # Read by what follows, for its names.
mamba_forward = mamba_ssm_stand_ins.Mamba.forward


def later_mamba_forward(
    self: Any, hidden_states: Tensor, inference_params: Any = None, twice: Any = None
) -> Tensor:
    """As of a release that fuses and takes one argument more."""
    assert self.in_proj is not mamba_inner_fn
    output = mamba_forward(self, hidden_states, inference_params)
    return output if twice is None else 2 * output


def test_a_mamba_that_takes_more_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    monkeypatch.setattr(mamba_ssm_stand_ins.Mamba, "forward", later_mamba_forward)
    with pytest.warns(upstream.UpstreamWarning, match="Mamba: its forward takes twice, which is"):
        model = adapted_mamba_ssm.adapted(mamba_ssm_stand_ins.Mamba)
    mixer = next(m for m in model.modules() if isinstance(m, mamba_ssm_stand_ins.Mamba))
    x = torch.randn(2, 7, mixer.d_model, dtype=torch.float64)
    output = mixer(x, twice=True)
    assert cuda_stand_ins.calls["scan_fwd"] == 0
    torch.testing.assert_close(output, 2 * mixer(x))


def test_a_rule_of_mamba2_that_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's own function is called, and the projector after it."""
    rule = mamba_ssm_stand_ins.MambaSplitConv1dScanCombinedFn
    expected = adapted_mamba_ssm.adapted(mamba_ssm_stand_ins.Mamba2)(adapted_mamba_ssm.token_ids())
    forward = rule.forward

    def later(ctx: Any, *arguments: Any, more: Any = None) -> Tensor:
        return forward(ctx, *arguments)

    monkeypatch.setattr(rule, "forward", staticmethod(later))
    mamba2_scan.difference.cache_clear()
    with pytest.warns(upstream.UpstreamWarning, match="take different arguments"):
        model = adapted_mamba_ssm.adapted(mamba_ssm_stand_ins.Mamba2)
    torch.testing.assert_close(model(adapted_mamba_ssm.token_ids()), expected)
    monkeypatch.undo()
    mamba2_scan.difference.cache_clear()


def test_cuda_functions_that_take_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    import selective_scan_cuda
    from causal_conv1d import cpp_functions

    model = adapt("mamba")
    monkeypatch.setattr(selective_scan_cuda, "fwd", lambda u: None)
    with pytest.raises(
        upstream.UpstreamError,
        match=r"selective_scan_cuda\.fwd\(\) takes other arguments than it did "
        rf"\(.*\); {SENTENCE.format('mamba_ssm')}",
    ):
        training_step(model, token_ids())
    monkeypatch.delattr(cpp_functions, "causal_conv1d_fwd_function")
    with pytest.raises(upstream.UpstreamError, match=r"cpp_functions has no causal_conv1d_fwd_f"):
        training_step(model, token_ids())


vim_forward = vim_stand_in.Mamba.forward


class LaterVim(vim_stand_in.Mamba):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.later = nn.Parameter(torch.ones(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        assert (self.bimamba_type, self.out_proj) != mamba_inner_fn_no_out_proj
        return vim_forward(self, hidden_states) * self.later


def test_vim_with_a_part_that_came_later() -> None:
    with pytest.raises(ValueError, match=r"reads later, which is unknown to prodial_kernels"):
        apply_prodial(nn.Sequential(LaterVim(6)), ProdialConfig(r=2))


def test_vim_with_more_than_its_input() -> None:
    model = nn.Sequential(vim_stand_in.Mamba(6))
    apply_prodial(model, ProdialConfig(r=2))
    x = torch.randn(2, 7, 6)
    assert torch.equal(model[0](hidden_states=x), model(x))
    with pytest.raises(ValueError, match="called with more than its input"):
        model[0](x, None, torch.ones(1))


# --- Without what is private to torch. ----------------------------------------------------------


def test_without_the_count_of_dispatch_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not operators.dispatched((torch.ones(1), None))
    monkeypatch.setattr(operators, "_DISPATCH_MODES", None)
    assert operators.dispatched((torch.ones(1), None))


def test_without_the_stack_of_hooks_a_mixer_keeps_its_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not recomputed_norm._saved_tensors_are_hooked()
    monkeypatch.setattr(recomputed_norm, "_TOP_HOOKS", None)
    assert recomputed_norm._saved_tensors_are_hooked()
