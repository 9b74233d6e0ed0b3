"""Every configuration that does not fit a model is refused before the model is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial
from support.mixers.snapshots import snapshot
from support.mixers.toy import Toy

LINEARS = "stem, blocks.*.in_proj, blocks.*.out_proj, blocks.*.twin, head"


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class PackedParameter(nn.Parameter):
    """As quantisation libraries store a weight: a Parameter of a class of their own."""


def with_packed_weight(model: Toy) -> None:
    model.blocks[1].in_proj.weight = PackedParameter(torch.ones(12, 6))


def with_integer_weight(model: Toy) -> None:
    weight = torch.ones(12, 6, dtype=torch.uint8)
    model.blocks[1].in_proj.weight = nn.Parameter(weight, requires_grad=False)


def with_parametrization(model: Toy) -> None:
    parametrize.register_parametrization(model.blocks[1].in_proj, "weight", nn.Tanh())


def with_own_forward(model: Toy) -> None:
    model.blocks[1].in_proj = OwnForward(6, 12)


def with_replaced_forward(model: Toy) -> None:
    linear = model.blocks[1].in_proj
    linear.forward = lambda input: nn.Linear.forward(linear, input) + 1


def with_hook(model: Toy) -> None:
    model.blocks[1].in_proj.register_forward_hook(lambda module, args, output: output + 1)


def with_weight_of_the_mixer(model: Toy) -> None:
    block = model.blocks[1]
    block.w = block.in_proj.weight


def with_weight_of_the_model(model: Toy) -> None:
    model.w = model.blocks[1].in_proj.weight


def with_transposed_weight(model: Toy) -> None:
    block = model.blocks[1]
    block.register_buffer("turned", block.in_proj.weight.detach().t())


def with_weight_in_a_list(model: Toy) -> None:
    model.blocks[1].kept = [(), {"w": (model.blocks[1].in_proj.weight,)}]


def with_layer_in_a_list(model: Toy) -> None:
    model.blocks[1].order = [model.blocks[1].norm, model.blocks[1].in_proj]


def with_layer_as_plain_attribute(model: Toy) -> None:
    vars(model.blocks[1])["expand"] = model.blocks[1].in_proj


def with_bound_method(model: Toy) -> None:
    model.blocks[1].expand = model.blocks[1].in_proj.forward


def with_partial(model: Toy) -> None:
    weight = model.blocks[1].in_proj.weight
    model.blocks[1].expand = partial(nn.functional.linear, weight=weight)


def with_closure(model: Toy) -> None:
    weight = model.blocks[1].in_proj.weight
    model.blocks[1].expand = lambda x: x @ weight.t()


def with_default(model: Toy) -> None:
    def expand(x: Tensor, weight: Tensor = model.blocks[1].in_proj.weight) -> Tensor:
        return x @ weight.t()

    model.blocks[1].expand = expand


SECOND_NAMES = {
    with_weight_of_the_mixer: "blocks.1.w",
    with_weight_of_the_model: "w",
    with_transposed_weight: "blocks.1.turned",
    with_weight_in_a_list: "blocks.1.kept",
    with_layer_in_a_list: "blocks.1.order",
    with_layer_as_plain_attribute: "blocks.1.expand",
    with_bound_method: "blocks.1.expand",
    with_partial: "blocks.1.expand",
    with_closure: "blocks.1.expand",
    with_default: "blocks.1.expand",
}


@pytest.mark.parametrize("prepare", SECOND_NAMES, ids=lambda prepare: prepare.__name__)
def test_a_second_name_of_a_target_is_refused(prepare: Callable[[Toy], None]) -> None:
    """What uses it would compute without the adapter."""
    model = Toy()
    prepare(model)
    before = snapshot(model)
    message = f"{SECOND_NAMES[prepare]} holds blocks.1.in_proj, or its weight, under a second name"
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_prodial(model, ProdialConfig(r=2))
    assert snapshot(model) == before
    # It is no matter of other targets.
    apply_prodial(model, ProdialConfig(r=2, target_modules=("out_proj",)))


def test_what_is_no_second_name() -> None:
    model = Toy()
    block = model.blocks[1]
    # Parts of one allocation, a bias, a copy, other layers' weights; and tied layers.
    whole = torch.randn(2 * 12 * 6)
    block.in_proj.weight = nn.Parameter(whole[: 12 * 6].view(12, 6))
    block.rest = whole[12 * 6 :]
    block.bias = model.blocks[0].in_proj.bias
    block.first = block.in_proj.weight.detach().clone()
    block.norms = [block.norm, block.norm.weight]
    block.project = partial(nn.functional.linear, weight=model.stem.weight)
    model.blocks[2].in_proj.weight = model.blocks[0].in_proj.weight
    apply_prodial(model, ProdialConfig(r=2, target_modules=("in_proj", "out_proj", "head")))
    with torch.device("meta"):
        model = Toy()
    model.kept = list(model.stem.parameters())
    apply_prodial(model, ProdialConfig(r=2))


def untouched(model: Toy) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "prepare", "message"),
    [
        ({"target_modules": ("foo",)}, untouched, f"['foo'] matches nothing*{LINEARS}"),
        ({"target_modules": ("in_proj", "foo")}, untouched, f"['foo'] matches nothing*{LINEARS}"),
        (
            {"target_modules": ("proj", "out_proj")},
            untouched,
            f"['proj'] matches nothing*{LINEARS}",
        ),
        (
            {"target_modules": ("in_proj", "0.in_proj")},
            untouched,
            "['0.in_proj'] matches nothing*earlier name already matches",
        ),
        ({"target_modules": r"blocks\..*foo"}, untouched, f"matches nothing*{LINEARS}"),
        (
            {"target_modules": ("conv1d",)},
            untouched,
            "'conv1d' matches 'conv1d', a torch.nn.modules.conv.Conv1d, not an nn.Linear",
        ),
        (
            {"target_modules": r"blocks\.0.*"},
            untouched,
            "'blocks.0', a support.mixers.toy.Block, not an nn.Linear",
        ),
        ({}, with_packed_weight, "'blocks.1.in_proj'*a PackedParameter weight*quantised"),
        ({}, with_integer_weight, "'blocks.1.in_proj'*dtype torch.uint8; quantised"),
        ({}, with_parametrization, "'blocks.1.in_proj'*parametrised"),
        ({}, with_own_forward, "'blocks.1.in_proj', a *test_targets.OwnForward with a forward of"),
        ({}, with_replaced_forward, "'blocks.1.in_proj'*with a forward of its own"),
        ({}, with_hook, "'blocks.1.in_proj'*with hooks*register them again after apply_prodial"),
        (
            {"target_modules": r"blocks\.[02]\.in_proj"},
            untouched,
            "some of the layers 'blocks.*.in_proj': it leaves out blocks.1.in_proj; *allow_partial",
        ),
        (
            {"target_modules": ("0.out_proj", "1.out_proj")},
            untouched,
            "some of the layers 'blocks.*.out_proj': it leaves out blocks.2.out_proj",
        ),
        (
            {"n_blocks": {"in_proj": 3, "out_proj": 5}},
            untouched,
            "blocks.0.out_proj: n_blocks=5 must divide in_features=12*[1, 2, 3, 4, 6, 12]",
        ),
        ({"block_size": 4}, untouched, "blocks.0.in_proj: block_size=4*in_features=6*[1, 2, 3, 6]"),
        (
            {"modules_to_save": ("norm", "classifier")},
            untouched,
            "modules_to_save='classifier' matches no module*embedding, stem, blocks.*.norm",
        ),
        (
            {"modules_to_save": ("blocks",)},
            untouched,
            "modules_to_save='blocks' (blocks)*contains or shares*blocks.0.in_proj",
        ),
        (
            {"target_modules": ("head",), "modules_to_save": ("embedding",)},
            untouched,
            "modules_to_save='embedding' (embedding) contains or shares the weight of head",
        ),
    ],
)
def test_refused_with_the_model_untouched(
    options: dict[str, object], prepare: Callable[[Toy], None], message: str
) -> None:
    model = Toy()
    prepare(model)
    before = snapshot(model)
    pattern = ".*".join(map(re.escape, re.split(r"\*(?!\.)", message)))
    with pytest.raises(ValueError, match=pattern):
        apply_prodial(model, ProdialConfig(**options))
    assert snapshot(model) == before


def test_allow_partial() -> None:
    model = Toy()
    config = ProdialConfig(target_modules=r"blocks\.[02]\.in_proj", allow_partial=True)
    apply_prodial(model, config)
    adapted = [n for n, m in model.named_modules() if isinstance(m, ProdialLinear)]
    assert adapted == ["blocks.0.in_proj", "blocks.2.in_proj"]


def test_layers_with_different_names_are_not_partial() -> None:
    """A hybrid model has projectors in some of its layers only; that is no mistake."""
    model = Toy()
    del model.blocks[1].in_proj, model.blocks[1].out_proj
    assert apply_prodial(model, ProdialConfig()).rows[0].count == 2


def test_a_subclass_that_only_marks_is_accepted() -> None:
    """Such as the output projection of ``nn.MultiheadAttention``."""
    attention = nn.MultiheadAttention(8, 2)
    apply_prodial(attention, ProdialConfig(r=2, target_modules=("out_proj",)))
    assert isinstance(attention.out_proj, ProdialLinear)
