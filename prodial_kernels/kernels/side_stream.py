"""A second stream, for work that shares the device with a large product."""

import threading

import torch

_streams = threading.local()


def fork(device: torch.device) -> torch.cuda.Stream:
    """Return a side stream that has waited for the current stream's work so far.

    One per thread and device, so that a graph captured by one thread never meets another
    thread's work. Join it with ``torch.cuda.current_stream().wait_stream(...)``.
    """
    pool: dict[torch.device, torch.cuda.Stream] | None = getattr(_streams, "pool", None)
    if pool is None:
        pool = _streams.pool = {}
    if device not in pool:
        pool[device] = torch.cuda.Stream(device)
    side = pool[device]
    side.wait_stream(torch.cuda.current_stream(device))
    return side
