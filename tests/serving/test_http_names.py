"""The names of served folders, and what `effllm serve` refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from effllm.cli import main
from effllm.errors import SettingError
from effllm.serving.names import NAME, name_folders
from effllm.serving.server import bind
from effllm.serving.settings import ServeSettings


def test_folders_are_served_under_their_own_names_or_those_given(tmp_path: Path) -> None:
    named = name_folders([str(tmp_path / "a"), f"x={tmp_path / 'a'}", str(tmp_path / "b") + "/", "."])
    assert list(named.items())[:3] == [("a", tmp_path / "a"), ("x", tmp_path / "a"), ("b", tmp_path / "b")]
    assert list(named.values())[3] == Path.cwd()


def test_a_link_stays_one_so_that_it_can_lead_elsewhere_later(tmp_path: Path) -> None:
    (tmp_path / "releases" / "1").mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/1")
    current = {"current": tmp_path / "current"}
    assert name_folders([str(tmp_path / "current")]) == current
    assert name_folders([str(tmp_path / "releases" / ".." / "current")]) == current
    assert name_folders([f"films={tmp_path / 'current'}"]) == {"films": tmp_path / "current"}


def test_folders_of_the_same_name_get_their_parents(tmp_path: Path) -> None:
    paths = [tmp_path / "one" / "best", tmp_path / "two" / "best", tmp_path / "other"]
    assert list(name_folders([str(path) for path in paths])) == ["one-best", "two-best", "other"]
    assert list(name_folders([f"best={paths[0]}", str(paths[1])])) == ["best", "two-best"]


@pytest.mark.parametrize(
    ("folder", "name"), [("my model", "my-model"), ("a=b", "a-b"), ("modèle", "mod-le"), ("..a..", "a")]
)
def test_names_can_stand_in_a_url(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir()
    if NAME.fullmatch(name):
        assert list(name_folders([str(tmp_path / folder)])) == [name]
    else:
        with pytest.raises(SettingError, match="use NAME=DIR"):
            name_folders([str(tmp_path / folder)])


@pytest.mark.parametrize("arguments", [["x=a", "x=b"], ["a", "a"], ["x y=a"], ["=a"], ["../x=a"], ["%2e=a"], ["/"]])
def test_names_that_cannot_be_are_refused(arguments: list[str]) -> None:
    if arguments == ["../x=a"]:
        assert list(name_folders(arguments)) == ["x-a"]  # a folder that is called so
        return
    with pytest.raises(SettingError, match=r"name|both"):
        name_folders(arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "--port must be at most 65535"),
        (["--max-queue", "5"], "--max-queue (5) must be at least --max-inputs"),
        (["--read-timeout", "0"], "--read-timeout must be above zero and at most"),
        (["--drain", "inf"], "--drain"),
        (["--max-connections", "0"], "--max-connections must be at least 1"),
        (["--api-key-file", "/nowhere/key"], "--api-key-file /nowhere/key cannot be read"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--timeout", "soon"], "soon"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], arguments, says: str) -> None:
    assert main(["serve", "somewhere", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with bind(ServeSettings(port=0)) as taken:
        taken.listen()
        assert main(["serve", "somewhere", "--port", str(taken.getsockname()[1])]) == 2
    assert capsys.readouterr().err.startswith("error: cannot listen on 127.0.0.1 port ")
