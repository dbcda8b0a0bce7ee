"""The settings of a server. The flags of `effllm serve` are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from effllm.errors import SettingError


@dataclass(frozen=True)
class ServeSettings:
    """How to serve."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 for all of them"})
    port: int = field(default=8080, metadata={"help": "port to listen on; 0 = any free one"})
    engine: str = field(default="", metadata={"help": "onnxruntime or openvino; empty = onnxruntime"})
    threads: int = field(default=0, metadata={"help": "threads per model; 0 = the cores that this process may use"})
    max_tokens: int = field(default=1024, metadata={"help": "padded tokens in one batch"})
    max_queue: int = field(default=256, metadata={"help": "inputs waiting per model; beyond it requests get 429"})
    max_inputs: int = field(default=128, metadata={"help": "inputs in one request"})
    max_body: int = field(default=2_000_000, metadata={"help": "bytes in the body of one request"})
    max_connections: int = field(default=1000, metadata={"help": "open connections; beyond it new ones get 503"})
    read_timeout: float = field(default=10.0, metadata={"help": "seconds to send a request's head, and its body"})
    timeout: float = field(default=30.0, metadata={"help": "seconds that a request may take; beyond it 504"})
    drain: float = field(default=30.0, metadata={"help": "seconds to finish accepted requests after SIGTERM"})
    truncate: bool = field(default=True, metadata={"help": "cut too long inputs, where a request says nothing"})
    api_key_file: str = field(default="", metadata={"help": "file with the key that requests must carry; empty = none"})

    def __post_init__(self) -> None:
        counts = ("max_tokens", "max_queue", "max_inputs", "max_body", "max_connections")
        for name, least in {"port": 0, "threads": 0, **dict.fromkeys(counts, 1)}.items():
            if getattr(self, name) < least:
                raise SettingError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        for name in ("read_timeout", "timeout", "drain"):
            if not getattr(self, name) > 0:
                raise SettingError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.port > 65535:
            raise SettingError(f"--port must be at most 65535, got {self.port}")
        if self.max_queue < self.max_inputs:
            raise SettingError(
                f"--max-queue ({self.max_queue}) must be at least --max-inputs ({self.max_inputs}): "
                "the largest request allowed has to fit into an empty queue"
            )
