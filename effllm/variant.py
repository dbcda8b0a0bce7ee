"""A variant: an immutable model folder with a manifest, written whole or not at all.

`effllm.json` says where the folder comes from (parent, steps, settings, seeds, versions), what it promises
(`batch_dependent`), what was measured on it (rows) and the SHA-256 and size of every other file, but for the card
(`README.md`), which people edit. `create` writes into a temporary folder beside the target and renames it when
complete; what a killed process leaves behind is swept by the next `create` on the same target.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from effllm import machine
from effllm.errors import ArtifactError, SettingError
from effllm.rows import Row

MANIFEST = "effllm.json"
CARD = "README.md"
FORMAT = 1
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
WRITE_ERRORS = DISK_ERRORS | {errno.ENAMETOOLONG, errno.ENOTEMPTY}
_OURS: set[Path] = set()
"""The temporary folders of this process. One that only has its number was left by another: in a container the next
process often has the number of the one that was killed."""


@dataclass(frozen=True)
class Variant:
    """A folder that effllm wrote, and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def task(self) -> str:
        """The task that the folder's model answers."""
        return str(self.manifest["task"])

    @property
    def batch_dependent(self) -> bool:
        """True when an answer can change with the other texts of its batch."""
        return bool(self.manifest.get("batch_dependent", False))

    @property
    def rows(self) -> list[Row]:
        """The numbers that were measured on the folder when it was written."""
        try:
            return [Row.from_json(row) for row in self.manifest.get("rows", [])]
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{self.path / MANIFEST} has a row that is not one: {error}") from None

    @classmethod
    def open(cls, path: Path | str) -> Variant:
        """Read a variant and check every file against its recorded SHA-256.

        Raises ArtifactError when the manifest or a file is missing, damaged, or reaches outside the folder.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        for name, entry in manifest["files"].items():
            if name == CARD:  # listed by versions of effllm before this one
                continue
            try:
                _check_file(folder, name, entry)
            except (OSError, ValueError, RuntimeError) as error:  # unreadable, a NUL in the name, a loop of links
                raise ArtifactError(f"{folder}: {name!r} cannot be read: {error}") from None
        return cls(folder, manifest)


def _check_file(folder: Path, name: str, entry: Any) -> None:
    file, path = folder / name, PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not _is_inside(file.resolve(), folder.resolve()):
        raise ArtifactError(f"{folder}: the manifest names {name!r}, which is outside the folder")
    if not isinstance(entry, dict) or not {"sha256", "size_bytes"} <= set(entry):
        raise ArtifactError(f"{folder / MANIFEST} has no digest of {name!r}")
    if not file.is_file():
        raise ArtifactError(f"{folder}: {name} is missing; the folder is incomplete")
    if file.stat().st_size != entry["size_bytes"]:
        raise ArtifactError(f"{file} is damaged: {file.stat().st_size} bytes, {entry['size_bytes']} were written")
    if sha256(file) != entry["sha256"]:
        raise ArtifactError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder, or in the hub's cache among the files that the folder there links to."""
    cached = folder.parent.name == "snapshots" and file.is_relative_to(folder.parent.parent / "blobs")
    return cached or file.is_relative_to(folder)


def check_whole(folder: Path) -> None:
    """Check every file of a folder that effllm wrote, as `Variant.open` does; others have no digests to check."""
    if is_variant(folder):
        Variant.open(folder)


