"""Several named adapters in one model by the package's own functions, without PEFT."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    active_adapter,
    adapter_disabled,
    adapter_parameter_groups,
    add_adapter,
    add_weighted_adapter,
    apply_prodial,
    delete_adapter,
    list_adapters,
    merge_prodial,
    quantize_model,
    remove_prodial,
    set_adapter,
    using_adapter,
)
from prodial_kernels.linear import adapted_layers
from prodial_kernels.models.adapt import several
from prodial_kernels.models.adapt.named_layer import PARTS
from support.mixers.snapshots import snapshot
from support.mixers.toy import Toy, toy_ids
from support.models import build, randomise_adapters, token_ids

IDS = toy_ids()
FIRST = ProdialConfig(r=2, n_blocks=3)
# Another rank, other blocks, another form of the diagonal, and other layers.
SECOND = ProdialConfig(r=5, block_size=2, diagonal="free", target_modules=("in_proj", "stem"))
LORA = ProdialConfig(r=2, train_scale=False, train_diagonal=False)


def toy() -> nn.Module:
    torch.manual_seed(0)
    return Toy()


def adapted(*configs: ProdialConfig, model: nn.Module | None = None) -> nn.Module:
    """A model with adapters called a, b, …, each moved away from its initial values."""
    model = toy() if model is None else model
    for number, (name, config) in enumerate(zip("abcd", configs, strict=False)):
        if name == "a":
            apply_prodial(model, config, name)
        else:
            add_adapter(model, name, config)
        with using_adapter(model, name):
            randomise_adapters(model, seed=number)
    return model


def alone(config: ProdialConfig, seed: int) -> nn.Module:
    model = toy()
    apply_prodial(model, config)
    randomise_adapters(model, seed)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    """The output and every gradient, by the names that a single adapter's tensors have."""
    model.zero_grad(set_to_none=True)
    output = model(IDS)
    output.square().sum().backward()
    found = {"output": output.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for part, attribute in PARTS.items():
                for adapter in "abcd":
                    name = name.replace(f".{attribute}.{adapter}.weight", f".{part}")
            found[name] = parameter.grad
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        assert value.count_nonzero(), name


def test_each_computes_and_trains_as_if_it_were_alone() -> None:
    model = adapted(FIRST, SECOND)
    expected = [step(alone(config, seed)) for seed, config in enumerate((FIRST, SECOND))]
    assert (active_adapter(model), list_adapters(model)) == ("a", {"a": FIRST, "b": SECOND})
    assert_same(step(model), expected[0])
    for name in "babba":
        set_adapter(model, name)
        assert_same(step(model), expected["ab".index(name)])
    with using_adapter(model, "b"):
        assert active_adapter(model) == "b"
        assert_same(step(model), expected[1])
    assert active_adapter(model) == "a"
    assert_same(step(model), expected[0])


def test_switched_off_it_is_the_pretrained_model_and_no_adapter_is_lost() -> None:
    model, base = adapted(FIRST, SECOND), toy()(IDS)
    outputs = {}
    for name in "ab":
        set_adapter(model, name)
        outputs[name] = model(IDS)
        # "a" has layers that "b" has not: they must come back with "a".
        with adapter_disabled(model):
            assert torch.equal(model(IDS), base)
            with using_adapter(model, "a"):
                assert torch.equal(model(IDS), base)
    for name in "abab":
        set_adapter(model, name)
        assert torch.equal(model(IDS), outputs[name])


def test_adding_keeps_the_first_adapters_objects() -> None:
    model = alone(FIRST, 0)
    layer = model.blocks[0].in_proj
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    parameters = dict(layer.adapter_parameters())
    optimizer = torch.optim.AdamW(adapter_parameter_groups(model, weight_decay=0.0), lr=0.1)
    before = model(IDS)
    add_adapter(model, "b", SECOND)
    assert torch.equal(model(IDS), before)
    assert model.blocks[0].in_proj is layer
    assert {n: id(p) for n, p in layer.adapter_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert len(seen) == 2
    model(IDS).sum().backward()
    optimizer.step()
    assert not torch.equal(model(IDS), before)
    with using_adapter(model, "b"):
        assert torch.equal(model(IDS), toy()(IDS))


def test_only_the_active_one_gets_gradients_and_is_optimised() -> None:
    model = adapted(FIRST, SECOND)
    set_adapter(model, "b")
    before = copy.deepcopy(model.state_dict())
    groups = adapter_parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if ".b.weight" in n}


def test_deleting() -> None:
    model = adapted(FIRST, SECOND)
    expected = model(IDS)
    stem = model.stem.base_layer
    delete_adapter(model, "b")
    assert model.stem is stem, "a layer that only b had is plain again"
    assert torch.equal(model(IDS), expected)
    assert not [name for name in model.state_dict() if ".b." in name]
    assert list_adapters(model) == {"a": FIRST}
    add_adapter(model, "b", LORA)
    set_adapter(model, "b")
    delete_adapter(model, "a")
    assert torch.equal(model(IDS), toy()(IDS))
    with pytest.raises(ValueError, match=r"'b' is the active adapter; .*only one: remove_prodial"):
        delete_adapter(model, "b")


def test_removing_gives_the_pretrained_model_back() -> None:
    model = toy()
    before, base = snapshot(model), model(IDS)
    adapted(FIRST, SECOND, model=model)
    remove_prodial(model)
    assert snapshot(model) == before
    assert torch.equal(model(IDS), base)


def test_merging_takes_the_active_one() -> None:
    model = adapted(FIRST, SECOND)
    set_adapter(model, "b")
    expected = model(IDS)
    merged = merge_prodial(copy.deepcopy(model))
    assert not adapted_layers(merged)
    torch.testing.assert_close(merged(IDS), expected, rtol=1e-4, atol=1e-5)
    # Layers that b has not got their pretrained weight.
    assert torch.equal(merged.blocks[0].out_proj.weight, toy().blocks[0].out_proj.weight)
    for layer in adapted_layers(model).values():
        layer.merge()
    torch.testing.assert_close(model.eval()(IDS), expected, rtol=1e-4, atol=1e-5)
    for refused in (lambda: set_adapter(model, "a"), lambda: add_adapter(model, "c", LORA)):
        with pytest.raises(ValueError, match=r"merged in .*unmerge\(\)"):
            refused()
    for layer in adapted_layers(model).values():
        layer.unmerge()
    assert torch.equal(model(IDS), expected)
    set_adapter(model, "a")


def test_copies_pickles_and_state_dicts() -> None:
    model = adapted(FIRST, SECOND)
    outputs = {}
    for name in "ab":
        with using_adapter(model, name):
            outputs[name] = model(IDS)
    other = adapted(FIRST, SECOND)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    set_adapter(other, "b")
    # A state says which adapter a tensor is of, whichever was active.
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        for name in "ab":
            set_adapter(twin, name)
            assert torch.equal(twin(IDS), outputs[name])


def test_dtypes_and_quantised_bases() -> None:
    model = adapted(FIRST, SECOND).to(torch.bfloat16)
    adapters = {n: p.dtype for n, p in model.named_parameters() if ".prodial_" in n}
    assert set(adapters.values()) == {torch.float32}
    quantised = build("mamba2")
    quantize_model(quantised, "nf4", target_modules=["in_proj"])
    base = quantised(input_ids=token_ids()).logits
    apply_prodial(quantised, ProdialConfig(r=2))
    add_adapter(quantised, "b", ProdialConfig(r=3, target_modules="in_proj"))
    set_adapter(quantised, "b")
    assert torch.equal(quantised(input_ids=token_ids()).logits, base)
    randomise_adapters(quantised)
    assert not torch.allclose(quantised(input_ids=token_ids()).logits, base)


@pytest.mark.filterwarnings("ignore:Some weights of")
def test_save_pretrained_writes_the_active_one(tmp_path: Path) -> None:
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=2), "a")
    add_adapter(model, "b", ProdialConfig(r=3))
    set_adapter(model, "b")
    randomise_adapters(model)
    expected = model.eval()(input_ids=token_ids()).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    found = loaded(input_ids=token_ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- What is refused, and leaves the model as it was. -------------------------------------------


REFUSED: dict[str, tuple[Any, str]] = {
    "a name that is taken": (lambda m: add_adapter(m, "a", LORA), "already has an adapter 'a'"),
    "a dotted name": (lambda m: add_adapter(m, "x.y", LORA), "letters, digits"),
    "a name of torch's": (lambda m: add_adapter(m, "keys", LORA), "choose another, such as 'keys_"),
    "a block count": (
        lambda m: add_adapter(m, "c", ProdialConfig(n_blocks=5)), "n_blocks=5 must divide"
    ),
    "no such layer": (
        lambda m: add_adapter(m, "c", ProdialConfig(target_modules=["q_proj"])), "matches nothing"
    ),
    "modules of its own": (
        lambda m: add_adapter(m, "c", ProdialConfig(modules_to_save=["conv1d"])), "share them"
    ),
    "an unknown one": (lambda m: set_adapter(m, "c"), r"no adapter 'c'; it has \['a', 'b'\]"),
    "deleting the active one": (lambda m: delete_adapter(m, "a"), r"another one first \(\['b'\]\)"),
    "applying again": (lambda m: apply_prodial(m, LORA), r"add_adapter\(model, NAME, config\)"),
    "a sum of both": (
        lambda m: add_weighted_adapter(m, "c", {"a": 0.5, "b": 0.5}), "is not defined: W'"
    ),
    "a sum of nothing": (lambda m: add_weighted_adapter(m, "c", {}), "one weight for each"),
    "a sum of strangers": (lambda m: add_weighted_adapter(m, "c", {"z": 1.0}), "no adapter 'z'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    model = adapted(FIRST, SECOND)
    before, expected = snapshot(model), model(IDS)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert snapshot(model) == before
    assert torch.equal(model(IDS), expected)
    assert list_adapters(model) == {"a": FIRST, "b": SECOND}


def test_what_has_no_adapter_or_a_wrapper_is_refused() -> None:
    for call in (list_adapters, active_adapter, lambda m: add_adapter(m, "b", LORA)):
        with pytest.raises(ValueError, match="no ProDiaL adapter"):
            call(toy())
    model = alone(ProdialConfig(modules_to_save=["conv1d"]), 0)
    with pytest.raises(ValueError, match="'default' has modules_to_save"):
        add_adapter(model, "b", LORA)
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(train_ssm=["A_log"]))
    with pytest.raises(ValueError, match=r"'default' has train_ssm=\['A_log'\].*share them"):
        add_adapter(model, "b", LORA)
    with pytest.raises(TypeError, match="must be a ProdialConfig"):
        add_adapter(adapted(FIRST), "b", {"r": 2})
    with pytest.raises(TypeError, match="weights must be finite"):
        add_weighted_adapter(adapted(LORA, LORA), "c", {"a": float("nan"), "b": 1})
    with pytest.raises(ValueError, match="only adapter"):
        add_weighted_adapter(adapted(LORA), "c", {"a": 1.0})


@pytest.mark.parametrize("call", ["add", "set", "delete"])
def test_an_interrupt_leaves_the_model_as_it_was(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(FIRST) if call == "add" else adapted(FIRST, SECOND)
    before, expected = snapshot(model), model(IDS)
    known = list_adapters(model)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(several, "forget_decoding_graphs", stop)
    run = {
        "add": lambda: add_adapter(model, "b", SECOND),
        "set": lambda: set_adapter(model, "b"),
        "delete": lambda: delete_adapter(model, "b"),
    }[call]
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    assert snapshot(model) == before
    assert (list_adapters(model), active_adapter(model)) == (known, "a")
    assert torch.equal(model(IDS), expected)
    run()
    remove_prodial(model)
    assert torch.equal(model(IDS), toy()(IDS))


# --- Weighted sums. -----------------------------------------------------------------------------


SUMS = {
    "LoRA": (LORA, LORA),
    "of several ranks and layers": (
        LORA,
        ProdialConfig(
            r=3, lora_alpha=7, train_scale=False, train_diagonal=False, target_modules=["in_proj"]
        ),
    ),
    "scales": (
        ProdialConfig(r=2, train_diagonal=False), ProdialConfig(r=0, train_diagonal=False)
    ),
    "blocks": (ProdialConfig(r=2, train_scale=False, block_size=3),) * 2,
    "blocks of two sizes": (
        ProdialConfig(r=2, train_scale=False, block_size={"in_proj": 2, "out_proj": 3}),
    ) * 2,
    "free blocks": (
        ProdialConfig(r=1, train_scale=False, block_size=2, diagonal="free"),
        ProdialConfig(r=1, train_scale=False, block_size=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5)])
@pytest.mark.parametrize("case", SUMS)
def test_a_weighted_sum(case: str, weights: tuple[float, float]) -> None:
    model = adapted(*SUMS[case]).double()
    effective: dict[str, dict[str, Tensor]] = {}
    given = dict(zip("ab", weights, strict=True))
    add_weighted_adapter(model, "both", given)
    assert active_adapter(model) == "a"
    for name in ("a", "b", "both"):
        with using_adapter(model, name):
            layers = adapted_layers(model)
            effective[name] = {p: m.effective_weight().detach() for p, m in layers.items()}
    for path, layer in adapted_layers(model).items():
        base = layer.base_layer.weight
        expected = base + sum(w * (effective[name][path] - base) for name, w in given.items())
        torch.testing.assert_close(effective["both"][path], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected, base, atol=1e-2)
    # It is an adapter like others: it trains, also in a rank that only some layers fill.
    set_adapter(model, "both")
    model(IDS).square().sum().backward()
    for path, layer in adapted_layers(model).items():
        assert all(p.grad is not None for _, p in layer.adapter_parameters()), path


def test_blocks_of_different_sides_have_no_sum() -> None:
    model = adapted(*(ProdialConfig(train_scale=False, block_size=size) for size in (2, 3)))
    with pytest.raises(ValueError, match="blocks of sides"):
        add_weighted_adapter(model, "c", {"a": 1, "b": 1})


def test_printing() -> None:
    model = adapted(FIRST, SECOND)
    assert "adapters='a', 'b', active='a'" in repr(model.blocks[0].in_proj)
    assert "adapters='b', none active" in repr(model.stem)
    assert isinstance(model.stem, ProdialLinear)
    torch.save(model.state_dict(), io.BytesIO())
