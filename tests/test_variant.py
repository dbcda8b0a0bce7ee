"""A variant is whole or absent, whatever happens while it is written, and its files are checked when it is opened."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from effllm import variant
from effllm.errors import ArtifactError, SettingError
from effllm.rows import Row
from effllm.runtime.ort import OrtEngine
from effllm.runtime.predictor import Predictor
from effllm.variant import MANIFEST, Variant, create, is_variant, read_manifest, write_manifest

CONTENT = {"task": "text-classification", "steps": [{"verb": "export"}]}


def fill(folder: Path, text: str = "weights") -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text(text)
    (folder / "config.json").write_text("{}")
    write_manifest(folder, CONTENT)


def make(target: Path, text: str = "weights", *, force: bool = False) -> Path:
    with create(target, force=force) as staging:
        fill(staging, text)
    return target


def text_of(target: Path) -> str:
    Variant.open(target)
    return (target / "onnx" / "model.onnx").read_text()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def edit(folder: Path, change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def child(code: str, *arguments: object, wait_for: str | None = None) -> subprocess.Popen:
    """Start a Python process that has `create` and `write_manifest`; return when it printed `wait_for`, or ended."""
    prelude = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom effllm.variant import create, write_manifest\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    if wait_for is None:
        process.communicate(timeout=30)
    else:
        assert process.stdout.readline().strip() == wait_for
    return process


@pytest.fixture
def living() -> Iterator[list[subprocess.Popen]]:
    """Processes that are ended with the test, however it ends."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


WRITE_AND_WAIT = """
with create(Path(sys.argv[1]), force="force" in sys.argv) as staging:
    (staging / "model.onnx").write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    write_manifest(staging, {"task": "fill-mask"})
"""
DIE_BETWEEN_THE_RENAMES = """
rename = Path.rename
def rename_and_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename_and_die
with create(Path(sys.argv[1]), force=True) as staging:
    (staging / "new").write_text("new")
    write_manifest(staging, {"task": "fill-mask"})
"""


def test_what_was_written_is_what_is_opened(tmp_path: Path) -> None:
    opened = Variant.open(make(tmp_path / "small"))
    assert opened.task == "text-classification"
    assert opened.batch_dependent is False
    assert opened.rows == []
    assert set(opened.manifest["files"]) == {"onnx/model.onnx", "config.json"}
    assert opened.manifest["versions"]["effllm"]
    assert is_variant(tmp_path / "small")
    assert names(tmp_path) == ["small"]


def test_the_manifest_carries_rows(tmp_path: Path) -> None:
    row = Row("f1", 0.5, "absolute", "int8", how={"data": "dev.jsonl"})
    with create(tmp_path / "small") as staging:
        write_manifest(staging, CONTENT | {"rows": [row.to_json()], "batch_dependent": True})
    opened = Variant.open(tmp_path / "small")
    assert opened.rows == [row]
    assert opened.batch_dependent is True


@pytest.mark.parametrize("rows", [5, [5], [{"metric": "f1"}], [{"metric": "f1", "value": "x"}]])
def test_rows_that_are_none_are_an_artifact_error(tmp_path: Path, rows: object) -> None:
    edit(make(tmp_path / "small"), lambda manifest: manifest.update(rows=rows))
    with pytest.raises(ArtifactError, match="has a row that is not one"):
        Variant.open(tmp_path / "small").rows  # noqa: B018


@pytest.mark.parametrize("name", ["onnx/model.onnx", "config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
            "its SHA-256 is not",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, . were written"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "bytes, . were written"),
        (lambda file: file.unlink(), "is missing; the folder is incomplete"),
        (lambda file: (file.unlink(), file.mkdir()), "is missing; the folder is incomplete"),
        (lambda file: (file.unlink(), file.symlink_to(file)), "cannot be read"),
        (lambda file: (file.unlink(), file.symlink_to("/etc/hostname")), "which is outside the folder"),
    ],
    ids=["flipped", "truncated", "longer", "missing", "folder", "looped", "linked away"],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage, message: str) -> None:
    folder = make(tmp_path / "small")
    damage(folder / name)
    with pytest.raises(ArtifactError, match=message) as caught:
        Variant.open(folder)
    assert Path(name).name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_card_is_for_people_to_edit(tmp_path: Path) -> None:
    with create(tmp_path / "small") as staging:
        (staging / "README.md").write_text("what it is")
        write_manifest(staging, CONTENT)
    (tmp_path / "small" / "README.md").write_text("what it is, for whom")
    assert "README.md" not in Variant.open(tmp_path / "small").manifest["files"]
    listed = {"sha256": "0", "size_bytes": 6}  # as earlier versions listed it
    edit(tmp_path / "small", lambda manifest: manifest["files"].update({"README.md": listed}))
    (tmp_path / "small" / "README.md").unlink()
    Variant.open(tmp_path / "small")


