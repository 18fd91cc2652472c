"""The kernels of a training step on a GPU, counted without one: those of a block, and what PyTorch does.

`benchmarks.step_kernels` takes the step, as a CUDA graph captures it, on a device that is not there.
"""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING

import pytest
import timm

pytest.importorskip("triton")

from benchmarks.pretend import Arguments
from benchmarks.step_kernels import Operation, deit, filled, one_step, rows_of, table

if TYPE_CHECKING:
    from timm.models import VisionTransformer

BATCH, TOKENS, CHANNELS, CLASSES = 4, 197, 192, 1000
IMAGES, PATCHES = (BATCH, 14, 14, 3, 16, 16), (BATCH, 196, 768)

# Of one block, forward and backward, by (kernel, what it is for).
BLOCK = {
    ("pack_kernel", "weights and biases cast and packed"): 2,
    ("product_kernel", "qkv"): 1,
    ("flash_forward", "attention, forward"): 1,
    ("product_kernel", "fc1 with its activation"): 1,
    ("product_kernel", "fc2, proj"): 2,
    ("residual_norm_kernel", "residual sum and norm"): 2,
    ("residual_norm_gradient_kernel", "its gradients"): 2,
    ("residual_norm_sums_kernel", "its gradients of weights, the parts added up"): 2,
    ("product_kernel", "gradient through fc2 and the activation"): 1,
    ("product_kernel", "gradient at the heads' outputs"): 1,
    ("flash_backward", "attention, backward: a pass for q, one for k and v"): 2,
    ("product_kernel", "gradients at the norms' outputs"): 2,
    ("weight_gradient_kernel", "gradients of weights, in parts of the tokens"): 4,
    ("finish_kernel", "gradients of weights, the parts added up"): 4,
    (
        "sums_kernel",
        "gradients of biases, the parts added up",
    ): 2,  # of qkv and fc1; output biases are the norms' affair
}
STREAM, ONE, WEIGHT = (BATCH, TOKENS, CHANNELS), (1, TOKENS, CHANNELS), (CHANNELS, 768)
EMBEDDED, ROWS, HEAD = (BATCH, 196, CHANNELS), (BATCH * 196, CHANNELS), (CLASSES, CHANNELS)
# What PyTorch does with a tensor as large as a weight or as the stream, once a step, by the shapes that are as large.
# AdamW and the average of the weights read and write every weight, in three calls.
ONCE_A_STEP = {
    "unfold the images, and round them": ("aten::_to_copy", (IMAGES, IMAGES)),
    "round the patch embedding's weight": ("aten::_to_copy", (WEIGHT, WEIGHT)),
    "embed the patches": ("aten::addmm", ((BATCH * 196, 768), WEIGHT[::-1], ROWS)),
    "autocast makes the tokens float32, as the class token is": ("aten::_to_copy", (EMBEDDED, EMBEDDED)),
    "put the class token before them": ("aten::cat", (EMBEDDED, STREAM)),
    "add the position embedding": ("aten::add.Tensor", (STREAM, ONE, STREAM)),
    "round the head's weight": ("aten::_to_copy", (HEAD, HEAD)),
    "the head": ("aten::addmm", (HEAD[::-1],)),
    "the gradient at the head's input": ("aten::mm", (HEAD,)),
    "the gradient of the head's weight": ("aten::mm", (HEAD,)),
    "the same in float32": ("aten::_to_copy", (HEAD, HEAD)),
    "the gradient of the position embedding": ("aten::sum.dim_IntList", (STREAM, ONE)),
    "the gradient of the tokens in bfloat16": ("aten::_to_copy", (EMBEDDED, EMBEDDED)),
    "the gradient of the patch embedding's weight": ("aten::mm", (ROWS[::-1], (BATCH * 196, 768), WEIGHT)),
    "the gradient of its bias": ("aten::sum.dim_IntList", (ROWS,)),
    "the gradient of its weight in float32": ("aten::_to_copy", (WEIGHT, WEIGHT)),
}
UPDATES = {"aten::_fused_adamw_.tensor_lr": 2, "aten::_foreach_lerp_.List": 1}


def tiny(depth: int) -> VisionTransformer:
    model: VisionTransformer = timm.create_model("vit_tiny_patch16_224", depth=depth)
    return model


