"""The kernels of one training step and the bytes of their tensors, counted without a GPU; nothing is timed.

python -m benchmarks.step_kernels --model base                  a Markdown table
python -m benchmarks.step_kernels --model tiny --json FILE      and the same as a file

The step is that of `benchmarks.steps` as a CUDA graph captures it, with stochastic depth: forward and backward of the
super-network with widths on the device, under autocast to bfloat16, then fused AdamW and the average of the weights.
It runs on a pretended device (pretend.py). The launches are the same at every width, and the bytes are those of the
full width. Each tensor that an operation reads or writes is counted once and as a whole, so parts that a kernel reads
twice or leaves out are not seen; of a workspace only the filled part counts. A Triton kernel is one launch.
Operations of PyTorch are those that its dispatcher sees, each of which may be several kernels (a sum,
`slice_backward`, an update of many weights); views are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.pretend import Arguments, pretended_cuda
from benchmarks.registry import HEADS
from skd_kernels.gpu.buffers import UNIT, ceil_div

if TYPE_CHECKING:
    from timm.models import VisionTransformer
    from torch._ops import OpOverload
    from triton import JITFunction

    from benchmarks.timing import JSON

WHAT = (
    "The kernels of one training step and the bytes of the tensors that they take and give, at the full width. "
    "Computed from the program without a GPU, not measured: it says nothing of time."
)
DROP_PATH = 0.1
# What each Triton kernel is for; products are told apart by their constants.
PURPOSES = {
    "pack_kernel": "weights and biases cast and packed",
    "flash_forward": "attention, forward",
    "flash_backward": "attention, backward: a pass for q, one for k and v",
    "weight_gradient_kernel": "gradients of weights, in parts of the tokens",
    "finish_kernel": "gradients of weights, the parts added up",
    "column_sums_kernel": "gradients of output biases, in parts of the tokens",
    "sums_kernel": "gradients of biases, the parts added up",
    "residual_norm_kernel": "residual sum and norm",
    "residual_norm_gradient_kernel": "its gradients",
    "residual_norm_sums_kernel": "its gradients of weights, the parts added up",
}
PRODUCTS = {
    ("activate", True, True): "fc1 with its activation",
    ("gradient", True, False): "gradient through fc2 and the activation",
    ("linear", True, True): "qkv",
    ("linear", True, False): "gradient at the heads' outputs",
    ("linear", False, True): "fc2, proj",
    ("linear", False, False): "gradients at the norms' outputs",
}


@dataclass(frozen=True)
class Operation:
    """A Triton kernel that is launched, or an operation of PyTorch.

    Attributes:
        name: of the kernel, or "aten::" and so on.
        purpose: of a Triton kernel.
        tensors: the bytes of each tensor that it takes or gives.
        shapes: of those.
    """

    name: str
    purpose: str
    tensors: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def is_triton(self) -> bool:
        return "::" not in self.name

    @property
    def bytes(self) -> int:
        return sum(self.tensors)


def purpose_of(kernel: str, arguments: Arguments) -> str:
    if kernel != "product_kernel":
        return PURPOSES.get(kernel, "")
    epilogue, ragged, transposed = (arguments[key] for key in ("EPILOGUE", "RAGGED_COLUMNS", "TRANSPOSED"))
    return PRODUCTS[str(epilogue), bool(ragged), bool(transposed)]


def stored(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's elements; an expanded tensor has fewer elements in memory than its shape says."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count


def described(name: str, purpose: str, tensors: Sequence[torch.Tensor]) -> Operation:
    return Operation(name, purpose, tuple(map(stored, tensors)), tuple(tuple(tensor.shape) for tensor in tensors))


def filled(finish: Arguments) -> int:
    """The bytes that the partial sums of a weight's gradient fill in their workspace, which may be larger.

    Args:
        finish: the arguments of `finish_kernel`, which reads them; weight_gradient.py says how the work is cut.
    """
    number = {name: value for name, value in finish.items() if isinstance(value, int)}
    m, n, groups, programs = (number[name] for name in ("BLOCK_M", "BLOCK_N", "groups", "programs"))
    size = groups * ceil_div(number["full"], UNIT) * UNIT if number["PACKED"] else number["full"]
    if number["BY_ROWS"]:
        tall = ceil_div(size, m) * (1 if number["PACKED"] else groups)
        tiles = tall * ceil_div(number["columns"], n)
    else:
        tiles = ceil_div(number["rows"], m) * ceil_div(size, n)
    steps = ceil_div(number["tokens"], number["BLOCK_K"])
    one, two = (min(max(turns * programs // tiles, 1), steps) for turns in (1, 2))
    ends = [ceil_div(tiles * cut, programs) * (ceil_div(steps, cut) + number["OVERHEAD"]) for cut in (one, two)]
    parts = ceil_div(steps, ceil_div(steps, two if ends[1] < ends[0] else one))
    return tiles * parts * m * n * torch.float32.itemsize


def replaced(operation: Operation, old: int, new: int) -> Operation:
    """The operation with `new` bytes for its tensor of `old` bytes."""
    place = operation.tensors.index(old)
    return replace(operation, tensors=(*operation.tensors[:place], new, *operation.tensors[place + 1 :]))


def makes_a_view(func: OpOverload) -> bool:
    """Whether the operation starts no kernel, because its result is a view of an argument or uninitialised memory."""
    returns = [found.alias_info for found in func._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in returns)
    return views or func.name().startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach"))


def count(run: Callable[[Callable[[], None]], None], architecture: int = 90) -> list[Operation]:
    """The operations of `run` on a CUDA device that is not there, in order, from where it calls its argument on."""
    found: list[Operation] = []

    def launched(kernel: JITFunction, arguments: Arguments, _: dict[str, object]) -> None:
        values = [value.base if isinstance(value, TensorDescriptor) else value for value in arguments.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        found.append(described(kernel.__name__, purpose_of(kernel.__name__, arguments), tensors))
        if kernel.__name__ == "finish_kernel" and "OVERHEAD" in arguments:
            workspace = next(stored(value) for value in tensors if value is arguments["work"]), filled(arguments)
            found[-2:] = [replaced(operation, *workspace) for operation in found[-2:]]

    def operated(func: OpOverload, args: Sequence[object], named: Arguments, result: object) -> None:
        taken = {id(value): value for value in tree_leaves((args, named)) if isinstance(value, torch.Tensor)}
        given = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        # What is changed in place is read and written; AdamW says that it changes the gradients, but does so only to
        # scale them.
        writes = [
            parameter.alias_info is not None and parameter.alias_info.is_write and parameter.name != "grads"
            for parameter in func._schema.arguments
        ]
        changed = [
            value
            for argument, write in zip(args, writes, strict=False)
            for value in tree_leaves(argument)
            if write and isinstance(value, torch.Tensor)
        ]
        if not makes_a_view(func):
            new = [value for value in given if id(value) not in taken]
            operation = described(func.name(), "", [*taken.values(), *changed, *new])
            if operation.bytes:
                found.append(operation)

    with pretended_cuda(architecture, launched, operated):
        run(found.clear)
    return found


def one_step(network: Callable[[], VisionTransformer], batch: int) -> list[Operation]:
    """The operations of a step of the super-network made of `network`, at a batch of that many images.

    Args:
        network: makes the timm model; it is called on the device that is not there.
    """

    def run(begin: Callable[[], None]) -> None:
        import skd
        from benchmarks import steps  # it looks for the device when it is imported
        from skd.training.dropping import drop_paths
        from skd.training.step import by_hand

        model = network()
        supernet = skd.SuperNet(model.to("cuda")).train()
        supernet.dropout_list = steps.dropout_list(supernet)
        step = by_hand(supernet, replace(steps.RECIPE, batch_size=batch, cuda_graph=True))
        capture = step.capture
        if capture is None:
            raise RuntimeError("skd refused to use a CUDA graph here")
        recorded = capture.function

        def counted(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            begin()
            return recorded(inputs)

        capture.function = counted
        images = torch.empty(batch, *model.pretrained_cfg["input_size"], device="cuda")
        labels = torch.empty(batch, dtype=torch.int64, device="cuda")
        with drop_paths(supernet, DROP_PATH, seed=0) as step.state.paths:
            for _ in range(2):  # the optimizer makes its state in the first
                step([(images, labels)], 0)

    return count(run)


def deit(size: str) -> VisionTransformer:
    import timm

    found: VisionTransformer = timm.create_model(f"deit_{size}_patch16_224")
    return found


# Tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Operations of one name and purpose."""

    name: str
    purpose: str
    count: int
    bytes: int


