"""Really saved adapters of every method, and PEFT's own merge of them to compare with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.merge import merge
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.types import Adapter, BaseModel, MergeSettings, Resolved, Silent, Strategy

LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 48, "max_position_embeddings": 32,
    "attention_bias": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    **LLAMA, "attention_bias": False, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": LLAMA, "gpt2": GPT2, "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "nomic_bert": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0,
    },
}  # fmt: skip
AUTO = {"nomic_bert": "AutoModelForMaskedLM"}


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT advises people who train through warnings; these tests only build adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Bench:
    """A base and an adapter on disk, with everything a comparison needs."""

    base: Path
    adapter: Path
    auto: str
    dtype: torch.dtype
    labels: int | None = None

    @property
    def sources(self) -> Resolved:
        adapter = json.loads((self.adapter / "adapter_config.json").read_text())
        config = json.loads((self.base / "config.json").read_text())
        return Resolved(
            (Adapter(Folder(self.adapter), adapter, str(adapter.get("peft_type", "")).upper()),),
            BaseModel(Folder(self.base), config),
            None,
        )

    def plan(self, strategy: Strategy = Strategy.AUTO) -> MergePlan:
        with quietly():
            return make_plan(self.sources, MergeSettings(strategy=strategy))

    def merge(self, output: Path, strategy: Strategy = Strategy.AUTO) -> dict[str, torch.Tensor]:
        """Merge into `output`; the tensors written, by name."""
        from safetensors.torch import load_file

        output.mkdir()
        settings = MergeSettings(strategy=strategy)
        merge(self.plan(strategy), self.sources, output, settings=settings, progress=Silent())
        return {
            name: value for file in output.glob("*.safetensors") for name, value in load_file(file).items()
        }

    def load_base(self) -> Any:
        import transformers

        options = {"num_labels": self.labels} if self.labels else {}
        with quietly():
            return (
                getattr(transformers, self.auto)
                .from_pretrained(self.base, dtype=torch.float32, **options)
                .eval()
            )

    def adapted(self) -> Any:
        """Base + adapter, unmerged, float32."""
        from peft import PeftModel

        with quietly():
            return PeftModel.from_pretrained(self.load_base(), self.adapter).eval()

    def expected(self) -> dict[str, torch.Tensor]:
        """PEFT's merge in float32, rounded once to the base's dtype, under the names and in the form of the base."""
        from transformers.core_model_loading import revert_weight_conversion

        with quietly():
            merged = self.adapted().merge_and_unload()
            state = revert_weight_conversion(merged, dict(merged.state_dict()))
        return {name: value.to(self.dtype) for name, value in state.items()}

    def stored(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.base / "model.safetensors"))


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`base_of(model_type, dtype, **changes)`: a saved base, made once per session."""
    import transformers

    made: dict[str, Path] = {}

    def make(model_type: str, dtype: torch.dtype, **changes: Any) -> Path:
        key = f"{model_type} {dtype} {changes}"
        if key not in made:
            torch.manual_seed(1)
            config = transformers.CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})
            auto = AUTO.get(model_type, "AutoModelForCausalLM")
            with quietly():
                model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
                with torch.no_grad():
                    for parameter in model.parameters():  # so that no norm is all ones and no bias all zeros
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                made[key] = tmp_path_factory.mktemp(f"base-{model_type}")
                model.to(dtype).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def bench(tmp_path: Path, base_of: Callable[..., Path]) -> Callable[..., Bench]:
    """`bench(peft_type, model_type=, dtype=, changes=, **config)`: an adapter of non-zero effect, saved by PEFT."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    def make(
        peft_type: str,
        *,
        model_type: str = "llama",
        dtype: torch.dtype = torch.float32,
        changes: Mapping[str, Any] | None = None,
        auto: str = "",
        labels: int | None = None,
        **config: Any,
    ) -> Bench:
        base = base_of(model_type, dtype, **(changes or {}))
        auto = auto or AUTO.get(model_type, "AutoModelForCausalLM")
        made = Bench(base, tmp_path / "adapter", auto, dtype, labels)
        with quietly():
            torch.manual_seed(2)
            parsed = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[peft_type]](**config)
            model = peft.get_peft_model(made.load_base(), parsed)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape, generator=generator) * 0.1
                        parameter.add_(noise.to(parameter.dtype))
            model.save_pretrained(made.adapter)
        return made

    return make
