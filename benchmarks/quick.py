"""First measurements on a GPU: the Triton kernels against the vendor's libraries, and CUDA graphs at several widths.

python -m benchmarks.quick --model base --batch 128 --json quick.json

Only this benchmark calls functions inside skd_kernels.gpu, namely those that start one kernel each. It measures

* the ceilings: a large copy and a large matrix product;
* the products of the masked MLP at full width, and its three kernels with an activation in them, against `a @ b`;
* the attention core, forward and backward, against F.scaled_dot_product_attention;
* the residual sum with the norm after it, forward and with its backward, against PyTorch and torch.compile;
* forward and backward of both operations in one CUDA graph, replayed while the width changes.

`TRITON_INTERPRET=1 python -m benchmarks.quick --device cpu --model tiny --batch 1 --tokens 20` only checks that it
runs. The times of interpreted kernels mean nothing, and graphs are left out.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import skd_kernels
from benchmarks import timing
from benchmarks.op import Case, tensors
from benchmarks.registry import COMPILED, HEAD_WIDTH, HEADS, MASKED, OPERATIONS, TOKENS
from benchmarks.result import Info
from benchmarks.table import products_table
from benchmarks.timing import DEVICE, GPU, JSON, SIZES, Call

WHAT = "Kernels at full width, next to calls of the library; forward and backward of the operations in one graph."


class Questions:
    """The calls, at one model's shapes.

    Attributes:
        rows: what was found, one dict per line of the table.
    """

    def __init__(self, model: str, batch: int, tokens: int, device: str) -> None:
        self.model, self.heads = model, HEADS[model]
        self.batch, self.tokens, self.device = batch, tokens, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter's bfloat16 is wrong
        self.rounds = 15 if device == "cuda" else 1
        self.peak = timing.matmul_ceiling(device, self.dtype)
        self.rows: list[JSON] = []

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def time(self, calls: dict[str, Call]) -> dict[str, float]:
        return timing.side_by_side(calls, self.rounds, clock=timing.clock_of(self.device))

    def ask(self, question: str, ours: Call, library: Call, flops: float) -> None:
        seconds = self.time({"ours": ours, "library": library})
        row: dict[str, JSON] = {"question": question, "flops": flops}
        for name, value in seconds.items():
            row[f"{name}_ms"] = 1e3 * value
            row[f"{name}_tflops"] = flops / value / 1e12
            row[f"{name}_percent_of_matmul"] = 100 * flops / value / self.peak
        self.rows.append(row | {"library_over_ours": seconds["library"] / seconds["ours"]})

    def mlp(self) -> None:
        """fc1 with GELU, fc2, dZ, and the gradients of an input and of a weight, at full width."""
        from skd_kernels.gpu.layout import Layout
        from skd_kernels.gpu.packing import pack
        from skd_kernels.gpu.products import gradient_rows, product
        from skd_kernels.gpu.weight_gradient import weight_gradient

        rows, channels = self.batch * self.tokens, self.heads * HEAD_WIDTH
        hidden = 4 * channels
        layout = Layout(hidden, row_groups=1, column_groups=1, packed=False)
        x, dy = self.randn(rows, channels), self.randn(rows, channels)
        w1, b1 = self.randn(hidden, channels, scale=channels**-0.5), self.randn(hidden)
        w2 = self.randn(channels, hidden, scale=hidden**-0.5)
        width = torch.full((), hidden, dtype=torch.int32, device=self.device)
        (inward, outward), bias = layout.empty_weights(x, channels), torch.empty_like(b1)
        pack(w1, b1, w2, (inward, bias, outward), width, layout)
        h, y, dw1 = self.randn(rows, layout.part_stride), torch.empty_like(x), torch.empty_like(w1)
        slopes, dz, flops = h.clone(), h.clone(), 2.0 * rows * channels * hidden
        sums = torch.empty(gradient_rows(dy, False), 2, layout.part_stride, device=self.device)
        flat, into = h[:, :hidden], partial(product, ragged_columns=True, by_rows=True)
        out_of = partial(product, ragged_columns=False)

        def features() -> None:
            into(x, inward, bias, h, width, layout, epilogue="activate", transposed=True, act="gelu", slopes=slopes)

        self.ask("fc1 + GELU", features, lambda: x @ w1.T, flops)
        second = partial(out_of, h, outward, None, y, width, layout, transposed=True, by_rows=False)
        self.ask("fc2", second, lambda: flat @ w2.T, flops)

        def gradient(scores: bool) -> None:
            features = h if scores else None
            into(
                dy,
                outward,
                None,
                dz,
                width,
                layout,
                epilogue="gradient",
                transposed=False,
                slopes=slopes,
                features=features,
                sums=sums,
            )

        self.ask("dZ and db1", lambda: gradient(False), lambda: dy @ w2, flops)
        self.ask("dZ, db1 and scores", lambda: gradient(True), lambda: dy @ w2, flops)
        back = partial(out_of, dz, inward, None, y, width, layout, transposed=False, by_rows=True)
        self.ask("dX", back, lambda: flat @ w1, flops)
        self.ask("dW1", lambda: weight_gradient(dz, x, width, dw1, layout, by_rows=True), lambda: flat.T @ x, flops)

    def attention(self) -> None:
        """The core alone at full width. The library's products are counted, not those that either computes twice."""
        from skd_kernels.gpu.flash import attend
        from skd_kernels.gpu.flash_backward import differentiate_attention

        shape, inner = (self.batch, self.tokens, 3, self.heads, HEAD_WIDTH), self.heads * HEAD_WIDTH
        packed = self.randn(self.batch * self.tokens, 3 * inner)
        dout = self.randn(self.batch * self.tokens, inner)
        out = torch.empty_like(dout)
        sums = torch.empty(self.batch, self.heads, self.tokens, device=self.device)
        width = torch.full((), HEAD_WIDTH, dtype=torch.int32, device=self.device)
        scale = HEAD_WIDTH**-0.5
        q, k, v = (part.requires_grad_() for part in packed.detach().clone().view(shape).permute(2, 0, 3, 1, 4))
        library = F.scaled_dot_product_attention(q, k, v)
        dlibrary = dout.view(*shape[:2], *shape[3:]).transpose(1, 2)
        flops = 4.0 * self.batch * self.heads * self.tokens**2 * HEAD_WIDTH

        def sdpa() -> object:
            with torch.no_grad():
                return F.scaled_dot_product_attention(q, k, v)

        self.ask("attention", lambda: attend(packed, out, sums, width, HEAD_WIDTH, scale), sdpa, flops)

        def backward() -> object:
            return differentiate_attention(packed, out, dout, sums, width, HEAD_WIDTH, scale, bias=True, scores=False)

        def sdpa_backward() -> object:
            return torch.autograd.grad(library, (q, k, v), dlibrary, retain_graph=True)

        self.ask("attention, backward", backward, sdpa_backward, 2.5 * flops)

    def norm(self, copy: float) -> None:
        """Milliseconds, and the share of the bandwidth of a copy; every contender is checked first."""
        operation = OPERATIONS["residual_norm"]
        case = Case(operation, operation.shape(self.model, self.batch, 1.0, self.tokens), self.dtype, self.device)
        contenders = case.contenders()
        if not (GPU or timing.REHEARSAL):
            del contenders[COMPILED]  # it would take longer than all else, and say nothing of a GPU
        with skd_kernels.use("triton"):
            case.check(contenders)
            for question, backward in (("forward", False), ("forward and backward", True)):
                seconds, total = self.time(case.calls(contenders, backward)), case.work(backward).bytes
                times: JSON = {name: 1e3 * value for name, value in seconds.items()}
                shares: JSON = {name: 100 * total / value / copy for name, value in seconds.items()}
                row: dict[str, JSON] = {"question": f"residual_norm, {question}", "bytes": total}
                self.rows.append(row | {"norm_ms": times, "percent_of_copy": shares})

    def replays(self) -> None:
        """One capture of forward and backward per operation; milliseconds of a replay at each width."""
        for name in MASKED:
            operation = OPERATIONS[name]
            shape = operation.shape(self.model, self.batch, 1.0, self.tokens)
            inputs = operation.inputs(shape, self.dtype, self.dtype, lambda size: self.randn(*size))
            for tensor in inputs:
                tensor.requires_grad_()
            width = torch.full((), shape[-1], dtype=torch.int32, device=self.device)
            call = partial(operation.ours, *inputs, **{**operation.arguments(shape), "width": width})
            graph = timing.captured(lambda: torch.autograd.grad(tensors(call()), inputs, inputs[0]))  # noqa: B023
            times: dict[str, JSON] = {}
            for fraction in SIZES.fractions:
                width.fill_(int(shape[-1] * fraction))
                times[str(fraction)] = 1e3 * self.time({"replay": graph.replay})["replay"]
            self.rows.append({"question": f"{name}, replayed", "replay_ms": times})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description="The first questions to a GPU.")
    parser.add_argument("--model", choices=HEADS, action="append")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    copy = timing.copy_ceiling(args.device)
    found = Info({"copy_gigabytes_per_second": copy / 1e9})
    for model in args.model or ["base"]:
        questions = Questions(model, args.batch, args.tokens, args.device)
        questions.mlp()
        questions.attention()
        questions.norm(copy)
        if args.device == "cuda":
            questions.replays()
        found["matmul_tflops"], found[model] = questions.peak / 1e12, questions.rows
        timing.write_json(args.json, {"what": WHAT, **timing.provenance(), "results": found})
    print("\n".join(products_table(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
