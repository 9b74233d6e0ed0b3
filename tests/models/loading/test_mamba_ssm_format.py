"""Checkpoints as mamba_ssm writes them, read by every command, and what transformers lacks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prodial_kernels.cli.commands import main
from prodial_kernels.models.loading import as_transformers
from prodial_kernels.models.loading.load import ModelError, empty_model, load_model
from prodial_kernels.models.loading.mamba_ssm_format import config_of, published_vocabulary
from support.models import build, token_ids
from support.tiny_model import byte_tokenizer, write_text

CPU = torch.device("cpu")
# As mamba_ssm's save_pretrained writes them: every field of its configuration.
COMMON: dict[str, Any] = {
    "d_model": 16, "d_intermediate": 0, "n_layer": 2, "vocab_size": 257, "attn_layer_idx": [],
    "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 8, "tie_embeddings": True,
}  # fmt: skip
MAMBA2 = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "chunk_size": 4}
LAYERS = {"mamba": {"d_state": 4}, "mamba2": MAMBA2}
_TIED = {"tie_word_embeddings": True, "vocab_size": 264}
OPTIONS: dict[str, dict[str, Any]] = {"mamba": {**_TIED, "use_bias": False}, "mamba2": _TIED}


def write(folder: Path, family: str, **changes: Any) -> Any:
    """Write a model in mamba_ssm's format; return it as transformers has it."""
    model = build(family, **OPTIONS[family]).eval()
    names = {n.replace("backbone.embeddings.", "backbone.embedding."): t
             for n, t in model.state_dict().items()}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {name: tensor.clone() for name, tensor in names.items()}, folder / "pytorch_model.bin"
    )
    content = {**COMMON, "ssm_cfg": LAYERS[family], **changes}
    (folder / "config.json").write_text(json.dumps(content))
    return model


def load(folder: Path, **options: Any) -> Any:
    return load_model(str(folder), device=CPU, dtype=torch.float32, **options)


@pytest.mark.parametrize("family", LAYERS)
@torch.no_grad()
def test_a_model_computes_what_it_did(family: str, tmp_path: Path) -> None:
    expected = write(tmp_path, family)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.model) is type(expected)
    assert loaded.quantization is None
    assert loaded.stored_dtype == torch.float32
    ids = token_ids()
    assert torch.equal(loaded.model(ids).logits, expected(ids).logits)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert loaded.model.config.eos_token_id == loaded.model.generation_config.eos_token_id == 0
    empty = empty_model(str(tmp_path), dtype=torch.float32)
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in expected.named_parameters()
    }
    quantised = load(tmp_path, quantize="nf4")
    assert quantised.quantization is not None
    difference = quantised.model(ids).logits - expected(ids).logits
    assert 0 < difference.norm() < 0.3 * expected(ids).logits.norm()


def test_upstream_reads_such_names_as_a_random_embedding(tmp_path: Path) -> None:
    """Only load_state_dict renames. When this fails, from_pretrained does too."""
    import transformers

    model = write(tmp_path, "mamba")
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    tensors = torch.load(file)
    # By which the embedding would be found again, where it is there.
    del tensors["lm_head.weight"]
    torch.save(tensors, file)
    transformers.utils.logging.set_verbosity_error()
    found = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    expected = model.get_input_embeddings().weight
    assert not torch.equal(found, expected)
    byte_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).model.get_input_embeddings().weight, expected)


