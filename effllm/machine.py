"""What this machine is: cores that this process may use, instruction set, memory, versions.

Read from the operating system without importing torch or ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from effllm.errors import SettingError

PACKAGES = ("effllm", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "tokenizers", "openvino", "numpy")


@dataclass(frozen=True)
class InstructionSet:
    """The integer-matrix instructions that decide how int8 should be done.

    `family` is `"x86"`, `"arm"` or `"other"`; `vnni` is true when an unsigned-by-signed 8-bit dot product accumulates
    straight into 32 bits (AVX512-VNNI, AVX-VNNI, AMX-INT8, ARM dot product).
    """

    family: str
    vnni: bool
    name: str


def instruction_set(flags: frozenset[str] | None = None, architecture: str | None = None) -> InstructionSet:
    """Return the instruction set of this processor, or of the given `/proc/cpuinfo` flags and `uname -m`."""
    architecture = architecture or platform.machine()
    flags = _cpu_flags() if flags is None else flags
    if architecture in {"aarch64", "arm64"}:
        dot = bool(flags & {"asimddp", "i8mm"}) or sys.platform == "darwin"
        return InstructionSet("arm", dot, "ARM i8mm" if "i8mm" in flags else "ARM dot product" if dot else "ARM NEON")
    if architecture in {"x86_64", "AMD64"}:
        for flag, name in (("amx_int8", "AMX-INT8"), ("avx512_vnni", "AVX512-VNNI"), ("avx_vnni", "AVX-VNNI")):
            if flag in flags:
                return InstructionSet("x86", True, name)
        return InstructionSet("x86", False, "AVX512" if "avx512bw" in flags else "AVX2" if "avx2" in flags else "SSE")
    return InstructionSet("other", False, architecture)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def usable_cores() -> int:
    """Return how many cores this process may use: the smaller of its CPU affinity and its cgroup quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(affinity, _cgroup_quota() or affinity))


def _cgroup_quota() -> int | None:
    """Return the least quota of this process's cgroup (version 2) and those above it, in whole cores."""
    group = "/"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            group = line.removeprefix("0::") if line.startswith("0::") else group
    quotas = []
    for part in (group, *map(str, PurePosixPath(group).parents)):
        with contextlib.suppress(OSError, ValueError):
            limit, period = Path(f"/sys/fs/cgroup{part.rstrip('/')}/cpu.max").read_text(encoding="ascii").split()
            quotas += [max(1, int(int(limit) / int(period)))] if limit != "max" else []
    return min(quotas, default=None)


def cpu_name() -> str:
    """Return the processor's own name, with the instruction set that int8 uses."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe() -> str:
    """Return the machine in one line, as rows carry it."""
    cores = usable_cores()
    return f"{cpu_name()} ({instruction_set().name}), {cores} core{'s' * (cores > 1)}, {platform.system()}"


OTHER_FILES = 64
"""What a process has open besides: its libraries, the event loop, logs."""


def take_files(wanted: int, what: str) -> None:
    """Raise this process's limit of open files to the highest that it may have.

    Raises SettingError where that is below `wanted`, which `what` needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and wanted + OTHER_FILES > hard:
        raise SettingError(f"{what}: that takes {wanted} open files, and this process may have {hard}; see ulimit -n")


def versions() -> dict[str, str]:
    """Return the version of Python and of each package that decides a result, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """Return the highest resident memory that this process has had, in bytes.

    Linux's VmHWM starts anew at exec; `getrusage` would count the parent's memory for a process that was spawned.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
