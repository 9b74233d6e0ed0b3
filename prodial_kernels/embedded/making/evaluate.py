"""How well a language model predicts text: bits per byte."""

import math
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["bits_per_byte"]


@torch.no_grad()
def bits_per_byte(
    model: Any,
    tokens: torch.Tensor,
    byte_lengths: torch.Tensor,
    sequence_length: int = 512,
    batch_size: int = 16,
) -> float:
    """Measure a causal language model on a token stream.

    The stream is cut into windows that do not overlap; a window's first tokens are predicted
    from little context, so the figure is a little worse than one with a sliding window.

    Args:
        model: Called as ``model(input_ids=..., use_cache=False).logits``; it is left in the mode
            (training or evaluation) that it comes in.
        tokens: Integer ids ``[tokens]``, on the model's device.
        byte_lengths: Bytes of text that each token stands for, int64 ``[vocab_size]``.
        sequence_length: Predicted tokens a window.
        batch_size: Windows a forward pass.

    Returns:
        Total code length of the predicted tokens in bits, over their bytes of text.

    Raises:
        ValueError: ``tokens`` has fewer than two elements.
    """
    if tokens.numel() < 2:
        raise ValueError(f"tokens: expected at least 2 tokens to score, got {tokens.numel()}")
    nats, length = 0.0, 0
    inputs, targets = tokens[:-1].long(), tokens[1:].long()
    windows = inputs.numel() // sequence_length
    cut = windows * sequence_length
    batches = [
        (inputs[start:end].view(-1, sequence_length), targets[start:end].view(-1, sequence_length))
        for start in range(0, cut, batch_size * sequence_length)
        for end in [min(start + batch_size * sequence_length, cut)]
    ]
    if cut < inputs.numel():
        batches.append((inputs[cut:][None], targets[cut:][None]))
    lengths = byte_lengths.to(tokens.device)
    for x, y in batches:
        logits = model(input_ids=x, use_cache=False).logits.float()
        nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        length += int(lengths[y].sum())
    return nats / math.log(2) / length
