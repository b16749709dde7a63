"""The fast path takes only what it can answer rightly, without importing transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from merge_adapter.methods.change import ModuleKind, TensorSpec
from merge_adapter.names.direct import DirectNames, NotDirect, direct_names
from merge_adapter.names.survey import DATA, survey

Q = "model.layers.0.self_attn.q_proj"
SPECS = {
    f"{Q}.weight": TensorSpec(f"{Q}.weight", "BF16", (16, 16)),
    "model.embed_tokens.weight": TensorSpec("model.embed_tokens.weight", "BF16", (48, 16)),
}
LLAMA = {"model_type": "llama", "vocab_size": 48}


def test_the_stored_survey_is_that_of_the_installed_transformers() -> None:
    """Conversions that transformers adds or drops show here; run `python -m merge_adapter.names.survey`."""
    assert json.loads(DATA.read_text()) == survey()


def test_no_direct_type_is_converted(checkpoint: Callable[..., Any]) -> None:
    """Types the survey calls direct load without conversions, by transformers' own account."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = json.loads(DATA.read_text())["direct"]
    built = 0
    for model_type in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "phi3",
        "olmo2",
        "starcoder2",
        "mamba",
        "opt",
    ):
        assert model_type in known
        assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
        assert get_model_conversion_mapping(model, add_legacy=False) == []
        built += 1
    assert built == 10


def test_a_known_type_whose_names_exist_is_direct() -> None:
    made = direct_names(LLAMA, SPECS, modules=[Q])
    assert isinstance(made, DirectNames)
    assert made.direct(f"{Q}.weight") == f"{Q}.weight"
    assert made.direct(f"{Q}.bias") is None
    assert made.group(f"{Q}.weight") is None
    assert made.kind(Q) is ModuleKind.LINEAR
    assert made.exists(Q)
    assert made.exists("model.layers.7") is None
    assert list(made.modules()) == [Q, "model.embed_tokens"]


def test_what_is_not_direct_says_why() -> None:
    """Every refusal names its cause, so that the plan can say which path it took."""
    refusals = {
        "converts": direct_names({"model_type": "qwen3_moe"}, SPECS, modules=[Q]),
        "inside": direct_names({**LLAMA, "vision_config": {"model_type": "siglip"}}, SPECS, modules=[Q]),
        "unknown": direct_names({"model_type": "nobody_knows"}, SPECS, modules=[Q]),
        "untyped": direct_names({}, SPECS, modules=[Q]),
        "prefix": direct_names(LLAMA, SPECS, modules=[Q.removeprefix("model.")]),
        "head": direct_names(LLAMA, SPECS, modules=[], parameters=["score.weight"]),
        "embedding": direct_names(LLAMA, SPECS, modules=["model.embed_tokens"]),
        "quantised": direct_names({**LLAMA, "quantization_config": {}}, SPECS, modules=[Q]),
        "transposed": direct_names({"model_type": "gpt2"}, SPECS, modules=[Q]),
    }
    for label, made in refusals.items():
        assert isinstance(made, NotDirect), label
        assert made.reason, label


def test_the_fast_path_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from merge_adapter.names.choose import name_map\n"
        "from merge_adapter.names.direct import direct_names\n"
        "print(type(direct_names({'model_type': 'llama'}, {}, modules=[])).__name__)\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["DirectNames", "[]"]