def test_a_folder_in_the_cache_of_the_hub_links_to_its_files(tmp_path: Path) -> None:
    written = make(tmp_path / "small")
    repository = tmp_path / "models--me--small"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in written.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / str(number), snapshot / file.relative_to(written)
        file.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert Variant.open(snapshot).task == "text-classification"
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="outside the folder"):
        Variant.open(snapshot)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/hostname", "a/../../x", "..", "a\0b", "x" * 300, "../small/config.json"]
)
def test_a_manifest_cannot_reach_outside(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "small")
    (tmp_path / "x").write_text("secret")
    edit(folder, lambda manifest: manifest["files"].update({name: {"sha256": "0", "size_bytes": 6}}))
    with pytest.raises(ArtifactError, match=r"outside the folder|cannot be read"):
        Variant.open(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "onnx/other.onnx", "onnx", MANIFEST, None, 5, []])
def test_a_model_file_without_a_digest_is_refused(tmp_path: Path, name: object) -> None:
    folder = make(tmp_path / "small")
    (tmp_path / "x").write_text("secret")
    for known in ("onnx/model.onnx", ""):
        edit(folder, lambda manifest, known=known: manifest.update(model_file=known))
        assert Variant.open(folder).manifest["model_file"] == known
    edit(folder, lambda manifest: manifest.update(model_file=name))
    for read in (Variant.open, read_manifest):
        with pytest.raises(ArtifactError, match="which is not among its files"):
            read(folder)


def test_only_the_manifests_graph_answers(classifier: Path, tmp_path: Path) -> None:
    names = ("input_ids", "logits")
    x, y = (helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in names)
    graph = helper.make_graph([helper.make_node("Identity", names[:1], names[1:])], "any", [x], [y])
    folder = tmp_path / "trained"
    shutil.copytree(classifier, folder)
    write_manifest(folder, CONTENT | {"model_file": ""})
    (folder / "onnx").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "onnx" / "model.onnx")
    with pytest.raises(ArtifactError, match="holds no ONNX file"):
        Predictor.open(folder, engine="onnxruntime", threads=1)
    assert not isinstance(Predictor.open(folder, threads=1).engine, OrtEngine)
    write_manifest(folder, CONTENT | {"model_file": "onnx/model.onnx"})
    assert isinstance(Predictor.open(folder, threads=1).engine, OrtEngine)