def test_every_command_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base", "mamba2")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    write_text(tmp_path / "text.txt")
    data = ["--data", "text.txt", "--seq-len", "32", "--device", "cpu"]
    adapter = ["--model", "base", "--adapter", "run"]
    for command in (
        ["inspect", "base"],
        ["finetune", "--model", "base", *data, "--steps", "3", "--r", "2", "--output", "run"],
        ["evaluate", *adapter, *data],
        ["generate", *adapter, "--prompt", "The house", "--max-new-tokens", "8"],
        ["merge", *adapter, "--output", "merged"],
        ["generate", "--model", "merged", "--prompt", "The house", "--max-new-tokens", "8"],
        ["convert", "run", "--to", "peft", "--output", "peft"],
        ["convert", "peft", "--to", "prodial", "--output", "again", "--model", "base"],
    ):
        capsys.readouterr()
        assert main(command) == 0, (command, capsys.readouterr().err)
        if command[0] == "generate":
            texts = [*locals().get("texts", []), capsys.readouterr().out]
    assert texts[0] == texts[1]
    # What was merged is in transformers' format, and right there.
    merged = AutoModelForCausalLM.from_pretrained("merged")
    ids = token_ids()
    torch.testing.assert_close(merged(ids).logits, load(tmp_path / "merged").model(ids).logits)
    assert merged.config.rescale_prenorm_residual is False


def test_without_a_tokenizer_that_of_the_published_models_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "small", "mamba")
    with pytest.raises(ModelError, match=r"tokenizer cannot be read.*holds none.*save_pretrained"):
        load(tmp_path / "small")
    write(tmp_path / "published", "mamba")
    monkeypatch.setattr(as_transformers, "published_vocabulary", lambda _: True)
    monkeypatch.setattr(as_transformers, "TOKENIZER", str(tmp_path / "neox"))
    with pytest.raises(ModelError, match=r"holds none, and .*neox.* cannot be fetched"):
        load(tmp_path / "published")
    byte_tokenizer().save_pretrained(tmp_path / "neox")
    with pytest.warns(UserWarning, match="holds no tokenizer; that of .*neox is used"):
        loaded = load(tmp_path / "published")
    assert (
        loaded.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "neox").get_vocab()
    )


def test_the_published_configurations() -> None:
    published = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}
    old = config_of({**published, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
                     "fused_add_norm": True, "pad_vocab_size_multiple": 8})  # fmt: skip
    assert (old.model_type, old.vocab_size, old.time_step_rank) == ("mamba", 50280, 48)
    new = config_of({**published, **{k: v for k, v in COMMON.items() if k not in published},
                     "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16})  # fmt: skip
    assert (new.model_type, new.vocab_size, new.num_heads, new.state_size, new.n_groups) == (
        "mamba2", 50288, 24, 128, 1
    )  # fmt: skip
    assert published_vocabulary(published)
    assert not published_vocabulary({"vocab_size": 32000})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_intermediate": 64}, "d_intermediate 64"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx \[1\]"),
        ({"rms_norm": False}, "rms_norm False"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3' has no class"),
        ({"ssm_cfg": {**MAMBA2, "rmsnorm": False}}, "rmsnorm False"),
        ({"ssm_cfg": {**MAMBA2, "norm_before_gate": True}}, "norm_before_gate True"),
        ({"ssm_cfg": {**MAMBA2, "d_ssm": 16}}, "d_ssm 16"),
        ({"ssm_cfg": {"d_ssm": 16}}, "'d_ssm', which is unknown"),
        ({"ssm_cfg": {"gate": 1}}, "'gate', which is unknown"),
        ({"ssm_cfg": [1]}, "must be an object"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"mlp": 1}, "'mlp', which is unknown"),
    ],
)  # fmt: skip
def test_what_transformers_does_not_compute_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, "mamba2", **changes)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_groups_need_a_release_that_norms_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba2 import modeling_mamba2

    content = {**COMMON, "ssm_cfg": {**MAMBA2, "ngroups": 2}}
    norm = modeling_mamba2.MambaRMSNormGated
    if "group_size" in norm.__init__.__code__.co_varnames:
        assert config_of(content).n_groups == 2

    class Whole(torch.nn.Module):
        def __init__(self, hidden_size: int, eps: float = 1e-6) -> None: ...

    monkeypatch.setattr(modeling_mamba2, "MambaRMSNormGated", Whole)
    with pytest.raises(ValueError, match="ngroups 2 needs a norm for each group"):
        config_of(content)
