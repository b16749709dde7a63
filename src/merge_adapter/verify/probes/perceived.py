"""What models that see or hear are asked: pictures and sounds made by code, through the repository's own processors.

Where those cannot be used, in the shapes that the configs call for. Every arm reads the same tensors: what is compared
is the function of the weights. Whether the merged repository's processor makes the same is asked in `processors`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.probes import Probe
from merge_adapter.verify.probes.batch import Batch
from merge_adapter.verify.probes.batches import FEWEST, Probes, random_ids, tokenized
from merge_adapter.verify.probes.media import RATE, picture, sound
from merge_adapter.verify.probes.pictures import looked_at, pictures_of

DOCUMENTS = 12
"""Pictures or sounds that are put to a model, each a document of its own."""

TEXT = 24
"""Tokens of the text that follows a picture, or that a speech model is taught."""


@dataclass(frozen=True)
class Unfed:
    """This gate cannot make what the model reads."""

    reason: str


def sees_or_hears(kind: Kind, model: Any) -> bool:
    """Whether token ids alone are not what the model reads."""
    if kind in (Kind.VISION_TEXT, Kind.IMAGES, Kind.AUDIO, Kind.SPEECH, Kind.CTC):
        return True
    return (
        kind in (Kind.EMBEDDING, Kind.OTHER) and getattr(model, "main_input_name", "input_ids") != "input_ids"
    )


def perceived(
    kind: Kind,
    model: Any,
    texts: tuple[Probe, ...],
    tokenizer: Any,
    folder: Path,
    *,
    budget: int,
    seed: int,
    device: torch.device,
) -> Probes | Unfed:
    """Probes for `model`, a transformers model whose repository, with its feature extractor, lies in `folder`.

    `budget` are the tokens of text and pictures together; at least four documents are read however small it is. `model`
    computes in fp32 on `device` afterwards.
    """
    if kind is Kind.VISION_TEXT:
        return _seen_with_text(model, texts, tokenizer, folder, budget=budget, seed=seed, device=device)
    name = str(getattr(model, "main_input_name", ""))
    if name == "pixel_values":
        return _pictures(model, folder, device)
    if name in ("input_values", "input_features"):
        heard = _sounds(model, name, folder)
        if isinstance(heard, Probes) and kind is Kind.SPEECH:
            return _with_answers(heard, model, texts, tokenizer, seed)
        return heard
    return Unfed(f"it reads {name or 'no input this gate knows'}")


def _names(what: str, count: int) -> tuple[str, ...]:
    return tuple(f"{what} {at + 1}" for at in range(count))


def _without_ids(media: dict[str, Tensor], what: str, source: str, positions: int = 0) -> Probes:
    count = len(next(iter(media.values())))
    empty = torch.zeros((count, positions), dtype=torch.int64)
    return Probes(Batch(empty, torch.ones_like(empty), media), _names(what, count), source)


def _pictures(model: Any, folder: Path, device: torch.device) -> Probes:
    """Pictures, or videos for a model whose config counts frames."""
    made = pictures_of(model, folder, device)
    frames = getattr(model.config, "num_frames", None)
    what, each = ("video", frames) if isinstance(frames, int) else ("picture", 1)
    drawn = torch.stack([made.draw(at).media["pixel_values"] for at in range(DOCUMENTS * each)])
    height, width = drawn.shape[-2:]
    if what == "video":
        drawn = drawn.reshape(DOCUMENTS, 1, each, *drawn.shape[2:])
    return _without_ids({"pixel_values": drawn}, what, f"{what}s {made.source}, {width} x {height}")


# -------------------------------------------------------------------------------------------------- sounds


def _sounds(model: Any, name: str, folder: Path) -> Probes | Unfed:
    config = model.config
    made = _extracted(folder, name)
    if made:
        source = "sounds made by code, through the repository's feature extractor"
    elif name == "input_values" and not hasattr(config, "num_mel_bins"):
        made = [sound(at, RATE)[None] for at in range(DOCUMENTS)]
        source = "sounds made by code, one second each"
    elif hasattr(config, "num_mel_bins") and isinstance(getattr(config, "max_source_positions", None), int):
        height, width = int(config.num_mel_bins), 2 * int(config.max_source_positions)
        made = [picture(at, channels=1, height=height, width=width) for at in range(DOCUMENTS)]
        source = "spectrograms made by code: the repository's feature extractor could not be used"
    else:
        return Unfed(
            "its repository has no feature extractor that can be used, and its config names no shape"
        )
    frames = 0
    if hasattr(model, "_get_feat_extract_output_lengths") and name == "input_values":
        frames = int(model._get_feat_extract_output_lengths(torch.tensor(made[0].shape[-1])))
    return _without_ids({name: torch.stack(made).float()}, "sound", source, frames)


def _extracted(folder: Path, name: str) -> list[Tensor]:
    """The sounds as the feature extractor in `folder` gives them, (1, ...) each; none when none there works here."""
    import transformers

    if not (folder / "preprocessor_config.json").is_file():
        return []
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
        return [
            torch.as_tensor(extractor(sound(at, RATE).numpy(), sampling_rate=RATE, return_tensors="pt")[name])
            for at in range(DOCUMENTS)
        ]
    except Exception:  # noqa: BLE001 - a foreign config, and libraries that may be absent
        return []


def _with_answers(heard: Probes, model: Any, texts: tuple[Probe, ...], tokenizer: Any, seed: int) -> Probes:
    """Each sound gets a text that the decoder is taught."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    written = _texts(texts, tokenizer, count=len(heard.batch), vocabulary=rows, seed=seed)
    count = len(written.batch)
    media = {name: value[:count] for name, value in heard.batch.media.items()}
    batch = Batch(written.batch.ids, written.batch.mask, media)
    return Probes(batch, heard.names[:count], f"{heard.source}; the decoder is taught {written.source}")


