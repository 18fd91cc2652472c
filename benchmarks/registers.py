"""Registers, spills and shared memory of every Triton kernel, compiled for GPUs that need not be there.

python -m benchmarks.registers                      a Markdown table for sm_80, sm_90 and sm_100
python -m benchmarks.registers --arch 90 --quick    the examples of the ordinary test suite only
python -m benchmarks.registers --deit               what DeiT-Tiny, -Small and -Base start in bfloat16 only
python -m benchmarks.registers --json FILE          and the same as a file
python -m benchmarks.registers --check              exit with 1 on spills, or on more shared memory than there is

Compilation uses the ptxas that Triton ships, and its cuobjdump reads the result; no driver is needed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.timing import JSON, provenance_without_device, write_json
from skd_kernels.gpu import launches
from skd_kernels.gpu.launch import RECORDED_DEVICES, Launch

# Shared memory that one block may ask for, in bytes.
SHARED_LIMIT = {architecture: device.shared_memory for architecture, device in RECORDED_DEVICES.items()}
TABLE = (80, 90, 100)
WHAT = (
    "Registers of a thread, spilled bytes and shared memory of the Triton kernels, as compiled for GPUs that need "
    "not be there. Read from the binaries, not measured."
)


@dataclass(frozen=True)
class Resources:
    """The resources of one thread or block. Spilled registers take `stack` or `local` memory, in bytes."""

    registers: int
    stack: int
    local: int
    shared: int
    threads: int = 32
    resident: int = 1

    def faults(self, architecture: int) -> str:
        """Why this kernel must not be shipped, or an empty string."""
        if self.stack or self.local:
            return f"{self.stack} bytes of stack and {self.local} of local memory: registers are spilled"
        if self.shared > SHARED_LIMIT[architecture]:
            return f"{self.shared} bytes of shared memory; sm_{architecture} has {SHARED_LIMIT[architecture]}"
        if self.resident > 1 and self.fit(architecture) < self.resident:
            return f"{self.fit(architecture)} programs fit on a multiprocessor; {self.resident} are started"
        return ""

    def fit(self, architecture: int) -> int:
        """Programs that fit on a multiprocessor together.

        Each takes 1 KiB of shared memory for the system, of which there is 1 KiB more than one program may have, and
        its registers in units of 8 for each thread, of 65,536 (CUDA C++ Programming Guide, technical specifications).
        """
        shared = (SHARED_LIMIT[architecture] + 1024) // (self.shared + 1024)
        return min(shared, 65_536 // (-(-self.registers // 8) * 8 * self.threads))


def compile_for(launch: Launch, architecture: int) -> CompiledKernel:
    """Triton's compiled kernel, with the text of every stage in its `asm`."""
    index = {param.name: (position,) for position, param in enumerate(launch.kernel.params)}
    source = ASTSource(
        launch.kernel,
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={index[name]: [["tt.divisibility", 16]] for name in launch.divisible_by_16},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options())


def _cuobjdump(compiled: CompiledKernel, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine_code(compiled: CompiledKernel) -> list[str]:
    """The names of a compiled kernel's machine instructions, in order."""
    listing = _cuobjdump(compiled, "-sass")
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_]+)", listing, re.MULTILINE)


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile for `architecture` and read the binary."""
    compiled = compile_for(launch, architecture)
    report = _cuobjdump(compiled, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump does not report the resources of {launch.name}: {report}")
    registers, stack, local = map(int, found.groups())
    # The call of a subroutine, such as the slow path of a division, may write to a stack what nothing reads again.
    # A spilled register is read again.
    if stack and "LDL" not in machine_code(compiled):
        stack = 0
    return Resources(registers, stack, local, compiled.metadata.shared, 32 * launch.num_warps, launch.resident)


def row(launch: Launch, architecture: int, resources: Resources) -> dict[str, JSON]:
    """The cells of the table, by its columns."""
    blocks = "x".join(str(value) for name, value in launch.constants.items() if name.startswith("BLOCK"))
    return {
        # As profilers name it, without the module: a product's name includes its epilogue.
        "kernel": launch.kernel.repr(launch).rpartition(".")[2],
        "example": launch.label,
        "target": f"sm_{architecture}",
        "tile": blocks,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "registers": resources.registers,
        "spilled bytes": resources.stack + resources.local,
        "shared KiB": round(resources.shared / 1024),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--quick", action="store_true", help="only the examples of the ordinary test suite")
    parser.add_argument("--deit", action="store_true", help="the examples of DeiT's three sizes only")
    parser.add_argument("--check", action="store_true", help="exit with 1 on spills or too much shared memory")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}\n")
    print("| kernel | example | target | tile | warps | stages | registers | spilled bytes | shared KiB |")
    print("|---|---|---|---|--:|--:|--:|--:|--:|")
    faults, rows = [], list[JSON]()
    for architecture in arguments.arch or TABLE:
        for launch in launches(architecture, quick=arguments.quick, deit=arguments.deit):
            resources = compile_launch(launch, architecture)
            cells = row(launch, architecture, resources)
            rows.append(cells)
            print("| " + " | ".join(map(str, cells.values())) + " |", flush=True)
            if fault := resources.faults(architecture):
                faults.append(f"{launch.name} ({launch.label}, sm_{architecture}): {fault}")
    if arguments.json is not None:
        write_json(arguments.json, {"what": WHAT, **provenance_without_device(), "results": {"kernels": rows}})
    print("\n".join(["", *faults]) if faults else "\nno spills", file=sys.stderr)
    return 1 if faults and arguments.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
