"""The machine as rows describe it, from flags and files given by the test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from effllm import machine
from effllm.machine import InstructionSet, instruction_set


@pytest.mark.parametrize(
    ("flags", "architecture", "expected"),
    [
        ("avx2 avx512bw avx512_vnni amx_int8", "x86_64", InstructionSet("x86", True, "AMX-INT8")),
        ("avx2 avx512bw avx512_vnni", "x86_64", InstructionSet("x86", True, "AVX512-VNNI")),
        ("avx2 avx_vnni", "AMD64", InstructionSet("x86", True, "AVX-VNNI")),
        ("avx2 avx512bw", "x86_64", InstructionSet("x86", False, "AVX512")),
        ("sse avx2", "x86_64", InstructionSet("x86", False, "AVX2")),
        ("sse", "x86_64", InstructionSet("x86", False, "SSE")),
        ("asimd asimddp i8mm", "aarch64", InstructionSet("arm", True, "ARM i8mm")),
        ("asimd asimddp", "arm64", InstructionSet("arm", True, "ARM dot product")),
        ("", "riscv64", InstructionSet("other", False, "riscv64")),
    ],
)
def test_flags_decide_the_instruction_set(flags: str, architecture: str, expected: InstructionSet) -> None:
    assert instruction_set(frozenset(flags.split()), architecture) == expected


@pytest.mark.skipif(sys.platform == "darwin", reason="every Apple processor has the dot product")
def test_an_arm_without_dot_product_has_none() -> None:
    assert instruction_set(frozenset({"asimd"}), "aarch64") == InstructionSet("arm", False, "ARM NEON")


@pytest.mark.parametrize(
    ("quota", "affinity", "cores"),
    [
        ("max 100000\n", 8, 8),
        ("200000 100000\n", 8, 2),
        ("250000 100000\n", 8, 2),
        ("50000 100000\n", 8, 1),
        ("800000 100000\n", 2, 2),
        (None, 3, 3),
    ],
)
def test_usable_cores_are_the_smaller_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, affinity: int, cores: int
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    known = {"/sys/fs/cgroup/cpu.max": file, "/proc/self/cgroup": tmp_path / "none"}
    monkeypatch.setattr(machine, "Path", lambda name: known.get(name, tmp_path / "missing"))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    assert machine.usable_cores() == cores


def test_the_quota_of_a_service_lies_in_its_own_group_or_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / name.lstrip("/"))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in {
        "proc/self/cgroup": "1:cpu:/other\n0::/system.slice/server.service\n",
        "sys/fs/cgroup/system.slice/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/system.slice/server.service/cpu.max": "max 100000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.usable_cores() == 3
    (tmp_path / "sys/fs/cgroup/system.slice/server.service/cpu.max").write_text("200000 100000\n")
    assert machine.usable_cores() == 2


def test_the_description_is_one_line_with_cores() -> None:
    text = machine.describe()
    assert "\n" not in text
    assert re.search(rf"\b{machine.usable_cores()} cores?,", text)
    assert instruction_set().name in text


def test_versions_name_what_is_installed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    assert set(machine.versions()) == {"python", "numpy"}


MEBIBYTE = 2**20
CHILD = """
from effllm.machine import peak_memory_bytes
before = peak_memory_bytes()
block = b"x" * (96 * 2**20)
del block
print(before, peak_memory_bytes())
"""


def test_peak_memory_counts_what_was_freed_and_not_what_the_parent_holds() -> None:
    parents = b"x" * (256 * MEBIBYTE)
    output = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert before < len(parents)
    assert 80 * MEBIBYTE < after - before < 112 * MEBIBYTE