@pytest.mark.parametrize("entry", [None, 5, [], {}, {"size_bytes": 2}, {"sha256": "0"}])
def test_a_manifest_without_digests_is_refused(tmp_path: Path, entry: object) -> None:
    folder = make(tmp_path / "small")
    edit(folder, lambda manifest: manifest["files"].update({"config.json": entry}))
    with pytest.raises(ArtifactError, match=r"has no digest of 'config.json'"):
        Variant.open(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not json", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "is not a manifest of effllm"),
        (b"{}", "is not a manifest of effllm"),
        (b'{"format": 1, "task": "x", "files": []}', "is not a manifest of effllm"),
        (b'{"format": 1, "files": {}}', "is not a manifest of effllm"),
        (b'{"format": 2, "task": "x", "files": {}}', "has format 2; this effllm reads format 1"),
        (b'{"task": "x", "files": {}}', "has format None; this effllm reads format 1"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        Variant.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_not_a_variant(tmp_path: Path) -> None:
    assert not is_variant(tmp_path)
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="is not a folder that effllm wrote"):
            read_manifest(missing)


def test_an_unreadable_file_is_an_artifact_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(file: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    folder = make(tmp_path / "small")
    monkeypatch.setattr(variant, "sha256", denied)
    with pytest.raises(ArtifactError, match=r"cannot be read: .*Permission denied"):
        Variant.open(folder)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
@pytest.mark.parametrize("force", [False, True])
def test_an_exception_inside_leaves_nothing_and_passes_through(
    tmp_path: Path, error: type[BaseException], force: bool
) -> None:
    def interrupted() -> None:
        with create(tmp_path / "new" / "deep" / "small", force=force) as staging:
            fill(staging)
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_keeps_the_folder_that_was_to_be_replaced(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = make(tmp_path / "small", "old")

    def interrupted() -> None:
        with create(target, force=True) as staging:
            fill(staging, "new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert text_of(target) == "old"
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("at", [1, 2])
def test_a_fault_while_replacing_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    target = make(tmp_path / "small", "old")
    rename, calls = Path.rename, []

    def failing(self: Path, new: Path) -> Path:
        calls.append(new)
        if len(calls) == at:
            raise error
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((KeyboardInterrupt, ArtifactError)):
        make(target, "new", force=True)
    assert text_of(target) == "old"
    assert names(tmp_path) == ["small"]


def test_an_existing_folder_is_kept_without_force(tmp_path: Path) -> None:
    target = make(tmp_path / "small", "old")
    with pytest.raises(SettingError, match="small exists; choose another --out or pass --force"):
        make(target, "new")
    assert text_of(target) == "old"


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = make(tmp_path / "small", "old")
    (target / "stray").write_text("x")
    make(target, "new", force=True)
    assert text_of(target) == "new"
    assert not (target / "stray").exists()
    assert names(tmp_path) == ["small"]


def test_force_does_not_replace_what_effllm_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("x")
    with pytest.raises(SettingError, match="was not written by effllm, so --force does not replace it"):
        make(tmp_path / "thesis", force=True)
    assert names(tmp_path / "thesis") == ["chapter"]


def test_force_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    assert text_of(make(tmp_path / "small", "new", force=True)) == "new"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "small").write_text("x")
    with pytest.raises(SettingError, match=r"exists; choose|is a file, not a folder"):
        make(tmp_path / "small", force=force)
    assert (tmp_path / "small").read_text() == "x"


def test_a_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"cannot write to .*file"):
        make(tmp_path / "file" / "small")


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long_for_the_disk_is_one_error(tmp_path: Path, length: int) -> None:
    with pytest.raises(ArtifactError, match="File name too long"):
        make(tmp_path / ("x" * length))
    assert names(tmp_path) == []


def test_a_link_to_nothing_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "small").symlink_to(tmp_path / "gone")
    with pytest.raises(SettingError, match="is a link to nothing"), create(tmp_path / "small", force=True):
        pytest.fail("the work was done for nothing")


def test_the_parent_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    make(tmp_path / "link" / "small", "old")
    make(tmp_path / "link" / "small", "new", force=True)
    assert text_of(tmp_path / "disk" / "small") == "new"
    assert names(tmp_path / "disk") == ["small"]


def test_a_relative_target_is_where_the_process_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with create(Path("small")) as staging:
        fill(staging)
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == ["elsewhere", "small"]


def test_a_folder_that_appears_meanwhile_is_not_replaced_without_force(tmp_path: Path) -> None:
    target = tmp_path / "small"

    def overtaken() -> None:
        with create(target) as staging:
            fill(staging, "slow")
            make(target, "fast")

    with pytest.raises(SettingError, match="small exists"):
        overtaken()
    assert text_of(target) == "fast"
    assert names(tmp_path) == ["small"]


def test_a_killed_writer_leaves_no_target_and_the_next_sweeps_its_rest(tmp_path: Path, living: list) -> None:
    process = child(WRITE_AND_WAIT, tmp_path / "small", wait_for="writing")
    living.append(process)
    process.kill()
    process.wait()
    assert not (tmp_path / "small").exists()
    assert len(names(tmp_path)) == 1
    assert text_of(make(tmp_path / "small", "new")) == "new"
    assert names(tmp_path) == ["small"]


def test_what_another_process_of_our_number_left_is_swept(tmp_path: Path) -> None:
    target = make(tmp_path / "small", "old")
    aside = tmp_path / f".small.old-{socket.gethostname()}-{os.getpid()}-abc"  # as after a restart of a container
    aside.mkdir()
    target.rename(aside / "small")
    (tmp_path / f".small.tmp-{socket.gethostname()}-{os.getpid()}-def").mkdir()
    with pytest.raises(SettingError, match="small exists"):
        make(target, "new")
    assert text_of(target) == "old"
    assert names(tmp_path) == ["small"]
    with create(tmp_path / "small", force=True) as outer:
        fill(outer, "outer")
        make(tmp_path / "small", "inner", force=True)  # leaves what this process is writing
        assert outer.is_dir()
    assert text_of(target) == "outer"


def test_a_writer_killed_while_replacing_leaves_the_old_folder(tmp_path: Path, living: list) -> None:
    target = make(tmp_path / "small", "old")
    process = child(WRITE_AND_WAIT, target, "force", wait_for="writing")
    living.append(process)
    process.kill()
    process.wait()
    assert text_of(target) == "old"


@pytest.mark.parametrize("force", [False, True])
def test_a_writer_killed_between_the_renames_is_mended_by_the_next(tmp_path: Path, force: bool) -> None:
    target = make(tmp_path / "small", "old")
    process = child(DIE_BETWEEN_THE_RENAMES, target)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    if force:
        make(target, "new", force=True)
    else:
        with pytest.raises(SettingError, match="small exists"):
            make(target, "new")
    assert text_of(target) == ("new" if force else "old")
    assert names(tmp_path) == ["small"]


def test_an_exception_after_mending_keeps_the_mended_folder(tmp_path: Path) -> None:
    target = make(tmp_path / "small", "old")
    child(DIE_BETWEEN_THE_RENAMES, target)

    def failing() -> None:
        with create(target, force=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert text_of(target) == "old"


def test_living_writers_of_one_target_leave_each_other_alone(tmp_path: Path, living: list) -> None:
    other = child(WRITE_AND_WAIT, tmp_path / "small", "force", wait_for="writing")
    living.append(other)
    make(tmp_path / "small", "mine")
    assert len(names(tmp_path)) == 2
    assert text_of(tmp_path / "small") == "mine"
    other.communicate("go on\n", timeout=30)
    assert other.returncode == 0
    assert Variant.open(tmp_path / "small").task == "fill-mask"
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize("name", ["model[1]", "m?del", "m*", "a.b", "-x", "ünï", "white space"])
def test_leftovers_are_swept_whatever_the_name(tmp_path: Path, name: str, living: list) -> None:
    process = child(WRITE_AND_WAIT, tmp_path / name, wait_for="writing")
    living.append(process)
    process.kill()
    process.wait()
    make(tmp_path / name)
    assert names(tmp_path) == [name]


def test_leftovers_of_other_targets_and_hosts_are_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant.socket, "gethostname", lambda: "node")
    dead = 2**22 + 1  # beyond the largest process id of Linux
    foreign = [
        f".model.tmp-node-{dead}-abcdefgh",
        f".m-model.tmp-node-{dead}-abcdefgh",
        f".m.tmp-node-1-{dead}-abcdefgh",
        f".m.tmp-other-{dead}-abcdefgh",
        f".m.tmp-node-{dead}-abcdefgh-kept",
    ]
    for name in (*foreign, f".m.tmp-node-{dead}-abcdefgh"):
        (tmp_path / name).mkdir()
    make(tmp_path / "m")
    assert names(tmp_path) == sorted([*foreign, "m"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(mount)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*small: No space left on device") as caught:
        make(small_disk / "small", "x" * 300_000)
    assert "nothing was left behind" in str(caught.value)
    assert names(small_disk) == []


def test_a_full_disk_keeps_the_folder_that_was_to_be_replaced(small_disk: Path) -> None:
    target = make(small_disk / "small", "old")
    with pytest.raises(ArtifactError, match="No space left on device"):
        make(target, "x" * 300_000, force=True)
    assert text_of(target) == "old"
    assert names(small_disk) == ["small"]


def test_weights_that_find_no_room_are_one_error(small_disk: Path) -> None:
    """safetensors has an error of its own for this."""
    message = r"cannot write .*small: No space left on device; nothing was left behind"
    with pytest.raises(ArtifactError, match=message), create(small_disk / "small") as staging:
        save_file({"weight": np.zeros(100_000)}, staging / "model.safetensors")
    assert names(small_disk) == []


def test_weights_that_cannot_be_read_are_no_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(SafetensorError), create(tmp_path / "small"):
        load_file(tmp_path / "model.safetensors")


def test_a_read_only_disk_is_one_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ArtifactError, match=r"cannot write to .*disk"):
        make(small_disk / "new" / "small")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_an_error_of_the_disk_is_an_artifact_error(tmp_path: Path, code: int) -> None:
    def failing() -> None:
        with create(tmp_path / "small"):
            raise OSError(code, os.strerror(code), "weights")

    with pytest.raises(ArtifactError, match=rf"cannot write .*small: {os.strerror(code)} \(weights\)"):
        failing()
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["mkdtemp", "fsync"])
def test_a_disk_that_fills_up_at_any_step_is_an_artifact_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(variant.tempfile if step == "mkdtemp" else variant.os, step, full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        make(tmp_path / "new" / "small")
    assert names(tmp_path) == []


def test_an_error_that_is_not_the_disks_is_a_bug_and_passes_through(tmp_path: Path) -> None:
    def failing() -> None:
        with create(tmp_path / "small") as staging:
            (staging / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        failing()
    assert names(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_parent_without_permission_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.setattr(variant.os, "access", lambda path, mode: False)
    with (
        pytest.raises(ArtifactError, match=r"cannot write to .*: no write permission"),
        create(tmp_path / "small", force=force),
    ):
        pytest.fail("the work was done for nothing")


def test_everything_is_flushed_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, flushed = tmp_path / "small", []

    def recording(descriptor: int) -> None:
        assert not target.exists()
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(variant.os, "fsync", recording)
    make(target)
    assert sorted(flushed) == ["config.json", MANIFEST, "model.onnx"]
