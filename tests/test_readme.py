"""The README says what the rows say, and what it tells the reader to type exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_tables_are_what_the_rows_say() -> None:
    import readme

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rendered(text) == text, "run `make readme`"
    assert {name for name in readme.TABLES if f"<!-- rows: {name} -->" in text} == set(readme.TABLES)


def test_plots_are_what_the_rows_say() -> None:
    import readme

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for file, plot in readme.PLOTS.items():
        assert file.read_text(encoding="utf-8") == plot(), "run `make readme`"
        assert f"]({file.relative_to(ROOT).as_posix()})" in text


def test_every_command_and_flag_exists() -> None:
    from click.testing import CliRunner

    from effllm.cli import COMMANDS, cli

    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:\$ )?effllm (\w+)([^\n]*)", text, flags=re.MULTILINE)
    assert {verb for verb, _ in commands} >= set(COMMANDS) - {"report"}
    for verb, rest in commands:
        help_text = CliRunner().invoke(cli, [verb, "--help"]).output
        for flag in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert flag in help_text, f"effllm {verb} has no {flag}"


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)`?", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
