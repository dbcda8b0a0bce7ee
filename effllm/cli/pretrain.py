"""`effllm pretrain`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from effllm.cli.console import say
from effllm.cli.options import OUT, settings_options
from effllm.errors import SettingError
from effllm.train.settings import FREE, PretrainSettings


@click.command(
    epilog="""\b
Examples:
  effllm prepare wiki.txt --tokenizer wordpiece --vocab-size 8192 --out tokens
  effllm pretrain tokens --out run --model mini --steps 2000 --save-every 500
  effllm pretrain tokens --out run --model mini --steps 2000 --save-every 500 --resume
  effllm pretrain tokens --out quick --seconds 600
  effllm pretrain tokens --out trunk --steps 50000 --schedule constant --keep 20
  effllm pretrain tokens --out model-20k --branch trunk/checkpoints/step-00020000 --steps 2000
  torchrun --nproc-per-node 2 -m effllm pretrain tokens --out run --steps 2000
"""
)
@click.argument("data", metavar="DIR")
@OUT
@click.option(
    "--branch",
    metavar="DIR",
    help="Go on from a run or checkpoint with its settings; the learning rate falls to 0 over --steps.",
)
@settings_options(PretrainSettings)
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint of --out.")
@click.option("--force", is_flag=True, help="Start anew where --out holds a run, which is removed at once.")
def pretrain(data: str, out: str, branch: str | None, resume: bool, force: bool, settings: PretrainSettings) -> None:
    """Pre-train a masked language model on DIR, a folder that `effllm prepare` wrote.

    OUT/last and OUT/best are model folders that transformers loads. A run that was killed goes on with --resume,
    bit for bit on the CPU.
    """
    from effllm.cli.training import follow, is_first_process
    from effllm.train.branch import Trunk, begun
    from effllm.train.pretrain import pretrain as run

    trunk, free = None, _free_settings(settings) if branch else {}
    own = begun(Path(out), settings.steps, free) if branch and resume else None
    if own:
        settings = own
    elif branch:
        trunk = Trunk.open(branch)
        settings = trunk.decaying(settings.steps, free)
    records = run(data, out, settings, trunk=trunk, resume=resume, force=force)
    follow((("", record) for record in records), settings.log_every, Path(out))
    if is_first_process():
        judged = (Path(out) / "best").exists()  # not without held-out text
        folders = "last and best are model folders" if judged else "last is a model folder"
        say(f"wrote {out}: {folders}, report.html shows the run")
        say(f"try: effllm predict {out}/{'best' if judged else 'last'} 'a text with a [MASK] in it'")


def _free_settings(settings: PretrainSettings) -> dict[str, Any]:
    """Return the settings given beside --branch and --steps. Raises SettingError for those that decide the numbers."""
    context = click.get_current_context()
    names = [f.name for f in dataclasses.fields(settings) if f.name != "steps"]
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for name in given:
        if name not in FREE:
            raise SettingError(f"--branch keeps the settings of its run; leave out --{name.replace('_', '-')}")
    return {name: getattr(settings, name) for name in given}
