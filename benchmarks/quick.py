"""The questions to ask a GPU first: are the kernels near the vendor's libraries, does a graph follow the width?

python -m benchmarks.quick --model base --batch 128 --json quick.json

* the ceilings: a large copy and a large matrix product;
* the products of the masked MLP at full width, and its three kernels with an activation in them, against `a @ b`;
* the attention core, forward and backward, against F.scaled_dot_product_attention;
* the residual sum with the norm after it, forward and with its backward, against PyTorch and torch.compile;
* forward and backward of both operations in one CUDA graph, replayed while the width changes.

`TRITON_INTERPRET=1 python -m benchmarks.quick --device cpu --model tiny --batch 1 --tokens 20` only checks that it
runs: times of interpreted kernels mean nothing, and graphs are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import skd_kernels
from benchmarks.contenders import COMPILED
from benchmarks.measure import Case
from benchmarks.registry import HEAD_WIDTH, HEADS, MASKED, OPERATIONS, TOKENS, Operation
from benchmarks.timing import (
    DEVICE,
    GPU,
    REHEARSAL,
    SIZES,
    Call,
    captured,
    clock_of,
    copy_ceiling,
    matmul_ceiling,
    provenance,
    side_by_side,
)

WHAT = "Kernels at full width, next to calls of the library; forward and backward of the operations in one graph."
Row = dict[str, Any]


class Questions:
    """The calls, at one model's shapes.

    Attributes:
        rows: what was found, one dict per line of the table.
    """

    def __init__(self, model: str, batch: int, tokens: int, device: str) -> None:
        self.model, self.heads = model, HEADS[model]
        self.batch, self.tokens, self.device = batch, tokens, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter's bfloat16 is wrong
        self.clock = clock_of(device)
        self.rounds = 15 if device == "cuda" else 1
        self.peak = matmul_ceiling(device, self.dtype)
        self.rows: list[Row] = []

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def ask(self, question: str, ours: Call, library: Call, flops: float) -> None:
        seconds = side_by_side({"ours": ours, "library": library}, self.rounds, clock=self.clock)
        row: Row = {"question": question, "flops": flops}
        for name, value in seconds.items():
            row[f"{name}_ms"] = 1e3 * value
            row[f"{name}_tflops"] = flops / value / 1e12
            row[f"{name}_percent_of_matmul"] = 100 * flops / value / self.peak
        row["library_over_ours"] = seconds["library"] / seconds["ours"]
        self.rows.append(row)

    def mlp(self) -> None:
        """fc1 with GELU, fc2, dZ, and the two kinds of gradients, at full width."""
        from skd_kernels.gpu.buffers import padded
        from skd_kernels.gpu.hidden import hidden_features, hidden_gradient
        from skd_kernels.gpu.linear import input_gradient, output
        from skd_kernels.gpu.weight_gradient import weight_gradient

        rows, channels = self.batch * self.tokens, self.heads * HEAD_WIDTH
        hidden = 4 * channels
        x, dy = self.randn(rows, channels), self.randn(rows, channels)
        w1, b1 = self.randn(hidden, channels, scale=channels**-0.5), self.randn(hidden)
        w2 = self.randn(channels, hidden, scale=hidden**-0.5)
        width = torch.full((), hidden, dtype=torch.int32, device=self.device)
        h = self.randn(rows, padded(hidden))
        z, y, dw1 = h.clone().view(rows, 1, -1), torch.empty_like(x), torch.empty_like(w1)
        dz, flops = z.clone(), 2.0 * rows * channels * hidden
        flat = h[:, :hidden]
        self.ask(
            "fc1 + GELU", lambda: hidden_features(x, w1, b1, width, h, z, "gelu", False), lambda: x @ w1.T, flops
        )
        self.ask("fc2", lambda: output(h, w2, None, width, y), lambda: flat @ w2.T, flops)

        def gradient() -> object:
            return hidden_gradient(dy, w2, z, width, "gelu", keep=True, add_up=True)

        self.ask("dZ, db1 and scores", gradient, lambda: dy @ w2, flops)
        self.ask("dX", lambda: input_gradient(dz, w1, width, y), lambda: flat @ w1, flops)

        def by_rows() -> object:
            return weight_gradient(dz.flatten(1), x, width, dw1, by_rows=True, parts=1)

        self.ask("dW1", by_rows, lambda: flat.T @ x, flops)

    def attention(self) -> None:
        """The core alone at full width; the library's products count, not those that either computes twice."""
        from skd_kernels.gpu.flash import attend, differentiate_attention

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
        """Milliseconds, and the share of the bandwidth of a copy. Checked first."""
        operation = OPERATIONS["residual_norm"]
        case = Case(operation, operation.shape(self.model, self.batch, 1.0, self.tokens), self.dtype, self.device)
        contenders = case.contenders()
        if not (GPU or REHEARSAL):
            del contenders[COMPILED]  # it would take longer than all else, and say nothing of a GPU
        with skd_kernels.use("triton"):
            case.check(contenders)
            for question, backward in (("forward", False), ("forward and backward", True)):
                seconds = side_by_side(case.calls(contenders, backward), self.rounds, clock=self.clock)
                total = case.work(backward).bytes
                row: Row = {"question": f"residual_norm, {question}", "bytes": total}
                row["norm_ms"] = {name: 1e3 * value for name, value in seconds.items()}
                row["percent_of_copy"] = {name: 100 * total / value / copy for name, value in seconds.items()}
                self.rows.append(row)

    def replays(self) -> None:
        """One capture of forward and backward per operation; milliseconds of a replay at each width."""
        for name in MASKED:
            operation = OPERATIONS[name]
            shape = operation.shape(self.model, self.batch, 1.0, self.tokens)
            inputs = operation.inputs(shape, self.dtype, self.dtype, lambda size: self.randn(*size))
            for tensor in inputs:
                tensor.requires_grad_()
            full = operation.arguments(shape)["width"]
            width = torch.full((), full, dtype=torch.int32, device=self.device)
            named = operation.arguments(shape) | {"width": width}
            graph = captured(lambda: self.both(operation, inputs, named))  # noqa: B023
            row: Row = {"question": f"{name}, replayed", "replay_ms": {}}
            for fraction in SIZES.fractions:
                width.fill_(int(full * fraction))
                seconds = side_by_side({"replay": graph.replay}, self.rounds, clock=self.clock)["replay"]
                row["replay_ms"][str(fraction)] = 1e3 * seconds
            self.rows.append(row)

    def both(self, operation: Operation, inputs: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        out = operation.ours(*inputs, **named)
        torch.autograd.grad(out, inputs, inputs[0])


def table(rows: list[Row]) -> str:
    lines = [f"{'':<30}{'ours ms':>9}{'TFLOP/s':>9}{'% peak':>8}{'library':>9}{'TFLOP/s':>9}{'ratio':>7}"]
    for row in rows:
        if "norm_ms" in row:
            shares = row["percent_of_copy"]
            times = "  ".join(f"{key}: {ms:.3f} ({shares[key]:.0f} %)" for key, ms in row["norm_ms"].items())
            lines.append(f"{row['question']:<36}  ms (of a copy's bandwidth)  {times}")
            continue
        if "replay_ms" in row:
            times = "  ".join(f"{key}: {value:.3f}" for key, value in row["replay_ms"].items())
            lines.append(f"{row['question']:<30}  ms at width  {times}")
            continue
        cells = f"{row['ours_ms']:>9.3f}{row['ours_tflops']:>9.1f}{row['ours_percent_of_matmul']:>8.0f}"
        cells += f"{row['library_ms']:>9.3f}{row['library_tflops']:>9.1f}{row['library_over_ours']:>7.2f}"
        lines.append(f"{row['question']:<30}{cells}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description="The first questions to a GPU.")
    parser.add_argument("--model", choices=HEADS, action="append")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    copy = copy_ceiling(args.device)
    document: dict[str, Any] = {"copy_gigabytes_per_second": copy / 1e9}
    print(f"copy {document['copy_gigabytes_per_second']:.0f} GB/s")
    for model in args.model or ["base"]:
        questions = Questions(model, args.batch, args.tokens, args.device)
        questions.mlp()
        questions.attention()
        questions.norm(copy)
        if args.device == "cuda":
            questions.replays()
        document["matmul_tflops"] = questions.peak / 1e12
        document[model] = questions.rows
        print(f"DeiT-{model.capitalize()}, batch {args.batch}; matrix product {questions.peak / 1e12:.1f} TFLOP/s")
        print(table(questions.rows), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps({"what": WHAT, **provenance(), "results": document}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
