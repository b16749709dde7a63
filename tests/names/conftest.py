"""Tiny checkpoints of many architectures, saved by transformers itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.methods.change import TensorSpec

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `from_pretrained` can load, its tensors as they lie on disk, and the loaded model."""

    folder: Path
    tensors: Mapping[str, torch.Tensor]
    model: Any

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {
            name: TensorSpec(name, _CODES[value.dtype], tuple(value.shape))
            for name, value in self.tensors.items()
        }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """`checkpoint(model_type, auto_class, rename=..., **config)`: built, saved, renamed on disk, loaded again."""
    import transformers
    from safetensors.torch import load_file, save_file

    def make(
        model_type: str,
        auto_class: str = "AutoModelForCausalLM",
        *,
        rename: Callable[[str], str] = str,
        load_as: str = "",
        **config: Any,
    ) -> Checkpoint:
        torch.manual_seed(7)
        folder = tmp_path / model_type
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            configuration = transformers.CONFIG_MAPPING[model_type](**config)
            model = getattr(transformers, auto_class).from_config(configuration, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():  # norms and biases too, so that no two of them are equal
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folder)
            file = folder / "model.safetensors"
            tensors = {rename(name): value for name, value in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
            loaded = getattr(transformers, load_as or auto_class).from_pretrained(folder, dtype=torch.float32)
        return Checkpoint(folder, tensors, loaded)

    return make
