"""Compiles every GPU kernel of the package to machine code, with no GPU and no driver, and says what it uses.

    .venv-cuda13/bin/python tests/kernels/compile_only/compiling.py FILE.json sm_80,sm_90 [FILE.cu KERNEL]

Runs in an environment of its own (locks/cuda12.in, locks/cuda13.in): the compilers are large and Shoal does not need
them. It imports nothing of Shoal but `kernels`. What it writes, a list: operation, kernel, arch, registers,
spill_bytes, stack_bytes, f64 (instructions in double precision), limit (registers; null where none is said).
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

from cuda.bindings import nvrtc  # noqa: E402
from cuda.core import Linker, LinkerOptions, ObjectCode  # noqa: E402
from cuda.pathfinder import find_nvidia_header_directory  # noqa: E402

from kernels.cuda_source import OPTIONS, CudaSource  # noqa: E402

Arch = tuple[int, int]
Report = dict[str, Any]


def report(log: str, text: str) -> Report:
    def most(pattern: str) -> int:
        return max((int(found) for found in re.findall(pattern, log)), default=0)

    registers = most(r"Used (\d+) registers")
    if not registers:
        raise RuntimeError(f"ptxas said nothing of registers:\n{log}")
    return {
        "registers": registers,
        "spill_bytes": most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads"),
        "stack_bytes": most(r"(\d+) bytes stack frame"),
        "f64": len(re.findall(r"\.f64", text)),
    }


def from_ptx(ptx: str, arch: str) -> Report:
    options = LinkerOptions(arch=arch, ptxas_options=["-v"])
    link = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    if not link.link("cubin").code:
        raise RuntimeError("no machine code came out")
    return report(link.get_info_log(), ptx)


def cuda_cpp(source: CudaSource, archs: list[Arch]) -> Iterator[tuple[str, str, Report]]:
    """Each kernel alone, so that the log speaks of one."""
    for major, minor in archs:
        for kernel in source.kernels:
            ptx, symbol = to_ptx(source, kernel, f"compute_{major}{minor}")
            head, *entries = re.split(r"(?m)^(?=(?:\.\w+ )?\.entry )", ptx)
            mine = [entry for entry in entries if re.match(rf"(?:\.\w+ )?\.entry {re.escape(symbol)}\(", entry)]
            arch = f"sm_{major}{minor}"
            yield kernel, arch, {**from_ptx(head + mine[0], arch), "limit": source.registers}


def to_ptx(source: CudaSource, kernel: str, arch: str) -> tuple[str, str]:
    """The kernel as PTX, and its symbol in it. NVRTC itself: cuda.core's Program asks a driver for its version."""
    options = [*OPTIONS, f"--gpu-architecture={arch}", f"-I{find_nvidia_header_directory('cudart')}"]
    program = _done(nvrtc.nvrtcCreateProgram(source.text.encode(), str(source.path).encode(), 0, [], []))
    _done(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
    status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
        _done(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC refuses {source.path.name}, {kernel}:\n{log.decode()}")
    symbol = _done(nvrtc.nvrtcGetLoweredName(program, kernel.encode())).decode()
    ptx = b" " * _done(nvrtc.nvrtcGetPTXSize(program))
    _done(nvrtc.nvrtcGetPTX(program, ptx))
    _done(nvrtc.nvrtcDestroyProgram(program))
    return ptx.rstrip(b"\0").decode(), symbol


def _done(result: tuple[Any, ...]) -> Any:
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {result[0].name}")
    return result[1] if len(result) > 1 else None


def numba_cuda(module: types.ModuleType, archs: list[Arch]) -> Iterator[tuple[str, str, Report]]:
    cuda = importlib.import_module("numba.cuda")
    for name, signatures in module.SIGNATURES.items():
        for signature in signatures:
            for cc in archs:
                # `compile` asks for the current device when a kernel calls device functions, and a device function
                # keeps the first architecture that it was compiled for: a fresh module for each.
                fresh = importlib.reload(module)
                function = getattr(fresh, name).py_func
                ptx, _ = cuda.compile(function, signature, cc=cc, device=False, abi="numba", output="ptx")
                arch = f"sm_{cc[0]}{cc[1]}"
                yield f"{name} {signature}", arch, {**from_ptx(ptx, arch), "limit": getattr(fresh, "REGISTERS", None)}


def operations(archs: list[Arch]) -> Iterator[tuple[str, Iterator[tuple[str, str, Report]]]]:
    for path in sorted((ROOT / "kernels").glob("*/cuda.py")):
        yield path.parent.name, cuda_cpp(importlib.import_module(f"kernels.{path.parent.name}.cuda").SOURCE, archs)
    for path in sorted((ROOT / "kernels").glob("*/numba_cuda.py")):
        yield path.parent.name, numba_cuda(importlib.import_module(f"kernels.{path.parent.name}.numba_cuda"), archs)


def main() -> None:
    out, names, *given = sys.argv[1:]
    archs = [(int(name[-2]), int(name[-1])) for name in names.split(",")]
    alone = [(given[0], cuda_cpp(CudaSource(Path(given[0]), tuple(given[1:]), 255), archs))] if given else None
    reports = [
        {"operation": operation, "kernel": kernel, "arch": arch, **said}
        for operation, kernels in alone or operations(archs)
        for kernel, arch, said in kernels
    ]
    Path(out).write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
