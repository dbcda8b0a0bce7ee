"""The command line: one verb per file, thin. A verb is one file and one line in `COMMANDS`.

Results go to stdout; progress and messages to stderr. Exit codes: 0 done, 1 nobody reads the output any more, 2 wrong
input, 3 a check or gate failed, 130 interrupted. Anything else is a bug of effllm and keeps its traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from effllm.cli import interrupt
from effllm.errors import EffllmError, SettingError

COMMANDS = {
    "prepare": "effllm.cli.prepare:prepare",
    "pretrain": "effllm.cli.pretrain:pretrain",
    "finetune": "effllm.cli.finetune:finetune",
    "compress": "effllm.cli.compress:compress",
    "export": "effllm.cli.export:export",
    "eval": "effllm.cli.eval:evaluate",
    "bench": "effllm.cli.bench:bench",
    "predict": "effllm.cli.predict:predict",
    "serve": "effllm.cli.serve:serve",
    "report": "effllm.cli.report:report",
    "show": "effllm.cli.show:show",
    "doctor": "effllm.cli.doctor:doctor",
}
"""Verb -> `module:command`, in the order of `--help`."""


class _Verbs(click.Group):
    """Loads a verb's file when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  effllm compress MODEL --method int8 --out small      an int8 model, checked and gated
  effllm bench MODEL small --html report.html          dense and compressed, measured together
  effllm predict small "a text"                        an answer
  effllm VERB --help                                   more of each
""",
)
@click.version_option(package_name="effllm")
def cli() -> None:
    """Make encoder models smaller and faster, with proof.

    MODEL is a model folder or a hub id. Results go to stdout, progress to stderr. Exit codes: 0 done, 2 the input is
    wrong, 3 a quality gate or check failed and --out was not written.
    """


INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _check_text(given)
        result = cli.main(args=arguments, prog_name="effllm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        interrupt.calm()
        click.echo(f"interrupted; {str(error.__cause__ or '') or 'nothing was written'}", err=True)
        return INTERRUPTED
    except EffllmError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code


def _check_text(arguments: Sequence[str]) -> None:
    """Raise SettingError for an argument that is not UTF-8: no manifest or table could hold such a name."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = argument.encode("utf-8", "replace").decode("utf-8")
            raise SettingError(f"{shown!r} is not UTF-8; rename the file, or write the text as UTF-8") from None


def entry() -> None:
    """Run as the console script."""
    interrupt.listen()
    try:
        code = main()
    except KeyboardInterrupt:  # it came again while `main` was about to report it
        interrupt.calm()
        code = INTERRUPTED
    raise SystemExit(code)