def _texts(texts: tuple[Probe, ...], tokenizer: Any, *, count: int, vocabulary: int, seed: int) -> Probes:
    """`count` documents, or as many as there are, of at most `TEXT` tokens."""
    if tokenizer is None:
        return random_ids(budget=count * 16, vocabulary=vocabulary, limit=TEXT, seed=seed)
    chosen = texts[:count]
    return tokenized(chosen, tokenizer, budget=len(chosen) * TEXT, vocabulary=vocabulary, limit=TEXT)


# -------------------------------------------------------------------------------------------------- vision and text


def _seen_with_text(
    model: Any,
    texts: tuple[Probe, ...],
    tokenizer: Any,
    folder: Path,
    *,
    budget: int,
    seed: int,
    device: torch.device,
) -> Probes | Unfed:
    token = next(
        (
            value
            for name in ("image_token_id", "image_token_index")
            if isinstance(value := getattr(model.config, name, None), int)
        ),
        None,
    )
    if token is None:
        return Unfed("its config names no token that stands for a picture")
    try:
        made = pictures_of(model, folder, device)
        first = made.draw(0)
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        return Unfed(f"its pictures could not be made from its config: {error}")
    count = min(DOCUMENTS, len(texts), max(FEWEST, budget // (first.places + TEXT)))
    rows = int(model.get_input_embeddings().weight.shape[0])
    written = _texts(texts, tokenizer, count=count, vocabulary=rows, seed=seed)
    count = len(written.batch)
    pictures = [first, *(made.draw(at) for at in range(1, count))]
    media = {name: torch.stack([one.media[name] for one in pictures]) for name in first.media}
    ids, mask, places = _joined(model.config, written.batch, token, first.places)
    media |= _places(model, places) | looked_at(media, places)
    source = f"{written.source} after a picture {made.source}, which takes {first.places} places"
    return Probes(Batch(ids, mask, media), written.names, source, written.templated)


def _joined(config: Any, batch: Batch, token: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with the picture's places in them, their mask, and where the places are; all (documents, length)."""
    around = [getattr(config, name, None) for name in ("vision_start_token_id", "vision_end_token_id")]
    before, after = ([value] if isinstance(value, int) else [] for value in around)
    inserted = torch.tensor([*before, *[token] * count, *after]).expand(len(batch), -1)
    plain = batch.ids.masked_fill(batch.ids == token, 0 if token else 1)
    bos = getattr(getattr(config, "text_config", config), "bos_token_id", None)
    at = 1 if isinstance(bos, int) and bool((plain[:, 0] == bos).all()) else 0
    ids = torch.cat((plain[:, :at], inserted, plain[:, at:]), 1)
    mask = torch.cat((batch.mask[:, :at], torch.ones_like(inserted), batch.mask[:, at:]), 1)
    return ids, mask, (ids == token).long()


def _places(model: Any, places: Tensor) -> dict[str, Tensor]:
    """The arguments that tell pictures from text, for the models that take them."""
    taken = inspect.signature(model.forward).parameters
    found = {}
    if "mm_token_type_ids" in taken:
        found["mm_token_type_ids"] = places[:, None]
    if "token_type_ids" in taken:
        # PaliGemma's kind marks the answer, which none of these documents has
        marks_answer = str(model.config.model_type).startswith(("paligemma", "colpali"))
        found["token_type_ids"] = (torch.zeros_like(places) if marks_answer else places)[:, None]
    return found
