"""Fixtures for every test: seeded, offline, and no memory that happens to hold good values."""

from __future__ import annotations

import gc
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

# Before anything imports them: no hub look-ups, no thread fight between test workers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors: a second thread only waits, and spins while it does. Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# mamba_ssm's Mamba-2 kernels take one launch configuration instead of minutes of tuning. Read when
# it is imported, which transformers does as well.
os.environ.setdefault("MAMBA_DETERMINISTIC", "1")

from pathlib import Path

import pytest
import torch

# Read when a kernel is defined, so before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from support.kernels import quick_interpreter

    quick_interpreter.install()
elif find_spec("mamba_ssm"):
    # Before transformers' models, which take its functions when they are imported. While tests are
    # collected mamba_ssm's warnings are errors, and transformers would fall back without a word.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mamba_ssm  # noqa: F401


# What takes long for few tests. Files go to workers in order, most tests first; these would be the
# last, and each would keep one worker busy when the other has nothing left.
BEGIN_WITH = (
    "test_compile_only.py", "distributed/test_runs.py", "search/test_search.py",
    "test_projector_in_fp8.py", "test_capture_ddp.py", "test_resume_kill.py", "test_replay.py",
    "test_pdl.py", "test_compiled_mixers.py", "test_functional_compile.py", "test_dequantize.py",
    "test_benchmark_finetune.py", "search/test_work.py", "test_captured_methods.py",
    "test_quality_rows.py", "test_quality_side_by_side.py", "test_planning.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist take files in the order below."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files by how long they take, roughly."""
    tests_of = Counter(item.path for item in items)

    def position(item: pytest.Item) -> tuple[int, int]:
        path = item.path.as_posix()
        first = [at for at, name in enumerate(BEGIN_WITH) if path.endswith(name)]
        return (first or [len(BEGIN_WITH)])[0], -tests_of[item.path]

    items.sort(key=position)


def pytest_unconfigure() -> None:
    """Give back to the collector what modules left out, which libraries' ends look for."""
    gc.unfreeze()


@pytest.fixture
def kernel_device() -> str:
    """Where the Triton kernels run: the GPU, or the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run starts from: a tiny model in ``model``, a text in ``text.txt``."""
    # Loads transformers, which most tests do without.
    from support.tiny_model import write_text, write_tiny_model

    folder = tmp_path_factory.mktemp("place")
    write_tiny_model(folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(autouse=True, scope="module")
def _the_collector_sees_what_the_module_makes() -> None:
    """Leave older objects out of collections, and of what tests ask the collector for.

    Else each collection, of which running out of memory or a captured step takes several, goes
    through the millions of objects that PyTorch and transformers consist of.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """Written files are safe from a kill at once; a power failure, no test has.

    Thousands of files are written, and each would be waited for: a minute of two workers. The
    processes that tests start do wait.
    """
    upstream = os.fsync

    def no_wait(descriptor: int) -> None:
        os.fstat(descriptor)  # an error where upstream has one

    os.fsync = no_wait
    yield
    os.fsync = upstream


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        # What that comes to without devices, which it takes a millisecond to look for.
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """What reads memory that nobody wrote finds NaN there, or the largest integer."""
    if torch.cuda.is_available():
        yield  # deterministic operators are fewer there
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _memory_goes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test's memory on the GPU is free for the tests of other workers when it is done."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
