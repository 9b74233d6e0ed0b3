"""``prodial merge --for gguf``: refused before anything is loaded, or told what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.cli.commands import main
from prodial_kernels.training.gguf import GGUFError, gguf_notes, rename_for_converter
from support.models import FAMILIES, build, token_ids
from support.tiny_run import run


def config_of(name: str, **options: Any) -> Any:
    import transformers

    family = FAMILIES[name]
    return getattr(transformers, f"{family.prefix}Config")(**{**family.options, **options})


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_families_without_an_architecture_are_refused(name: str) -> None:
    with pytest.raises(GGUFError, match=f"no architecture for {name}"):
        gguf_notes(config_of(name))
    gguf = pytest.importorskip("gguf")
    assert not [known for known in gguf.MODEL_ARCH_NAMES.values() if known.startswith("zamba")]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("zamba", "zamba2", "bamba")])
def test_every_other_family_is_taken(name: str) -> None:
    notes = gguf_notes(config_of(name, **({"use_bias": False} if name == "mamba" else {})))
    expected = {
        "falcon_mamba": ["ssm.dt_b_c_rms"],
        "granitemoehybrid": ["renames the kinds of layers"],
        "nemotron_h": ["limits dt to 0.001"],
    }
    assert len(notes) == len(expected.get(name, []))
    for note, words in zip(notes, expected.get(name, []), strict=True):
        assert words in note


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_another_inner_width_is_refused(name: str) -> None:
    options = {"num_heads": 8} if name == "mamba2" else {}
    with pytest.raises(GGUFError, match="64 here, of 16"):
        gguf_notes(config_of(name, expand=4, **options))


def test_what_llama_cpp_does_not_load_or_computes_otherwise_is_refused() -> None:
    for name, option in (("mamba", "use_bias"), ("jamba", "mamba_proj_bias")):
        with pytest.raises(GGUFError, match=rf"have biases \({option}\)"):
            gguf_notes(config_of(name, **{option: True}))
    with pytest.raises(GGUFError, match=r"rotates 0\.5 of each head"):
        gguf_notes(config_of("bamba", mamba_proj_bias=False))


def test_written_under_the_names_that_the_converter_knows(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = config_of("granitemoehybrid")
    config.save_pretrained(tmp_path)
    tokenizer = {"tokenizer_class": "TokenizersBackend", "eos_token": "é"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    rename_for_converter(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["layer_types"] == ["mamba", "attention", "mamba"]
    assert AutoConfig.from_pretrained(tmp_path).layer_types == config.layer_types
    again = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert again == {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"}


def test_limits_of_dt_have_no_field() -> None:
    (note,) = gguf_notes(config_of("mamba2", time_step_limit=(0.0, 0.1)))
    assert "limits dt to 0 … 0.1" in note
    gguf = pytest.importorskip("gguf")
    fields = vars(gguf.constants.Keys.SSM)
    assert not [name for name in fields if "LIMIT" in name or "MIN" in name]


def test_merge_says_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(place, tmp_path / "run", steps=2, eval_every=0)
    output = str(tmp_path / "it is merged")
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--for", "gguf", "--output", output]
    assert main(merge) == 0
    assert f"convert_hf_to_gguf.py '{output}'" in capsys.readouterr().err
    tokenizer = json.loads(Path(output, "tokenizer_config.json").read_text(encoding="utf-8"))
    # What transformers of the 4th version knows, which is what the converter asks for.
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"

    config_of("zamba2").save_pretrained(tmp_path / "zamba2")
    other = ["--output", str(tmp_path / "other"), "--model", str(tmp_path / "zamba2")]
    assert main([*merge[:-2], *other]) == 1
    assert "no architecture for zamba2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_upstream_reads_falcon_mamba_as_a_plain_mamba(tmp_path: Path) -> None:
    """transformers' reader; when this fails, it obeys the flag that llama.cpp does."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    model = build("falcon_mamba", tie_word_embeddings=False).eval()
    config = model.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    for write, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, 0), (writer.add_head_count, 0),
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_ssm_conv_kernel, config.conv_kernel),
        (writer.add_ssm_inner_size, config.intermediate_size),
        (writer.add_ssm_state_size, config.state_size),
        (writer.add_ssm_time_step_rank, config.time_step_rank),
        (writer.add_layer_norm_rms_eps, config.layer_norm_epsilon),
        (writer.add_ssm_dt_b_c_rms, True), (writer.add_vocab_size, 48), (writer.add_file_type, 0),
    ):  # fmt: skip
        write(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        tensor = -tensor.exp() if name.endswith(".A_log") else tensor
        tensor = tensor.squeeze() if name.endswith("conv1d.weight") else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    with torch.no_grad():
        found, expected = (m(token_ids(), use_cache=False).logits for m in (read, model))
    assert type(read).__name__ == "MambaForCausalLM"
    assert (found - expected).norm() > 0.01 * expected.norm()
