"""Description of this machine's processor for a report: times and the last bits of float outputs depend on it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

# Flags of /proc/cpuinfo by which ONNX Runtime chooses its kernels, with the manufacturers' names.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_int8": "AMX",
}


@dataclass(frozen=True)
class Processor:
    """Model name of a processor, with the instruction sets that 8-bit and float products use."""

    name: str
    instruction_sets: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join([self.name, *self.instruction_sets])


def this_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """Return the processor of this machine, or only its architecture if the system does not provide more."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        # Use the first core; the others repeat the values.
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Processor(name, tuple(text for flag, text in _INSTRUCTION_SETS.items() if flag in flags))
