"""What the kernels of a profiled training step do, by their names, so that a table of forty long names is short."""

from __future__ import annotations

import re

OTHER = "other"
# The first pattern that a name matches decides. The project's own kernels stand first, by their whole names.
CLASSES: dict[str, str] = {
    "fc1 with its activation: `hidden_kernel`": r"hidden_kernel$",
    "dZ with its sums: `gradient_kernel`": r"gradient_kernel$",
    "fc2, dX: `output_kernel`, `input_gradient_kernel`": r"(output|input_gradient)_kernel$",
    "weight gradients of the MLP: `weight_gradient_kernel`, `finish_kernel`": r"(weight_gradient|finish)_kernel$",
    "projections: `into_heads`, `out_of_heads`, `transpose_kept`": r"(into_heads|out_of_heads|transpose_kept)$",
    "weight gradients of the projections: `weight_gradient`, `finish_weight_gradient`": r"(finish_)?weight_gradient$",
    "attention core: `flash_forward`, `flash_backward`, `add_terms`; the library's": (
        r"(flash_forward|flash_backward|add_terms)$|.*(sdpa|compute_dot_do_o|convert_dq)"
    ),
    "patch embedding, by cuDNN": r".*(cutlass\w*cudnn|nchwToNhwc|nhwcToNchw)",
    "matrix products of the library": r"nvjet|.*(splitKreduce|gemm)",
    "activation, a kernel of its own": r".*Gelu",
    "layer norms": r"residual_norm|.*(layer_norm|GammaBeta)",
    "additions, most of them residual sums": r".*CUDAFunctor_add",
    "conversions between float32 and bfloat16": r".*(bfloat16_copy|unrolled_elementwise_kernel.*direct_copy)",
    "sums over rows": r"(column_)?sums_kernel$|.*reduce_kernel",
    "AdamW, average of the weights": r".*multi_tensor_apply",
    "copies, concatenations, zeros": r".*(CatArray|direct_copy|FillFunctor|Mem(cpy|set)|memset)",
}


def class_of(kernel: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, kernel)), OTHER)


def grouped(kernels: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds by class, of the classes that occur.

    Args:
        kernels: milliseconds and launches of a step by the kernel's name.
    """
    found: dict[str, float] = {}
    for kernel, (milliseconds, _) in kernels.items():
        name = class_of(kernel)
        found[name] = found.get(name, 0.0) + milliseconds
    return found
