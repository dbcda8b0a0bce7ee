"""The settings of a server and of a cluster. The flags of `effllm serve` are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from effllm.errors import SettingError
from effllm.settings import read_key

LONGEST_S = 1_000_000
"""Seconds of the longest wait that can be set: 11 days. The clocks of event loops overflow far above."""


@dataclass(frozen=True)
class ServeSettings:
    """How to serve."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 for all of them"})
    port: int = field(default=8080, metadata={"help": "port to listen on; 0 = any free one"})
    engine: Literal["onnxruntime", "openvino"] = field(default="onnxruntime", metadata={"help": "what runs the models"})
    threads: int = field(default=0, metadata={"help": "threads per model; 0 = the cores that this process may use"})
    max_tokens: int = field(default=512, metadata={"help": "padded tokens in one batch"})
    max_queue: int = field(
        default=256,
        metadata={"help": "inputs (of passages, windows) waiting per model; beyond it requests get 429"},
    )
    max_inputs: int = field(default=128, metadata={"help": "inputs in one request"})
    max_body: int = field(default=2_000_000, metadata={"help": "bytes in the body of one request"})
    max_connections: int = field(default=1000, metadata={"help": "open connections; beyond it new ones get 503"})
    max_unread: int = field(
        default=500_000_000,
        metadata={"help": "bytes of answers that clients have not read yet; beyond it large ones get 429"},
    )
    read_timeout: float = field(default=10.0, metadata={"help": "seconds to send a request's head, and its body"})
    timeout: float = field(default=30.0, metadata={"help": "seconds that a request may take; beyond it 504"})
    drain: float = field(default=30.0, metadata={"help": "seconds to finish accepted requests after SIGTERM"})
    truncate: bool = field(default=True, metadata={"help": "cut too long inputs, where a request says nothing"})
    api_key_file: str = field(default="", metadata={"help": "file with the key that requests must carry; empty = none"})

    def __post_init__(self) -> None:
        counts = ("max_tokens", "max_queue", "max_inputs", "max_body", "max_connections", "max_unread")
        for name, least in {"port": 0, "threads": 0, **dict.fromkeys(counts, 1)}.items():
            if getattr(self, name) < least:
                raise SettingError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        for name in ("read_timeout", "timeout", "drain"):
            if not 0 < getattr(self, name) <= LONGEST_S:
                raise SettingError(
                    f"--{name.replace('_', '-')} must be above zero and at most {LONGEST_S}, got {getattr(self, name)}"
                )
        if self.port > 65535:
            raise SettingError(f"--port must be at most 65535, got {self.port}")
        if self.max_queue < self.max_inputs:
            raise SettingError(
                f"--max-queue ({self.max_queue}) must be at least --max-inputs ({self.max_inputs}): "
                "the largest request allowed has to fit into an empty queue"
            )

    def read_key(self) -> bytes:
        """Return the key in `api_key_file`, empty where there is none. Raises SettingError when that holds no key."""
        return read_key("--api-key-file", self.api_key_file).encode() if self.api_key_file else b""


@dataclass(frozen=True)
class RaySettings:
    """Which Ray cluster, how many replicas there are, and when there are more of them."""

    ray_address: str = field(default="auto", metadata={"help": "with --ray: the cluster; local = start one here"})
    ray_app: str = field(default="effllm", metadata={"help": "with --ray: the application; the same name updates it"})
    min_replicas: int = field(default=1, metadata={"help": "with --ray: replicas without load"})
    max_replicas: int = field(default=4, metadata={"help": "with --ray: replicas under load"})
    target_requests: int = field(default=16, metadata={"help": "with --ray: requests per replica that scaling aims at"})

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise SettingError(
                f"--min-replicas ({self.min_replicas}) must be at least 1 and at most --max-replicas "
                f"({self.max_replicas})"
            )
        if self.target_requests < 1:
            raise SettingError(f"--target-requests must be at least 1, got {self.target_requests}")