def is_variant(folder: Path) -> bool:
    """Return whether a folder carries effllm's manifest."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest without checking its files. Raises ArtifactError when it is not one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is not a folder that effllm wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "task" not in manifest:
        raise ArtifactError(f"{folder / MANIFEST} is not a manifest of effllm")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}; this effllm reads format {FORMAT}"
        )
    model_file = manifest.get("model_file", "")
    if model_file != "" and (not isinstance(model_file, str) or model_file not in manifest["files"]):
        raise ArtifactError(f"{folder / MANIFEST} names the model file {model_file!r}, which is not among its files")
    return manifest


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weights file of a model folder, by name."""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `effllm.json` with `content`, the versions, the machine, and the digest of every file but the card."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256(file), "size_bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file not in {folder / MANIFEST, folder / CARD}
    }
    manifest = {
        "format": FORMAT,
        **content,
        "versions": machine.versions(),
        "machine": machine.describe(),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_target(target: Path, *, force: bool) -> None:
    """Fail early when `target` cannot be written: it exists (without `force`), or its parent is not writable."""
    try:
        exists = target.exists()
        holds = exists and target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror}") from None
    if target.is_symlink() and not exists:
        raise SettingError(f"{target} is a link to nothing; choose another --out")
    if exists and not force:
        raise SettingError(f"{target} exists; choose another --out or pass --force to replace it")
    if exists and not target.is_dir():
        raise SettingError(f"{target} is a file, not a folder; choose another --out")
    if holds and not is_variant(target):
        raise SettingError(f"{target} was not written by effllm, so --force does not replace it; choose another --out")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArtifactError(f"cannot write to {parent}: no write permission")


@contextlib.contextmanager
def create(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it to `target` when the block ends without an exception.

    On an exception, Ctrl-C included, the temporary folder is removed and an existing `target` is untouched. A process
    killed at any moment leaves `target` whole, absent, or (in the instant of a replacement) moved aside, from where the
    next `create` restores it. Raises ArtifactError when the disk is full or not writable, SettingError when another
    process made `target` in the meantime and `force` is not set.
    """
    check_target(target, force=force)
    target = target.absolute()
    new_parents = [parent for parent in target.parents if not parent.exists()]
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        check_target(target, force=force)
        staging = _temporary(target, "tmp")
        staging.chmod(0o755)
        yield staging
        _sync(staging)
        check_target(target, force=force)
        _publish(staging, target)
    except Exception as error:
        code, where = _write_error(error)
        if code not in WRITE_ERRORS:
            raise
        raise ArtifactError(f"cannot write {target}: {os.strerror(code)}{where}; nothing was left behind") from error
    finally:
        if staging is not None:
            _remove(staging)
        with contextlib.suppress(OSError):
            for parent in new_parents:
                parent.rmdir()  # fails, as it should, where the target is in it


def _write_error(error: Exception) -> tuple[int, str]:
    """Return the system's number of an error, 0 where it has none, and the file in words where it is known.

    safetensors has a type of its own for files that it cannot write, with the number in its text.
    """
    if isinstance(error, OSError):
        return error.errno or 0, f" ({error.filename})" if error.filename else ""
    number = re.search(r"while serializing: I/O error: .*\(os error (\d+)\)", str(error))
    return (int(number[1]), "") if number and type(error).__name__ == "SafetensorError" else (0, "")


def _publish(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; an existing target goes aside first, and comes back when that fails."""
    if not target.exists():
        staging.rename(target)
        return
    aside = _temporary(target, "old")
    moved = aside / target.name
    try:
        target.rename(moved)
        staging.rename(target)
    finally:
        if moved.exists() and not target.exists():
            moved.rename(target)
        _remove(aside)


def _temporary(target: Path, kind: str) -> Path:
    """Make a folder beside `target` whose name says whose it is."""
    prefix = f".{target.name}.{kind}-{socket.gethostname()}-{os.getpid()}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    _OURS.add(folder)
    return folder


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _OURS.discard(folder)


def _sweep(target: Path) -> None:
    """Remove what dead processes of this host left beside `target`, restoring a target that one had moved aside."""
    name, host = re.escape(target.name), re.escape(socket.gethostname())
    ours = re.compile(rf"\.{name}\.(old|tmp)-{host}-(\d+)-\w+")
    for leftover in sorted(target.parent.iterdir()):
        match = ours.fullmatch(leftover.name)
        if match is None or leftover in _OURS or (int(match[2]) != os.getpid() and _alive(int(match[2]))):
            continue
        moved = leftover / target.name
        if match[1] == "old" and moved.exists() and not target.exists():
            moved.rename(target)
        shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(folder: Path) -> None:
    """Flush every file of a folder to the disk, so that a rename never publishes an empty file after a power cut."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
