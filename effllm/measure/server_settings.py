"""How to load a server: the flags of `effllm bench --url`, and one load."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from effllm.errors import SettingError
from effllm.settings import parse_numbers


@dataclass(frozen=True)
class Load:
    """A closed loop of `clients`, or an open loop of `rate` requests per second; one of the two is zero.

    The load runs `warm_up_s` before the `seconds` that count. `seed` chooses the arrival times of an open loop.
    """

    clients: int = 0
    rate: float = 0.0
    seconds: float = 10.0
    warm_up_s: float = 2.0
    timeout_s: float = 30.0
    seed: int = 0

    @property
    def name(self) -> str:
        """The load in words."""
        if self.rate:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"


@dataclass(frozen=True)
class ServerSettings:
    """How to load a server; flags of `effllm bench`."""

    url: str = field(default="", metadata={"help": "address of a running server to load instead of MODEL…"})
    api: Literal["tei", "openai", "oip"] = field(default="tei", metadata={"help": "the API to send requests over"})
    model: str = field(default="", metadata={"help": "name of the served model, where the API wants one"})
    path: str = field(default="", metadata={"help": "path of the endpoint, where it is not the API's own"})
    name: str = field(default="", metadata={"help": "what the rows call the server; empty = its address"})
    clients: str = field(default="1,8,32", metadata={"help": "closed loops: how many clients; empty = none"})
    rate: str = field(default="", metadata={"help": "open loops: requests per second, at random times, as 50,100"})
    seconds: float = field(default=10.0, metadata={"help": "seconds that count, per load"})
    warm_up: float = field(default=2.0, metadata={"help": "seconds before them that do not count"})
    inputs: int = field(default=1, metadata={"help": "texts in one request"})
    timeout: float = field(default=30.0, metadata={"help": "seconds that a client waits for an answer"})
    within: float = field(default=0.0, metadata={"help": "milliseconds in which an answer is good; 0 = the timeout"})
    key_file: str = field(default="", metadata={"help": "file with the key that the server wants"})
    seed: int = field(default=0, metadata={"help": "seed of the order of texts and of open loops' times"})

    def __post_init__(self) -> None:
        for name in ("seconds", "timeout", "warm_up", "within"):
            if not math.isfinite(getattr(self, name)):
                raise SettingError(f"--{name.replace('_', '-')} must be a finite number, got {getattr(self, name)}")
        for name in ("seconds", "timeout"):
            if not getattr(self, name) > 0:
                raise SettingError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in ("warm_up", "within", "inputs"):
            least = 1 if name == "inputs" else 0
            if not getattr(self, name) >= least:
                raise SettingError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.url and not self.loads():
            raise SettingError("there is nothing to send: give --clients or --rate")

    def loads(self) -> list[Load]:
        """Return the loads: closed loops first. Raises SettingError for something that is not a number."""
        clients = parse_numbers("--clients", self.clients, int) if self.clients else []
        rates = parse_numbers("--rate", self.rate, float) if self.rate else []
        common = Load(seconds=self.seconds, warm_up_s=self.warm_up, timeout_s=self.timeout, seed=self.seed)
        closed = [dataclasses.replace(common, clients=n) for n in clients]
        return closed + [dataclasses.replace(common, rate=rate) for rate in rates]
