"""Reading a `state_dict` that somebody else may have written.

A weights file is a pickle, which can ask for any code to be run; a zip, which can ask for any
memory; and a path, which can be a pipe without an end. Here it is read by PyTorch's unpickler
for weights alone, from a file that is no larger unpacked than it is. Whether its tensors are a
network is for `mlp` to say.
"""

from __future__ import annotations

import errno
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from spectra.errors import WeightsError


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a `state_dict`, without running anything the file may ask for.

    A checkpoint that holds one under "state_dict" or "model_state_dict" will do.

    Raises:
        WeightsError: The file cannot be read, or is not a dictionary of tensors.
    """
    try:
        _check_container(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it thinks of a file that it goes on to refuse
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # of a seek before the beginning: a zip without its end
            raise WeightsError(f"{path} is not whole; copy or save it again") from None
        raise WeightsError(f"cannot read weights from {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path} is refused: it is not a plain state_dict, or loading it would run code; "
            "save it with torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # a damaged pickle trips over anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.partition(". ")[0][:120]
        raise WeightsError(
            f"{path} is not a PyTorch weights file: {reason}; save it with "
            "torch.save(model.state_dict(), path)"
        ) from None
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a state_dict; save it with "
            "torch.save(model.state_dict(), path)"
        )
    return content


def _check_container(path: Path) -> None:
    """Refuse what would be read without end, or unpack to more than it is.

    `torch.save` does not compress: members that are, or that share bytes, are a bomb's.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WeightsError(f"{path} is a pipe or a device, not a file of weights; name a file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            unpacked = sum(member.file_size for member in members.infolist())
        if unpacked > path.stat().st_size:
            raise WeightsError(
                f"{path} would unpack to {unpacked:,} bytes from {path.stat().st_size:,}; "
                "refused: torch.save does not compress"
            )
