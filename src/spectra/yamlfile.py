"""YAML from a file or from a word of the command line, read as DVC reads it.

The reader is the one DVC uses, so that `1e-4` means the same to both. It builds plain values
only, of a file that is a file and not too large.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from spectra.errors import ParameterError

USUAL = Path("params.yaml")
_LIMIT = 1 << 20  # bytes of a file of parameters: a list of 50,000 strengths


def read(path: Path | None) -> dict[str, Any]:
    """The sections of a YAML file; of `params.yaml`, where there is one, if none is named.

    Raises:
        ParameterError: It cannot be read, is not YAML or holds no sections.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if path is None:
        path = USUAL
        if not path.exists():
            return {}
    try:
        content = YAML(typ="safe", pure=True).load(_text(path))
    except OSError as error:
        raise ParameterError(
            f"cannot read parameters from {path}: {error.strerror}; correct --params"
        ) from None
    except (YAMLError, ValueError, RecursionError) as error:  # 2001-99-99 is a ValueError to it
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        first = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ParameterError(f"{path} is not valid YAML{where}: {first[:200]}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParameterError(f"{path} must hold sections of parameters, not a {kind(content)}")
    return content


def _text(path: Path) -> str:
    """The text of a file, which must be one: a pipe may never end, nor begin."""
    if "\0" in str(path):  # Python's own complaint would read like one about the contents
        raise ParameterError(f"cannot read parameters from {path}: no file has such a name")
    with open(path, "rb", opener=_unwaiting) as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise ParameterError(f"{path} is a pipe; write the parameters to a file")
        data = file.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise ParameterError(f"{path} has more than {_LIMIT:,} bytes; it is no file of parameters")
    return data.decode("utf-8")


def _unwaiting(path: str, flags: int) -> int:
    """Open without waiting for another program to open the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def scalar(text: str) -> Any:  # noqa: ANN401
    """Read text as YAML does, so that '0.01', 'null' and '[64, 64]' get their types."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError):
        return text


def kind(value: object) -> str:
    """What a value is called in YAML."""
    return {list: "list", str: "text", int: "number", float: "number"}.get(type(value), "value")