@cache
def step(depth: int) -> list[Operation]:
    return one_step(partial(tiny, depth), BATCH)


def launched(depth: int) -> Counter[tuple[str, str]]:
    return Counter((found.name, found.purpose) for found in step(depth) if found.is_triton)


def large(operation: Operation) -> tuple[tuple[int, ...], ...]:
    """The shapes of those tensors that have at least the size of a block's smallest weight matrix."""
    return tuple(shape for shape in operation.shapes if prod(shape) >= CHANNELS * CHANNELS)


def test_a_block_launches_these_kernels_and_no_others() -> None:
    assert launched(3) - launched(2) == BLOCK
    assert not launched(2) - launched(3)


def test_outside_of_the_blocks_one_more_norm_is_launched() -> None:
    """That of the first block on entry; the last norm is in the sum of the last block."""
    outside = launched(2) - Counter({key: 2 * count for key, count in BLOCK.items()})
    assert {name: count for (name, _), count in outside.items()} == {
        "residual_norm_kernel": 1,
        "residual_norm_gradient_kernel": 1,
        "residual_norm_sums_kernel": 1,
    }


def test_pytorch_does_nothing_large_within_a_block() -> None:
    """All that it does with a tensor of full size is named above, and does not grow with the depth."""
    for depth in (2, 3):
        found = Counter((operation.name, large(operation)) for operation in step(depth) if not operation.is_triton)
        wide = Counter({key: count for key, count in found.items() if key[1] and key[0] not in UPDATES})
        assert wide == Counter(ONCE_A_STEP.values())
        assert {name: sum(found[key] for key in found if key[0] == name) for name in UPDATES} == UPDATES


def test_no_operation_of_pytorch_belongs_to_a_block() -> None:
    """Not even a small one: a mask of stochastic depth, a width and a bias are read where they are."""
    two, three = (Counter(found.name for found in step(depth) if not found.is_triton) for depth in (2, 3))
    assert three == two


def test_bytes_are_those_of_the_tensors() -> None:
    """Of the sum and norm between two modules: stream and branch in, stream, normed form and statistics out."""
    rows = BATCH * TOKENS
    found = [operation for operation in step(2) if operation.name == "residual_norm_kernel"][1]
    stream = 4 * rows * CHANNELS  # bytes, in float32
    assert sorted(found.tensors)[-4:] == [stream // 2, stream // 2, stream, stream]
    # Weight and bias, the branch's bias and its width, mean and deviation, and the mask.
    small = 4 * (2 * CHANNELS + CHANNELS + 1 + 2 * rows + BATCH)
    assert found.bytes == 3 * stream + small
    casts = [operation for operation in step(2) if operation.shapes == (IMAGES, IMAGES)]
    assert [operation.tensors for operation in casts] == [(4 * prod(IMAGES), 2 * prod(IMAGES))]


# 26 parts of 5 tiles would fit in one turn, but 25 parts of 16 steps cover all 394.
@pytest.mark.parametrize(
    ("full", "columns", "tiles", "parts"), [(768, 192, 6, 22), (3072, 768, 72, 3), (640, 192, 5, 25)]
)
def test_the_workspace_of_weight_gradients_is_counted_as_far_as_it_is_filled(
    full: int, columns: int, tiles: int, parts: int
) -> None:
    """The tokens are cut so that 132 programs have work: in one turn, or where that ends sooner in two."""
    shapes: Arguments = {"full": full, "rows": full, "columns": columns, "tokens": 128 * 197, "groups": 1}
    blocks: Arguments = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "OVERHEAD": 20, "programs": 132}
    assert filled({**shapes, **blocks, "PACKED": False, "BY_ROWS": True}) == tiles * parts * 4 * 128 * 256


def test_the_table_adds_up() -> None:
    operations = step(2)
    rows = rows_of(operations)
    assert sum(row.count for row in rows) == len(operations)
    assert sum(row.bytes for row in rows) == sum(operation.bytes for operation in operations)
    text = "\n".join(table(rows))
    assert "| `product_kernel` | qkv | 2 |" in text and "| `aten::cat` |" in text
    assert len(deit("tiny").blocks) == 12
