"""Servers and loops as processes of their own: started, waited for, watched, ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from effllm.errors import EffllmError
from effllm.measure.apis import Endpoint, ask
from effllm.measure.drive import run_async
from effllm.measure.http_client import Client, Server

HERE = Path(__file__).parent
START_S = 90


def free_port() -> int:
    """Return a port on the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def effllm_command(folder: Path, threads: int, flags: list[str] | None = None) -> list[str]:
    """Return how `effllm serve` is started; the port is added."""
    return [sys.executable, "-m", "effllm", "serve", f"m={folder}", "--threads", str(threads), *(flags or [])]


def peer_command(script: str, folder: Path, threads: int, python: str = sys.executable) -> list[str]:
    """Return how a peer of this folder is started; the port is added."""
    return [python, str(HERE / script), str(folder), "--threads", str(threads)]


class ServerProcess:
    """A server under test, which takes texts at a path of an API: those of `effllm.measure.apis`, the model called `m`.

    Use as a context manager: it is ready inside, and gone with its children afterwards.
    """

    def __init__(self, name: str, command: list[str], api: str = "tei", path: str = "/embed") -> None:
        self.name = name
        self._port = free_port()
        self._command = [*command, "--port", str(self._port)]
        self.endpoint = Endpoint(Server.of(f"http://127.0.0.1:{self._port}"), api, path, "m")

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, start_new_session=True)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        children = self.family()
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in children[1:]:  # LitServe's, among others, outlive their parent
            _signal(pid, signal.SIGKILL)
        self._log.close()

    def _wait(self) -> None:
        client = Client(self.endpoint.server, 30.0)
        request = self.endpoint.request(["ready?"])
        end = time.monotonic() + START_S
        while True:
            try:
                run_async(ask(client, self.endpoint.server, request, self.name))
                return
            except EffllmError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    self._log.seek(0)
                    raise SystemExit(f"{self.name} does not serve: {error}\n{self._log.read()[-2000:]}") from None
            finally:
                client.close()
            time.sleep(0.3)

    def family(self) -> list[int]:
        """Return the ids of the process and of all its descendants, itself first."""
        parents: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(stat.parent.name)] = int(fields[1])
        family = [self._process.pid]
        for pid in family:
            family += [child for child, parent in parents.items() if parent == pid]
        return family

    def stop(self) -> None:
        """Stop the family until `resume`: an idle server that polls would take time from the one that is measured."""
        for pid in self.family():
            _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the family go on."""
        for pid in self.family():
            _signal(pid, signal.SIGCONT)

    def workers(self) -> list[int]:
        """Return the ids of the processes that hold a model: those that multiprocessing spawned."""
        return [pid for pid in self.family()[1:] if b"spawn_main" in _read(pid, "cmdline")]

    def memory_bytes(self) -> int:
        """Return the resident memory of the whole family, in bytes."""
        total = 0
        for pid in self.family():
            for line in _read(pid, "status").splitlines():
                if line.startswith(b"VmRSS:"):
                    total += int(line.split()[1]) * 1024
        return total


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended since it was seen
        os.kill(pid, number)


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


class RawLoop:
    """`raw_loop.py` in its process. Use as a context manager."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._command = peer_command("raw_loop.py", folder, threads)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise SystemExit("the raw loop did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, texts: list[str], chunk: int, seconds: float, *, apart: bool = False) -> dict[str, Any]:
        """Embed texts for some seconds; see the script."""
        if self._process.stdin is None:
            raise RuntimeError("the loop was not started")
        command = {"texts": texts, "chunk": chunk, "seconds": seconds, "apart": apart}
        print(json.dumps(command), file=self._process.stdin, flush=True)
        line = self._line()
        if not line:
            raise SystemExit(f"the raw loop ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self) -> str:
        return (self._process.stdout.readline() if self._process.stdout else "").strip()


class StallWatch:
    """`stalls.py` in its process. Use as a context manager; `stalls` is known after it, (when, how long) in seconds.

    The times count from `warm_up_s` seconds after the start.
    """

    def __init__(self, warm_up_s: float = 0.0) -> None:
        self.stalls: list[tuple[float, float]] = []
        self._warm_up_s = warm_up_s

    def __enter__(self) -> Self:
        self._start = time.monotonic() + self._warm_up_s
        self._process = subprocess.Popen([sys.executable, str(HERE / "stalls.py")], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        out, _ = self._process.communicate()
        lines = [line.split() for line in out.splitlines()]
        self.stalls = [(float(when) - self._start, float(late)) for when, late in lines]
