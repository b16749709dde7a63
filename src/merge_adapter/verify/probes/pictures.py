"""Pictures as a model takes them: through its repository's own image processor, else in the shapes its config names.

Image processors want Pillow. Without it, or where a repository's processor cannot be used here, every arm still reads
the same tensors, and what is compared is the function of the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.memory.lazy import widen
from merge_adapter.verify.probes.media import picture

PROCESSOR = "preprocessor_config.json"

MOST_PLACES = 1024
"""Places among the tokens that a processed picture may take; some processors cut a picture in dozens of tiles."""


@dataclass(frozen=True)
class Picture:
    """One picture as the model takes it."""

    media: Mapping[str, Tensor]
    """Argument of the model -> (k, ...)."""
    places: int
    """That it takes among the tokens; 0 for a model without any."""


@dataclass(frozen=True)
class Pictures:
    """Makes pictures of one kind."""

    draw: Callable[[int], Picture]
    source: str


def side(config: Any) -> tuple[int, int]:
    """Height and width that a vision config names."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return 224, 224


def channels(config: Any) -> int:
    """Colours of a picture."""
    for name in ("num_channels", "in_channels", "in_chans"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 3


def processor_of(folder: Path) -> Any:
    """The image processor in `folder`; None where there is none, or it cannot be used here."""
    if not (folder / PROCESSOR).is_file():
        return None
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception:  # noqa: BLE001 - a foreign config, and libraries that may be absent
        return None


def processed(processor: Any, number: int, *, height: int, width: int) -> dict[str, Tensor]:
    """What `processor` makes of the drawn picture `number`. Raises whatever it raises."""
    from PIL import Image

    drawn = (picture(number, channels=3, height=height, width=width) * 127.5 + 127.5).round().byte()
    made = processor(images=[Image.fromarray(drawn.permute(1, 2, 0).numpy())], return_tensors="pt")
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def pictures_of(model: Any, folder: Path, device: torch.device) -> Pictures:
    """Pictures for `model`, whose repository lies in `folder`. It computes in fp32 on `device` afterwards.

    Raises what the model raises of pictures it cannot take.
    """
    processor = processor_of(folder)
    if processor is not None and _takes(processor, model, device):
        source = "drawn by code, through the repository's image processor"
        return Pictures(lambda number: _through(processor, model, number, device), source)
    return Pictures(
        lambda number: _shaped(model, number, device), "made by code in the shape its config names"
    )


def _takes(processor: Any, model: Any, device: torch.device) -> bool:
    """Whether `model` takes what `processor` makes, in as many places as can be afforded."""
    try:
        first = _through(processor, model, 0, device)
    except Exception:  # noqa: BLE001 - foreign code on a picture that it may not like: the config's shape is left
        return False
    if "pixel_values" not in first.media:
        return False
    return 0 < first.places <= MOST_PLACES if _has_text(model) else True


def _has_text(model: Any) -> bool:
    return hasattr(model.config, "vision_config")


def _vision(model: Any) -> Any:
    return getattr(model.config, "vision_config", model.config)


def _through(processor: Any, model: Any, number: int, device: torch.device) -> Picture:
    vision = _vision(model)
    height, width = (4 * _unit(vision),) * 2 if _unit(vision) else side(vision)
    made = processed(processor, number, height=height, width=width)
    taken = inspect.signature(model.forward).parameters
    media = {name: value for name, value in made.items() if name in taken}
    return Picture(media, _places(model, media, device))


def _unit(vision: Any) -> int:
    """Pixels to a side of what becomes one token, in models that take pictures of every size; 0 in others."""
    merge, patch = getattr(vision, "spatial_merge_size", None), getattr(vision, "patch_size", None)
    any_size = isinstance(getattr(vision, "temporal_patch_size", None), int)
    return merge * patch if any_size and isinstance(merge, int) and isinstance(patch, int) else 0


def _shaped(model: Any, number: int, device: torch.device) -> Picture:
    """From the config alone."""
    vision = _vision(model)
    colours, (height, width) = channels(vision), side(vision)
    if unit := _unit(vision):
        shown = picture(number, channels=colours, height=4 * unit, width=4 * unit)
        merge, patch, times = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        grid = torch.tensor([[1, 4 * merge, 4 * merge]])
        return Picture({"pixel_values": _patches(shown, patch, merge, times), "image_grid_thw": grid}, 16)
    media: dict[str, Tensor]
    if pinpoints := getattr(model.config, "image_grid_pinpoints", None):
        # the whole picture, small, and its tiles
        tall, wide = (int(size) for size in pinpoints[0])
        shown = picture(number, channels=colours, height=tall, width=wide)
        tiles = shown.unfold(1, height, height).unfold(
            2, width, width
        )  # (channels, down, across, height, width)
        tiles = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)
        small = picture(number, channels=colours, height=height, width=width)[None]
        media = {"pixel_values": torch.cat((small, tiles))[None], "image_sizes": torch.tensor([[tall, wide]])}
    else:
        pixels = picture(number, channels=colours, height=height, width=width)
        if isinstance(most := getattr(vision, "max_num_tiles", None), int):
            ratios = torch.zeros(1, 1, most, dtype=torch.int64)
            ratios[..., 0] = 1
            tiles = torch.zeros(1, 1, most, *pixels.shape)
            tiles[0, 0, 0] = pixels
            media = {
                "pixel_values": tiles,
                "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
                "aspect_ratio_mask": ratios,
            }
        elif "pixel_attention_mask" in inspect.signature(model.forward).parameters:
            media = {"pixel_values": pixels[None, None]}  # (documents, pictures, ...)
        else:
            media = {"pixel_values": pixels[None]}
    return Picture(media, _places(model, media, device))


def _patches(shown: Tensor, patch: int, merge: int, times: int) -> Tensor:
    """(patches, channels * times * patch * patch), patches that merge into one token next to each other."""
    colours, height, width = shown.shape
    across, down = width // (merge * patch), height // (merge * patch)
    cut = shown.reshape(colours, down, merge, patch, across, merge, patch)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6)  # (down, across, merge, merge, channels, patch, patch)
    cut = cut[..., None, :, :].expand(*cut.shape[:5], times, patch, patch)
    return cut.reshape(down * across * merge * merge, colours * times * patch * patch)


def _places(model: Any, media: Mapping[str, Tensor], device: torch.device) -> int:
    """How many places the model gives a picture: it is asked."""
    if not _has_text(model):
        return 0
    if not hasattr(model, "get_image_features"):
        return 1  # it looks at the picture from its layers; one token says that there is one
    # the weights are 16-bit, the picture is not: they compute in fp32, as every arm does
    widen(model, device)
    taken = inspect.signature(model.get_image_features).parameters
    given = {name: value.to(device) for name, value in media.items() if name in taken}
    with torch.no_grad():
        found = model.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    pieces = found if isinstance(found, list | tuple) else [found]
    return sum(piece.numel() // piece.shape[-1] for piece in pieces)


def looked_at(media: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    """For models that look at a picture from their layers: from which tokens, (documents, 1, length, 1, tiles).

    `places` (documents, length) marks the token that stands for the picture; it and those after it see it.
    """
    if "aspect_ratio_mask" not in media:
        return {}
    seen = (places.cumsum(1) > 0).long()[:, None, :, None, None]
    return {"cross_attention_mask": seen * media["aspect_ratio_mask"][:, :, None].long()}
