"""Run `effllm` with accelerate's FSDP on the CPU, where accelerate itself leaves it out; under `accelerate launch`."""

from __future__ import annotations

import sys

from accelerate import Accelerator, DistributedType

from effllm.cli import main
from effllm.train import run


class Sharded(Accelerator):
    def __init__(self, *, fsdp_plugin, **more) -> None:
        super().__init__(fsdp_plugin=fsdp_plugin, **more)
        self.state._shared_state["fsdp_plugin"] = fsdp_plugin
        self.state.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    run.Accelerator = Sharded
    sys.exit(main(sys.argv[1:]))
