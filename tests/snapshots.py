"""What a folder holds, so that a test sees what has changed in it."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def touched(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: a rewrite shows even where the bytes are the same."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for name, content in contents(source).items():
        (target / name).write_bytes(content)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in folder.iterdir()
    }
