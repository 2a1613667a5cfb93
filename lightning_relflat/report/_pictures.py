"""Pictures of samples as PNG files, made with the standard library alone."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Pictures are shown small; larger ones are averaged down, so that a page stays small, too.
LARGEST = 96


def picture_of(inputs: Any, place: int) -> bytes | None:
    """Return the picture of a sample, where a batch holds pictures.

    Args:
        inputs: what the model was given: the first tensor in it of shape (n, 1, H, W) or (n, 3, H, W) counts.
        place: the sample's place in the batch.

    Returns:
        A PNG file; ``None`` where there are no pictures.
    """
    images = _images(inputs)
    if images is None or not 0 <= place < len(images):
        return None
    return png(images[place])


def png(image: Tensor) -> bytes:
    """Return an image as a PNG file: its least number black, its largest white.

    Args:
        image: of shape (1, H, W) or (3, H, W); numbers that are not finite count as the least.

    Returns:
        The file.
    """
    pixels = image.detach().float().cpu()
    finite = pixels.isfinite()
    least = pixels[finite].min() if finite.any() else torch.tensor(0.0)
    pixels = pixels.where(finite, least)
    side = max(pixels.shape[-2:])
    if side > LARGEST:
        size = [max(1, round(length * LARGEST / side)) for length in pixels.shape[-2:]]
        pixels = F.adaptive_avg_pool2d(pixels[None], size)[0]  # type: ignore[arg-type]  # its stub wants a tuple
    least, most = pixels.min(), pixels.max()
    pixels = (pixels - least) / (most - least) if most > least else pixels.clamp(0, 1)
    values = (pixels * 255).round().to(torch.uint8).movedim(0, -1)
    channels, height, width = pixels.shape
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in values)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def data_uri(picture: bytes) -> str:
    """Return a PNG file as an address that holds it.

    Args:
        picture: the file.

    Returns:
        The address.
    """
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _images(inputs: Any) -> Tensor | None:
    if isinstance(inputs, Tensor):
        fits = inputs.ndim == 4 and inputs.shape[1] in (1, 3) and not inputs.is_complex()
        return inputs if fits and min(inputs.shape[2:]) > 1 else None
    entries = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, list | tuple) else ()
    return next((found for entry in entries if (found := _images(entry)) is not None), None)
