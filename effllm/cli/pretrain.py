"""`effllm pretrain`."""

from __future__ import annotations

import click

from effllm.cli.console import say
from effllm.cli.options import FORCE, OUT, settings_options
from effllm.train.settings import PretrainSettings


@click.command(
    epilog="""\b
Examples:
  effllm prepare wiki.txt --tokenizer wordpiece --vocab-size 8192 --out tokens
  effllm pretrain tokens --out run --model mini --steps 2000 --save-every 500
  effllm pretrain tokens --out run --model mini --steps 2000 --save-every 500 --resume
  effllm pretrain tokens --out quick --seconds 600
  torchrun --nproc-per-node 2 -m effllm pretrain tokens --out run --steps 2000
"""
)
@click.argument("data", metavar="DIR")
@OUT
@settings_options(PretrainSettings)
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint of --out.")
@FORCE
def pretrain(data: str, out: str, resume: bool, force: bool, settings: PretrainSettings) -> None:
    """Pre-train a masked language model on DIR, a folder that `effllm prepare` wrote.

    OUT/last and OUT/best are model folders that transformers loads. A run that was killed goes on with --resume,
    bit for bit on the CPU.
    """
    from effllm.cli.training import follow, is_first_process
    from effllm.train.pretrain import pretrain as run

    records = run(data, out, settings, resume=resume, force=force)
    follow((("", record) for record in records), settings.log_every)
    if is_first_process():
        say(f"wrote {out}: last and best are model folders, report.html shows the run")
        say(f"try: effllm predict {out}/best 'a text with a [MASK] in it'")
