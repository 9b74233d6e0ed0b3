"""Training batches: what is in them, and that a step alone decides which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.training.data.batches import IGNORED, BatchSizes, epoch_generator
from prodial_kernels.training.data.examples import DataError, MultipleChoice, PromptCompletion
from prodial_kernels.training.data.packing import PackedBatches
from prodial_kernels.training.data.padding import PaddedBatches
from prodial_kernels.training.data.splits import make_batches, read_whole
from prodial_kernels.training.data.tokenization import EncodedPair, encode, encode_pairs

FIXTURES = Path(__file__).parents[2] / "fixtures" / "data"


def stream(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


def completions(n: int) -> list[PromptCompletion]:
    return [PromptCompletion("p" * (i % 7), "c" * (1 + i * 5 % 23)) for i in range(n)]


# --- packing -------------------------------------------------------------------------------------


def test_packed_documents_end_with_eos_and_labels_are_the_inputs(byte_tokenizer: Any) -> None:
    documents = ["ab", "", "é"]
    batches = make_batches(documents, byte_tokenizer, seq_len=7, batch_size=1)
    batch = batches.batch(0)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert byte_tokenizer.decode(batch.input_ids[0]) == "ab<eos><eos>é<eos>"
    assert torch.equal(batch.labels, batch.input_ids)
    assert batch.labels.data_ptr() != batch.input_ids.data_ptr()
    assert batches.n_tokens == 7


def test_packed_windows_cover_every_token_once_an_epoch_and_the_tail_too() -> None:
    batches = PackedBatches(stream(103), BatchSizes(10, 4, seed=3))
    assert batches.steps_per_epoch == 3
    rows = torch.cat([batches.batch(step).input_ids for step in range(11)])[: 4 * 11]
    for epoch in range(4):  # 44 samples are 4 epochs of 11 windows
        window_rows = rows[epoch * 11 : (epoch + 1) * 11]
        starts = sorted(int(row[0]) for row in window_rows)
        assert starts == [*range(0, 100, 10), 93]
        assert all(torch.equal(row, row[0] + torch.arange(10)) for row in window_rows)


def test_packed_order_differs_between_epochs_and_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = PackedBatches(stream(200), BatchSizes(10, 20, seed=seed))
        return batches.batch(epoch).input_ids[:, 0].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(0, 200, 10))]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == orders[-1] for o in orders)


def test_packed_batch_is_full_where_windows_are_fewer_than_the_batch() -> None:
    batches = PackedBatches(stream(25), BatchSizes(10, 8))
    assert batches.batch(5).input_ids.shape == (8, 10)


def test_packed_text_shorter_than_a_window_is_an_error(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"has 6 tokens, fewer than one window of 7; .*at most 6"):
        make_batches(["short"], byte_tokenizer, seq_len=7, batch_size=1)
    assert make_batches(["short"], byte_tokenizer, seq_len=6, batch_size=1).steps_per_epoch == 1


# --- padding -------------------------------------------------------------------------------------


def test_padded_completions_mask_prompt_and_padding(byte_tokenizer: Any) -> None:
    examples = [PromptCompletion("ab", "cde"), PromptCompletion("", "x")]
    batches = make_batches(examples, byte_tokenizer, seq_len=32, batch_size=2)
    input_ids, labels = batches.batch(0)[:2]
    assert input_ids.shape == (2, 8)
    by_length = sorted(zip(input_ids.tolist(), labels.tolist(), strict=True), key=lambda x: x[0][3])
    a, b, c, d, e, x = (byte_tokenizer("abcdex")["input_ids"][i] for i in range(6))
    # Without a prompt EOS stands before the completion, as at the start of a document.
    assert by_length[0] == ([0, x, 0, 0, 0, 0, 0, 0], [IGNORED, x, 0, *[IGNORED] * 5])
    assert by_length[1] == ([a, b, c, d, e, 0, 0, 0], [IGNORED, IGNORED, c, d, e, 0, -100, -100])


def test_padded_without_the_mask_learns_the_prompt_but_no_padding(byte_tokenizer: Any) -> None:
    batches = make_batches(
        [PromptCompletion("ab", "cde")], byte_tokenizer, seq_len=32, batch_size=1, mask_prompt=False
    )
    input_ids, labels = batches.batch(0)[:2]
    assert torch.equal(labels[0, :6], input_ids[0, :6])
    assert labels[0, 6:].tolist() == [IGNORED, IGNORED]


def test_multiple_choice_learns_the_right_choice_without_eos(byte_tokenizer: Any) -> None:
    examples = read_whole(FIXTURES / "winogrande.jsonl").examples
    batches = make_batches(examples, byte_tokenizer, seq_len=256, batch_size=1)
    seen = set()
    for step in range(2):
        (ids,), (labels,) = batches.batch(step)[:2]
        text = byte_tokenizer.decode(ids).rstrip("<eos>")
        learned = byte_tokenizer.decode(labels[labels != IGNORED])
        assert text.endswith(learned)
        seen.add((text, learned))
    assert seen == {
        ("".join(example.pair(example.label)), example.pair(example.label)[1])
        for example in examples
        if isinstance(example, MultipleChoice)
    }


def test_padding_does_not_reach_the_loss(byte_tokenizer: Any, tiny_mamba2: Any) -> None:
    examples = [PromptCompletion("ab", "cde"), PromptCompletion("abcab", "c" * 30)]
    both = make_batches(examples, byte_tokenizer, seq_len=64, batch_size=2).batch(0)
    assert len(both.input_ids) == 2
    total = n = 0.0
    with torch.no_grad():
        for example in examples:
            alone = make_batches([example], byte_tokenizer, seq_len=64, batch_size=1).batch(0)
            length = int((alone.labels[0] != IGNORED).nonzero().max()) + 1
            loss = tiny_mamba2(
                input_ids=alone.input_ids[:, :length], labels=alone.labels[:, :length]
            ).loss
            count = int((alone.labels[:, 1:] != IGNORED).sum())
            total += count * float(loss)
            n += count
        assert float(tiny_mamba2(**both._asdict()).loss) == pytest.approx(total / n, rel=1e-5)


def test_padded_epochs_use_every_example_once_in_new_orders(byte_tokenizer: Any) -> None:
    examples = [PromptCompletion("p", f"{i:03d}" + "c" * (i % 40)) for i in range(101)]
    batches = make_batches(examples, byte_tokenizer, seq_len=64, batch_size=4, seed=5)
    assert batches.steps_per_epoch == 26
    epochs = []
    for epoch in range(2):
        names: list[str] = []
        for step in range(epoch * 26, (epoch + 1) * 26):
            names += [text[1:4] for text in byte_tokenizer.batch_decode(batches.batch(step)[0])]
        assert sorted(names) == [f"{i:03d}" for i in range(101)]
        epochs.append(names)
    assert epochs[0] != epochs[1]


def test_padded_batches_hold_sequences_of_like_length(byte_tokenizer: Any) -> None:
    examples = [PromptCompletion("p", "c" * (1 + i * 37 % 400)) for i in range(400)]
    batches = make_batches(examples, byte_tokenizer, seq_len=512, batch_size=8)
    total = sum(batches.batch(step).input_ids.numel() for step in range(batches.steps_per_epoch))
    assert total < 1.15 * batches.n_tokens  # in random batches about twice as much


def test_too_long_pairs_lose_the_start_of_the_context_then_the_end() -> None:
    def cut(n_context: int, n_continuation: int) -> list[int]:
        pair = EncodedPair(stream(n_context), 100 + stream(n_continuation))
        batches = PaddedBatches([pair], BatchSizes(8, 1), pad_token=0)
        assert batches.n_truncated == 1
        input_ids, labels = batches.batch(0)[:2]
        assert (labels[0] >= 100).tolist() == (input_ids[0] >= 100).tolist()
        return input_ids[0].tolist()

    assert cut(20, 3) == [15, 16, 17, 18, 19, 100, 101, 102]
    assert cut(5, 20) == [4, *range(100, 107)]


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_any_step_is_reproducible_without_the_ones_before(byte_tokenizer: Any, kind: str) -> None:
    def make(seed: int = 11) -> Any:
        examples = ["some text " * 40] if kind == "packed" else completions(50)
        return make_batches(examples, byte_tokenizer, seq_len=16, batch_size=4, seed=seed)

    replayed = make()
    history = [replayed.batch(step) for step in range(60)]
    resumed = make()
    assert resumed.fingerprint == replayed.fingerprint
    for step in (59, 3, 41, 0, 30):  # any order, across epochs
        for ours, theirs in zip(resumed.batch(step)[:2], history[step][:2], strict=True):
            assert torch.equal(ours, theirs)
    assert make(12).fingerprint != replayed.fingerprint
    other = make(12)
    assert any(
        other.batch(s).input_ids.shape != history[s].input_ids.shape
        or not torch.equal(other.batch(s).input_ids, history[s].input_ids)
        for s in range(10)
    )


def test_fingerprint_sees_the_data(byte_tokenizer: Any) -> None:
    one, two = (
        make_batches([text * 9], byte_tokenizer, seq_len=4, batch_size=2).fingerprint
        for text in ("abc", "abd")
    )
    assert one != two


@pytest.mark.parametrize("examples", [["text"], [PromptCompletion("p", "c")]])
@pytest.mark.parametrize("sizes", [{"seq_len": 1}, {"batch_size": 0}])
def test_sizes_out_of_range(byte_tokenizer: Any, examples: Any, sizes: dict[str, int]) -> None:
    (name,) = sizes
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        make_batches(examples, byte_tokenizer, **{"seq_len": 4, "batch_size": 1, **sizes})
    batches = make_batches(examples, byte_tokenizer, seq_len=4, batch_size=1)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        batches.batch(-1)


def test_no_examples_and_no_eos(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no examples"):
        make_batches([], byte_tokenizer, seq_len=4, batch_size=1)

    class NoEos:
        eos_token_id = bos_token_id = None

    with pytest.raises(DataError, match="no EOS token"):
        make_batches(["x"], NoEos(), seq_len=4, batch_size=1)


def test_epoch_generators_are_independent() -> None:
    drawn = {
        torch.randint(0, 2**40, (1,), generator=epoch_generator(seed, epoch)).item()
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(drawn) == 25


# --- tokenisation --------------------------------------------------------------------------------


def test_encode_is_the_tokenizer_text_by_text(merging_tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("prodial_kernels.training.data.tokenization.CHARACTERS_AT_ONCE", 10)
    texts = ["the thing", "", "x" * 30, "a the ab", "é", "", "end"]
    encoded = list(encode(merging_tokenizer, texts))
    assert [e.tolist() for e in encoded] == [merging_tokenizer(t)["input_ids"] for t in texts]
    assert all(e.dtype == torch.int32 for e in encoded)


def test_pairs_move_trailing_space_and_split_the_joint_encoding(merging_tokenizer: Any) -> None:
    tokens = merging_tokenizer.convert_ids_to_tokens

    def pair(context: str, continuation: str) -> tuple[list[str], list[str]]:
        ((a, b),) = encode_pairs(merging_tokenizer, [(context, continuation)])
        return tokens(a.tolist()), tokens(b.tolist())

    assert pair("in", " the") == (["i", "n"], ["Ġthe"])
    assert pair("in ", "the") == (["i", "n"], ["Ġthe"])
    assert pair("in \n", "x") == (["i", "n"], ["Ġ", "Ċ", "x"])
    assert pair("", "the") == (["<eos>"], ["the"])
    assert pair("  ", "x") == (["<eos>"], ["Ġ", "Ġ", "x"])
    # The boundary falls inside "the": the continuation is what is left after two tokens.
    assert pair("oth", "er") == (["o", "th"], ["r"])
    # Nothing is left after "a" of "ab": the continuation is encoded by itself.
    assert pair("a", "b") == (["a"], ["b"])


def test_tokenizers_that_begin_with_bos(bos_tokenizer: Any) -> None:
    tokenizer = bos_tokenizer
    bos = tokenizer.bos_token_id
    ((context, continuation),) = encode_pairs(tokenizer, [("a", "b")])
    assert context.tolist()[0] == bos
    assert bos not in continuation
    packed = make_batches(["x", "y"], tokenizer, seq_len=6, batch_size=1).batch(0)
    assert tokenizer.decode(packed.input_ids[0]) == "<bos>x<eos><bos>y<eos>"


def test_continuation_without_tokens(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no tokens in the continuation ''"):
        encode_pairs(byte_tokenizer, [("a", "")])
