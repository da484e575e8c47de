"""Arena for the CPU runs of all ONNX models of a process: at most half of the memory that the process may allocate
beside its threads. The other half is for weights, requests, and all else.

By default, each session has an arena of its own, which takes nine tenths of what is left when there is no room for
twice its size. Then an allocation of another part of the process fails, and native code (protobuf's) crashes on that.
"""

from __future__ import annotations

import re
import resource
from functools import cache

import onnxruntime

_FULL = re.compile("Available memory of|Failed to allocate memory|bad_alloc")

# Thread stacks, and memory that is reserved and not used, as in `mesh.process.memory_limit`.
_PROCESS_BYTES = 512 << 20

# Weights are not in the arena: they stay allocated, and would keep regions of it.
_ENTRIES = {"session.use_env_allocators": "1", "session.use_device_allocator_for_initializers": "1"}


@cache
def entries() -> dict[str, str]:
    """Return the settings of sessions that use the arena, which the first call makes. None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit == resource.RLIM_INFINITY:
        return {}
    cpu = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(
        cpu, onnxruntime.OrtArenaCfg({"max_mem": max(limit - _PROCESS_BYTES, _PROCESS_BYTES) // 2})
    )
    return _ENTRIES


def is_full(error: Exception) -> bool:
    """Return True for the error of a run that found no memory."""
    return _FULL.search(str(error)) is not None