def rows_of(operations: Sequence[Operation]) -> list[Row]:
    """The rows of the table: Triton's kernels come first, and those with the most bytes."""
    rows = []
    for name, purpose in dict.fromkeys((found.name, found.purpose) for found in operations):
        alike = [found for found in operations if (found.name, found.purpose) == (name, purpose)]
        rows.append(Row(name, purpose, len(alike), sum(found.bytes for found in alike)))
    return sorted(rows, key=lambda row: ("::" in row.name, -row.bytes))


def table(rows: Sequence[Row]) -> list[str]:
    lines = ["| kernel | what for | launches | MB |", "|---|---|--:|--:|"]
    for kind, triton in (("all Triton kernels", True), ("all operations of PyTorch", False)):
        own = [row for row in rows if ("::" not in row.name) == triton]
        total = Row(f"**{kind}**", "", sum(row.count for row in own), sum(row.bytes for row in own))
        lines += [f"| `{row.name}` | {row.purpose} | {row.count} | {row.bytes / 1e6:,.1f} |" for row in own]
        lines.append(f"| {total.name} | | {total.count} | {total.bytes / 1e6:,.1f} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_kernels", description="Kernels of a step.")
    parser.add_argument("--model", choices=HEADS, default="base")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = rows_of(one_step(lambda: deit(args.model), args.batch))
    print("\n".join(table(rows)))
    from benchmarks import timing

    kernels: list[JSON] = [
        {"name": row.name, "what for": row.purpose, "launches": row.count, "bytes": row.bytes} for row in rows
    ]
    document = {
        "what": WHAT,
        "model": args.model,
        "batch": args.batch,
        **timing.provenance_without_device(),
        "results": {"kernels": kernels},
    }
    timing.write_json(args.json, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
