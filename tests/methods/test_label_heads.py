"""Which weights have one row per label, asked of every class of transformers that sorts things into classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from merge_adapter.methods.change import TensorSpec
from merge_adapter.methods.edits.resizing import label_heads
from merge_adapter.verify.models.kinds import HEADS

LABELS = 1013
"""So many that no other size of a model is taken for it."""
TASKS = (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
)  # fmt: skip


def classes(task: str) -> Iterator[tuple[str, str]]:
    """(model type, name of the class) of each one that transformers has for the task."""
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    for model_type, found in names.items():
        for name in (found,) if isinstance(found, str) else found:
            yield model_type, name


def shapes(model_type: str, name: str) -> dict[str, tuple[int, ...]] | None:
    """The parameters of the class at its own defaults; None where those, or packages it needs, are not to be had."""
    try:
        config = transformers.CONFIG_MAPPING[model_type]()
        for place in (config, getattr(config, "text_config", None)):
            if place is not None:
                place.num_labels = LABELS
        with torch.device("meta"):
            model: Any = getattr(transformers, name)._from_config(config)
    except (TypeError, ValueError, ImportError, KeyError, RuntimeError):
        return None
    return {key: tuple(value.shape) for key, value in model.named_parameters()}


@pytest.mark.parametrize("task", TASKS)
def test_every_head_of_transformers_is_known(task: str) -> None:
    """To the plan, which resizes it, and to the gate, which loads the base with as many labels."""
    unknown, asked = {}, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model_type, name in classes(task):
            found = shapes(model_type, name)
            rows = {key for key, shape in (found or {}).items() if len(shape) > 1 and shape[0] == LABELS}
            if found is None or not rows:
                continue
            asked += 1
            held = {key: TensorSpec(key, "F32", shape) for key, shape in found.items()}
            known = set(label_heads(held))
            first = next((f"{head}.weight" for head in HEADS if f"{head}.weight" in found), None)
            if known != rows or first not in rows:
                unknown[name] = (rows, known, first)
    assert asked
    assert not unknown
