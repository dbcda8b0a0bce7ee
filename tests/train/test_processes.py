"""Pre-training on two processes, copied or sharded, on one host or two."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from runs import assert_same_run, assert_same_trace, command, finish, free_port, weights


@pytest.fixture(scope="module")
def whole(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(tokens, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_two_processes_on_one_host_or_two_give_the_trace_of_one(
    tokens: Path, whole: Path, tmp_path: Path, hosts: int
) -> None:
    each = ["--nnodes", str(hosts), "--nproc-per-node", str(2 // hosts), "--rdzv-backend", "c10d"]
    each += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
    launched = [sys.executable, "-m", "torch.distributed.run", *each, *command(tokens, tmp_path / "run")[1:]]
    running = [subprocess.Popen(launched, stderr=subprocess.PIPE, text=True) for _ in range(hosts)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert_same_trace(tmp_path / "run", whole)


def shard(script: list[str], tokens: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run `effllm pretrain` on two processes with the FSDP config of the examples."""
    config = Path(__file__).parents[2] / "examples" / "fsdp.yaml"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
    ]
    launched = [*launcher, "--main_process_port", str(free_port()), *script, *command(tokens, out, *more)[3:]]
    return subprocess.run(launched, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_sharded_model_gives_the_trace_of_one_process_and_resumes(tokens: Path, whole: Path, tmp_path: Path) -> None:
    script = [str(Path(__file__).parent / "fsdp_on_cpu.py")]
    result = shard(script, tokens, tmp_path / "sharded")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_trace(tmp_path / "sharded", whole)
    folder = tmp_path / "sharded" / "last"
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    for name, tensor in weights(whole).items():
        np.testing.assert_allclose(weights(tmp_path / "sharded")[name], tensor, rtol=0, atol=2e-5, err_msg=name)

    out = tmp_path / "resumed"
    shutil.copytree(tmp_path / "sharded", out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    assert shard(script, tokens, out, "--resume").returncode == 0
    assert_same_run(tmp_path / "sharded", out)


@pytest.mark.slow
def test_sharding_that_would_not_happen_is_refused(tokens: Path, tmp_path: Path) -> None:
    result = shard(["-m", "effllm"], tokens, tmp_path / "run")
    assert "error: accelerate shards models (FSDP) on GPUs only" in result.stderr
    assert not (tmp_path / "run").exists()
