"""The network that FID is defined by."""

from __future__ import annotations

import hashlib
import http.client
import io
import sys
import urllib.request
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError, OutputError
from ...files import written_whole
from .base import Trained
from .resizing import pillow, resized_as_floats
from .weights import given, nothing_given

VARIABLE = "REPARAM_INCEPTION"


class Inception(Trained):
    """The 2,048 pooled features of Inception-2015-12-05, as FID takes them ("clean" resizing).

    Each channel of a picture is resized by Pillow's bicubic filter in float32 to 299×299, clipped to
    [0, 255], not re-quantised, and scaled as (x − 128)/128. Grey pictures are repeated in three channels.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500); Parmar et al.,
    "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (arXiv 2104.11222).

    Args:
        path: the TorchScript file inception-2015-12-05.pt; by default that of the environment's
            REPARAM_INCEPTION.
        download: whether the file may be downloaded, where neither says where it is.
        batch: how many pictures are computed at a time.
        dtype: "float32" or "bfloat16".
        cache: the folder that a downloaded file is kept in.

    Raises:
        DataError: if there is no such file, it cannot be downloaded, or it is another one: TorchScript runs
            what is in it, so only the file with the known hash is ever loaded.
        OutputError: if what was downloaded cannot be kept.
    """

    FILE = "inception-2015-12-05.pt"
    URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"
    SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
    SIDE = 299
    resize = (
        "PIL bicubic, per channel in float32, to 299x299, clipped to [0, 255], not re-quantised; grey repeated in "
        "three channels"
    )
    scaling = "(x - 128)/128"

    def __init__(
        self,
        path: str | None = None,
        download: bool = False,
        batch: int = 64,
        dtype: str = "float32",
        cache: str = "~/.cache/reparam",
    ) -> None:
        if batch < 1:
            raise DataError(f"extractor inception: batch must be at least 1, found {batch}.")
        pillow()
        content, self.source = self._content(path, download, Path(cache).expanduser())
        name = f"inception-2015-12-05 at {self.SIDE}x{self.SIDE}"
        super().__init__(_loaded(content), name, self.SHA256, dtype, batch)

    def prepared(self, pictures: Tensor) -> Tensor:
        return (resized_as_floats(pictures, self.SIDE).to(self._device) - 128) / 128

    def features(self, x: Tensor) -> Tensor:
        # Otherwise the first calls, which are profiled, and the later ones, which are fused, round differently.
        with torch.jit.optimized_execution(False):
            found: Tensor = self._net.layers(x)
        return found.flatten(1)

    def _content(self, path: str | None, download: bool, cache: Path) -> tuple[bytes, str]:
        """The known file, and where it comes from."""
        found = given(path, VARIABLE, "inception")
        if found is not None:
            return self._checked(_read(found), str(found)), f"file {found.name}"
        if not download:
            raise nothing_given("inception", f"the file {self.FILE}", VARIABLE)
        kept = cache / self.FILE
        if kept.is_file():
            return self._checked(_read(kept), f"{kept}, downloaded before,"), f"download of {self.FILE}"
        content = self._checked(self._downloaded(), f"what {self.URL} gave")
        _keep(content, kept)
        return content, f"download of {self.FILE}"

    def _checked(self, content: bytes, what: str) -> bytes:
        found = hashlib.sha256(content).hexdigest()
        if found != self.SHA256:
            raise DataError(
                f"extractor inception: {what} is not the known {self.FILE}: its SHA-256 is {found}, not {self.SHA256}. "
                "It is damaged, or another file; it was not loaded. Remove it, and give the known one "
                f"(--set extractor.path=FILE, or {VARIABLE}=FILE in the environment) or have it downloaded "
                "(--set extractor.download=true)."
            )
        return content

    def _downloaded(self) -> bytes:
        print(f"fetching {self.URL}", file=sys.stderr)
        try:
            with urllib.request.urlopen(self.URL, timeout=60) as answer:
                content: bytes = answer.read()
        except (OSError, http.client.HTTPException) as e:
            raise DataError(
                f"extractor inception: cannot download {self.URL}: {e}. Get the file by other means and give its path: "
                f"--set extractor.path=FILE, or {VARIABLE}=FILE in the environment."
            ) from e
        return content


def _loaded(content: bytes) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there is no other form of this file
        net: torch.nn.Module = torch.jit.load(io.BytesIO(content), map_location="cpu")
    return net


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise DataError(
            f"extractor inception: cannot read {path}: {e.strerror or e}. Give the path of {Inception.FILE}."
        ) from e


def _keep(content: bytes, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, OutputError) as e:
        raise OutputError(
            f"extractor inception: cannot keep the downloaded file in {path.parent}. Choose another folder: "
            "--set extractor.cache=DIR."
        ) from e
