"""Every VisionTransformer of timm's registry, at a tiny size, converts and extracts exactly or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from architectures import batches, names, structure, tiny
from equivalence import check
from make_architecture_table import BEGIN, END, table

import skd
from benchmarks.result import split

# What a refusal must name.
REFUSED = {
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_large_patch14_xp_224": "ParallelScalingBlock",
    "vit_huge_patch14_xp_224": "ParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "ParallelScalingBlock",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
    "vit_dlittle_patch16_reg1_gap_256": "DiffAttention",
}


def test_registry_is_walked() -> None:
    assert len(names()) >= 206
    assert set(REFUSED) < set(names())


CONVERTED = [name for name in names() if name not in REFUSED]
first_of: dict[object, str] = {}


@pytest.mark.parametrize("name", CONVERTED)
def test_architecture(name: str) -> None:
    """One of each structure. Names whose networks differ in sizes alone are for `test_every_architecture`."""
    model = tiny(name)
    first = first_of.setdefault(structure(model), name)
    if first != name:
        pytest.skip(f"has the structure of {first}")
    check(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_every_architecture(name: str) -> None:
    check(tiny(name))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    model = tiny(name)
    with pytest.raises(ValueError, match=rf"blocks\.0\S* is a {REFUSED[name]}\b"):
        skd.convert(model, batches(model))


def test_the_table_of_architectures_is_fresh() -> None:
    """It is what the code says (of the timm release that it names)."""
    page = Path(__file__).parent.parent / "docs" / "ARCHITECTURES.md"
    try:
        _, written, _ = split(page.read_text(), BEGIN, END)
    except (OSError, ValueError) as error:
        pytest.fail(f"{page.name}: {error}")
    if not written.startswith(f"timm {timm.__version__} "):
        pytest.skip(f"the table is of another release: {written[:20]!r}; installed is timm {timm.__version__}")
    assert written == table(), (
        "run: PYTHONPATH=. python tests/make_architecture_table.py --write docs/ARCHITECTURES.md"
    )
