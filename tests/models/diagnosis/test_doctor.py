"""What the doctor says of PEFT's LoRA is what its real gradients show, on both paths."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial, merge_prodial
from prodial_kernels.models.diagnosis import doctor
from prodial_kernels.models.diagnosis.doctor import diagnose
from prodial_kernels.models.diagnosis.published import PUBLISHED, published_for
from prodial_kernels.models.diagnosis.uses import Use, use_of
from support.mixers import mamba_ssm_stand_ins
from support.mixers.adapted_families import install_stand_in
from support.mixers.adapted_mamba_ssm import token_ids as mixer_ids
from support.mixers.real_lora import live_loras, said
from support.mixers.toy import Toy
from support.models import FAMILIES, build, randomise_adapters, token_ids


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_false_alarm_and_none_missed(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    # PEFT's refusals are another test's.
    monkeypatch.setattr(doctor, "_REFUSED_TYPES", ())
    expected = said(model)
    if fused and FAMILIES[name].fused:
        install_stand_in(monkeypatch, name)
    dead = {doctor.DEAD, doctor.DEAD_WHEN_FUSED} if fused else {doctor.DEAD}
    live = live_loras(model, "all-linear", monkeypatch)
    assert live == {path: status not in dead for path, status in expected.items()}
    assert sum(status == doctor.ADAPTED for status in expected.values()) >= 2


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
@pytest.mark.parametrize("name", FAMILIES)
def test_it_says_what_peft_refuses(name: str) -> None:
    for target in ("in_proj", "out_proj", "conv1d", "x_proj"):
        model = build(name)
        diagnosis = diagnose(model, [target])
        status = diagnosis.findings[0].status
        config = LoraConfig(r=3, target_modules=[target])
        if status in (doctor.REFUSED, doctor.ABSENT, doctor.PARAMETER):
            with pytest.raises(ValueError, match=r"incompatible|not found|groups"):
                get_peft_model(model, config)
        else:
            get_peft_model(model, config)
        assert diagnosis.refused == (status == doctor.REFUSED)


@pytest.mark.parametrize(
    ("mixer", "dead"),
    [
        (mamba_ssm_stand_ins.Mamba, {"in_proj", "x_proj", "dt_proj", "out_proj"}),
        (mamba_ssm_stand_ins.Mamba2, {"out_proj"}),
        (mamba_ssm_stand_ins.Mamba2Simple, {"out_proj"}),
    ],
)
@pytest.mark.usefixtures("stand_in_kernels")
def test_mamba_ssms_own_mixers(mixer: type[nn.Module], dead: set[str]) -> None:
    model = mamba_ssm_stand_ins.Model(mixer)
    names = [n for n, m in model.layers[0].mixer.named_children() if isinstance(m, nn.Linear)]
    statuses = {f.target: f.status for f in diagnose(model, names).findings}
    assert {n for n, status in statuses.items() if status != doctor.ADAPTED} == dead
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=names)).train()
    peft_model.get_submodule("base_model.model.embedding").weight.requires_grad_()
    peft_model(mixer_ids()).sum().backward()
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            target = name.partition(".lora_B.")[0].rpartition(".")[2]
            grad = parameter.grad
            assert (grad is None or not grad.count_nonzero()) == (target in dead), name


def test_a_module_of_torch_that_reads_its_projection() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert use_of(attention, "out_proj").dead


def test_what_it_cannot_read_is_not_called_dead() -> None:
    assert use_of(nn.ModuleList([nn.Linear(2, 2)]), "0") == Use(called=True)


def test_prodial_adapts_what_lora_leaves_dead() -> None:
    model = build("mamba")
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    assert {f.status for f in diagnose(model, names, method="prodial").findings} == {"adapted"}
    apply_prodial(model, ProdialConfig(r=2, target_modules=tuple(names)))
    for layer in model.modules():
        if hasattr(layer, "prodial_b"):
            nn.init.normal_(layer.prodial_b)
    model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    assert all(
        p.grad.count_nonzero() for n, p in model.named_parameters() if n.endswith("prodial_a")
    )


def test_a_mixer_that_nobody_knows_is_refused_by_prodial() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(2))
            self.out_proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.out_proj.weight

    model = nn.Sequential(Reading())
    (finding,) = diagnose(model, ["out_proj"], method="prodial").findings
    assert finding.status == doctor.REFUSED
    assert "reads out_proj.weight in forward()" in finding.why
    assert diagnose(model, ["out_proj"]).findings[0].status == doctor.DEAD


def test_what_it_says_beside() -> None:
    nemotron = build("nemotron_h")
    diagnosis = diagnose(nemotron, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"])
    assert diagnosis.layers == 0.25
    assert diagnosis.mixers == 0.0
    assert [f.target for f in diagnosis.findings if f.status == doctor.ABSENT] == ["gate_proj"]
    assert "none of the 2 mixers is adapted" in str(diagnosis)
    assert diagnose(nemotron, ["experts.up_proj"]).findings[0].status == doctor.PARAMETER
    shared = diagnose(build("zamba"), ["q_proj", "v_proj"])
    assert "merge_and_unload adds to it once for each place" in str(shared)
    jamba = diagnose(build("jamba"), ["dt_proj"])
    assert "dt_proj: LoRA has no effect and no gradient until it is merged" in str(jamba)
    bamba = diagnose(build("bamba"), ["out_proj"])
    assert [f.status for f in bamba.dead] == [doctor.DEAD_WHEN_FUSED]
    odd = diagnose(nn.Sequential(nn.Linear(301, 512)), ["0"])
    assert "a width of 301 is no multiple of 8: on an H200 such a product takes up to 7.6" in str(
        odd
    )
    assert diagnose(Toy(), ["conv1d"], method="prodial").findings[0].status == doctor.UNSUPPORTED


def test_the_meta_device_is_enough() -> None:
    import transformers

    config = transformers.MambaConfig(num_hidden_layers=2)
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(config)
    statuses = {f.target: f.status for f in diagnose(model, ["x_proj", "dt_proj"]).findings}
    assert statuses == {"x_proj": doctor.DEAD_WHEN_FUSED, "dt_proj": doctor.DEAD}


def test_lists_of_a_type_come_before_those_of_any() -> None:
    toolkits = [entry.toolkit for entry in published_for("nemotron_h")]
    assert toolkits[:2] == ["peft", "trl"]
    assert toolkits[-1] == "llamafactory"
    assert {entry.toolkit for entry in published_for("zamba2")} == {"unsloth", "llamafactory"}
    assert all(entry.source for entry in PUBLISHED)


@torch.no_grad()
def test_dt_proj_acts_only_when_it_is_merged() -> None:
    """What the doctor says of it, seen: nothing changes until the merge, and then much does."""
    model = get_peft_model(build("jamba"), LoraConfig(r=2, target_modules=["dt_proj"])).eval()
    before = model(input_ids=token_ids(), use_cache=False).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert torch.equal(model(input_ids=token_ids(), use_cache=False).logits, before)
    merged = model.merge_and_unload()
    after = merged(input_ids=token_ids(), use_cache=False).logits
    assert (after - before).norm() > 0.01 * before.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_shared_blocks_are_merged_once_a_use(name: str) -> None:
    types = {"layers_block_type": ["mamba", "hybrid", "hybrid"]}
    options = {**types, "hybrid_layer_ids": [1, 2]} if name == "zamba2" else types
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    base = build(name, **options).eval()
    assert "adds to it once for each place" in str(diagnose(base, targets))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets)).eval()
    for name_of, parameter in model.named_parameters():
        if "lora_B" in name_of:
            nn.init.normal_(parameter)
    expected = model(input_ids=token_ids(), use_cache=False).logits
    merged = model.merge_and_unload()(input_ids=token_ids(), use_cache=False).logits
    # Rounding makes 1e-6 of it.
    assert (merged - expected).norm() > 0.005 * expected.norm()
    # Ours is one layer at all places, and merged once.
    own = build(name, **options).eval()
    apply_prodial(own, ProdialConfig(r=2, target_modules=tuple(targets)))
    randomise_adapters(own)
    expected = own(input_ids=token_ids(), use_cache=False).logits
    merged = merge_prodial(own)(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)


def test_pefts_defaults_are_those_that_are_listed() -> None:
    defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    listed = {kind: e.targets for e in PUBLISHED if e.toolkit == "peft" for kind in e.models}
    assert {k: tuple(v) for k, v in defaults.items() if k in FAMILIES} == listed
