"""`WeightFile`: the file of an adapter's tensors, whose shapes are known at once and whose tensors are read on demand.

Nothing here is about LoRA.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from logo.identity import Stamp, content_stamp, file_sha256

if TYPE_CHECKING:
    import torch

_LFS_POINTER = b"version https://git-lfs"


def stamp(path: Path) -> Stamp | None:
    """`content_stamp`; None if the file cannot be found."""
    try:
        return content_stamp(path)
    except OSError:
        return None


class WeightFile(Protocol):
    """Tensors by key, read on demand. An object is a view of one file as it was when it was opened."""

    def __hash__(self) -> int: ...

    @property
    def path(self) -> Path: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor; tensors are not read if the format allows that."""
        ...

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these keys, on the CPU, in the dtype they are stored in."""
        ...

    def sha256(self) -> str:
        """The digest of its content, as `sha256sum` prints it for a file on disk."""
        ...


class SafetensorsFile:
    """A memory-mapped `.safetensors` file, of which only the tensors that are used are read.

    Attributes:
        path: where it is.
        stamp: its stamp when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, stamp(path)
        self._digest: str | None = None  # of the content that it had when it was opened, where it is known

    def shapes(self) -> dict[str, tuple[int, ...]]:
        from safetensors import safe_open

        self.path.open("rb").close()  # safetensors calls a file that may not be read a missing one
        with safe_open(self.path, framework="numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        self.path.open("rb").close()
        with safe_open(self.path, framework="pt") as file:
            self._check_unchanged()
            return {key: file.get_tensor(key) for key in keys}

    def sha256(self) -> str:
        digest = file_sha256(self.path)
        if stamp(self.path) == self.stamp:
            self._digest = digest
        return digest

    def _check_unchanged(self) -> None:
        """Raises ValueError if the file was replaced or rewritten, since the scales that were read with it and the
        scores that were computed from it may not be its own."""
        now = stamp(self.path)
        if now is None or self.stamp is None or now[:2] != self.stamp[:2]:
            raise ValueError("it has changed since it was opened; open the pool again")
        # Size and time may have been set back; but a new owner, mode or link changes the change time, too, and some
        # network drives change the inode on their own.
        if now[3] != self.stamp[3]:
            if self._digest is None or file_sha256(self.path) != self._digest:
                raise ValueError("it has changed since it was opened; open the pool again")
            self.stamp = now


class PickleFile:
    """A pickled `.bin` file; opened only if the user allows it, with `weights_only=True`. Attributes as
    `SafetensorsFile`."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, stamp(path)

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        import torch

        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's own text suggests weights_only=False, which runs the code
            raise ValueError("it holds objects other than tensors, or is damaged; no code in it was run") from error
        if not isinstance(loaded, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
            for key, value in loaded.items()
        ):
            raise ValueError("not a dictionary of dense tensors by name")
        return {key: value.detach() for key, value in loaded.items()}  # parameters would carry gradients

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        return {key: self._tensors[key] for key in keys}

    def sha256(self) -> str:
        return file_sha256(self.path)


def unreadable(error: Exception, file: Path) -> str:
    """Why a weight file cannot be read, in one line."""
    with suppress(OSError), file.open("rb") as start:
        if start.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return f"{file.name} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
    text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    doubt = " (truncated or damaged?)" if type(error).__name__ == "SafetensorError" else ""
    return f"{file.name} cannot be read: {text}{doubt}"
