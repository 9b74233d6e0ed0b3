"""The model that ships inside the package: complete, offline, small, and really pretrained."""

import argparse
import ast
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prodial_kernels
from prodial_kernels.embedded import embedded_model_path
from prodial_kernels.embedded.making.architecture import build_model, torch_path
from prodial_kernels.embedded.making.evaluate import bits_per_byte
from prodial_kernels.embedded.making.tokens import END_OF_TEXT, load_tokenizer, token_byte_lengths

# Written for this test, so no training page can hold it.
HELD_OUT = """The scheduler keeps a queue of pending requests and hands each of them to a worker as
soon as one becomes free. If no worker answers within the time set by the timeout option, the
request is put back at the front of the queue and a warning is written to the log file. By default
the number of workers is equal to the number of processor cores, but you can change it in the
configuration file.

Note that a request must not be modified after it has been sent. To change a request, create a
copy, update the fields that you need, and send the copy instead:

    new_request = request.copy()
    new_request.priority = 3
    queue.send(new_request)

The function returns True if the request was accepted, and False otherwise. It raises a ValueError
if the priority is negative. See the section on error handling for more information about the
errors that a worker can return, and for an example of how to write your own handler.
"""


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the embedded model must load without a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_path_is_found_without_heavy_imports():
    code = (
        "import sys; from prodial_kernels.embedded import embedded_model_path as p; print(p());"
        "assert not {'transformers', 'tokenizers', 'triton'} & set(sys.modules)"
    )
    root = Path(prodial_kernels.__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert Path(done.stdout.strip()) == embedded_model_path()


def test_missing_weights_are_reported(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(RuntimeError, match=r"reinstall prodial-kernels"):
        embedded_model_path()


def test_directory_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in embedded_model_path().iterdir()}
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(files)
    assert sum(files.values()) <= 6 * 2**20


@pytest.mark.usefixtures("_no_network")
def test_loads_without_network():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    assert type(model).__name__ == "Mamba2ForCausalLM"
    assert model.config.vocab_size == len(tokenizer)


def test_weights_load_unchanged(model):
    # transformers scales out_proj by the depth on loading when the config keeps the request to.
    stored = load_file(embedded_model_path() / "model.safetensors")
    loaded = model.state_dict()
    assert set(loaded) - set(stored) == {"lm_head.weight"}
    for name, value in stored.items():
        torch.testing.assert_close(loaded[name], value.float(), rtol=0, atol=0)


def test_weights_load_as_tied_float32(model):
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    mixer = model.backbone.layers[0].mixer
    # The CUDA convolution takes strides in multiples of 8 elements.
    assert mixer.in_proj.out_features % 8 == 0
    assert mixer.conv_dim % 8 == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_text_survives_the_tokenizer(tokenizer, seed):
    rng = random.Random(seed)
    alphabets = [
        "abc xyz  \t\n\n    _.,()[]{}'\"0123456789",
        "".join(map(chr, range(128))),
        "äßéñ→∞日本語한국어🙂\u0301\u200d\ufeff\xa0\r\n ",
    ]
    text = "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(1, 400)))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    lengths = token_byte_lengths(load_tokenizer(embedded_model_path()))
    assert int(lengths[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("module", [argparse, ast, random, subprocess], ids=lambda m: m.__name__)
def test_python_source_survives_and_packs_well(tokenizer, module):
    source = Path(module.__file__).read_text(encoding="utf-8")
    ids = tokenizer(source)["input_ids"]
    assert tokenizer.decode(ids) == source
    assert len(source.encode()) / len(ids) > 3.0


def test_indentation_is_one_token(tokenizer):
    for depth in (4, 8, 12):
        assert len(tokenizer("\n" + " " * depth)["input_ids"]) == 1


def test_separator_is_bos_eos_and_pad(tokenizer, model):
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT


def _score(model, tokenizer):
    tokens = torch.tensor([0, *tokenizer(HELD_OUT)["input_ids"]])
    return bits_per_byte(model, tokens, token_byte_lengths(load_tokenizer(embedded_model_path())))


def test_predicts_unseen_text(model, tokenizer):
    assert _score(model, tokenizer) < 1.5
    torch.manual_seed(0)
    untrained = build_model(model.config.vocab_size).eval()
    assert _score(untrained, tokenizer) > 2.5


def test_chunk_size_and_mode_do_not_change_the_logits(model, tokenizer):
    ids = torch.tensor([tokenizer(HELD_OUT)["input_ids"]])[:, :150]
    with torch.no_grad(), torch_path():
        expected = model(input_ids=ids, use_cache=False).logits
        mixers = [layer.mixer for layer in model.backbone.layers]
        try:
            for mixer in mixers:
                mixer.chunk_size = 128
            model.train()
            other = model(input_ids=ids, use_cache=False).logits
        finally:
            model.eval()
            for mixer in mixers:
                mixer.chunk_size = model.config.chunk_size
    torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3)


def test_cached_generation_continues_the_prompt(model, tokenizer):
    ids = torch.tensor([tokenizer("The function returns")["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    # Greedy decoding by full forward passes, without the recurrent cache.
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=expected, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert out.tolist() == expected.tolist()
