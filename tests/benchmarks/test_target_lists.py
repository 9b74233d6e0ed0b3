"""The committed table of published target lists is what the doctor says today."""

from __future__ import annotations

import pytest
from torch import nn

from benchmarks import target_lists
from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.diagnosis.doctor import diagnose
from prodial_kernels.models.diagnosis.published import PUBLISHED


def without_versions(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("transformers ")]


def test_the_table_is_that_of_the_sources() -> None:
    """Run ``python -m benchmarks.target_lists`` where it differs, and read what changed."""
    assert without_versions(target_lists.PAGE.read_text()) == without_versions(target_lists.page())


def test_every_list_for_a_type_is_in_it() -> None:
    kinds = {name.partition(",")[0] for name in target_lists.MODELS}
    assert {kind for entry in PUBLISHED for kind in entry.models} - {"*"} <= kinds


@pytest.mark.parametrize("name", target_lists.MODELS)
def test_prodial_adapts_what_the_lists_name(name: str) -> None:
    """As the page says: every linear layer but the head."""
    model = target_lists.build(name)
    diagnosis = diagnose(model, "all-linear", method="prodial")
    assert {finding.status for finding in diagnosis.findings} == {"adapted"}
    head = model.get_output_embeddings()
    names = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    pattern = "|".join(name.replace(".", r"\.") for name in sorted(names))
    report = apply_prodial(model, ProdialConfig(r=2, target_modules=pattern, allow_partial=True))
    assert report.adapted[0] == len(names)
