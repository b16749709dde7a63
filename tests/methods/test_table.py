"""The methods table is complete and true of the installed PEFT, and the documentation is made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.errors import ExitCode, MethodError
from merge_adapter.methods.refuse import check_method
from merge_adapter.methods.table import METHODS, Way, document, find_method

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_table_is_pefts_registry() -> None:
    """A method that PEFT adds or drops fails here until the table follows."""
    from peft import PeftType

    assert sorted(method.peft_type for method in METHODS) == sorted(kind.value for kind in PeftType)


def test_mergeable_is_what_peft_defines_a_merge_for() -> None:
    """Methods without a merge in PEFT's layers are refused; all others are merged."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    layered = {
        kind.value
        for kind in PeftType
        if issubclass(PEFT_TYPE_TO_TUNER_MAPPING[kind], BaseTuner)
        and getattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "tuner_layer_cls", None) is not None
    }
    refused_though_layered = {"LILY", "POLY", "SHADOW"}
    mergeable = {method.peft_type for method in METHODS if method.way is not Way.NONE}
    assert mergeable == layered - refused_though_layered


def test_the_documentation_is_the_table() -> None:
    """docs/methods.md is `python -m merge_adapter.methods.table docs/methods.md`."""
    assert DOCS.read_text(encoding="utf-8") == document()


def test_prefixes_are_pefts() -> None:
    """The prefixes by which tensors are told from base parameters cover PEFT's own."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        method = find_method(kind.value)
        assert method is not None
        if method.kind is not None:
            assert any(prefix.startswith(own) or own.startswith(prefix) for own in method.prefixes), kind


def test_the_table_imports_nothing_heavy() -> None:
    code = (
        "import sys, merge_adapter.methods.refuse\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.way is Way.NONE], ids=lambda m: m.peft_type
)
def test_unmergeable_methods_say_why_and_what_to_do(method: Any) -> None:
    with pytest.raises(MethodError) as caught:
        check_method({"peft_type": method.peft_type})
    assert caught.value.exit_code is ExitCode.UNMERGEABLE
    assert method.note in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"peft_type": "LORA", "alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"peft_type": "LORA", "arrow_config": {"top_k": 1}}, "Arrow"),
        ({"peft_type": "LORA", "use_qalora": True}, "QALoRA"),
        ({"peft_type": "NOBODY_KNOWS"}, "NOBODY_KNOWS"),
        ({"config": {"non_linearity": "relu", "reduction_factor": 16}}, "AdapterHub"),
        ({"adapter_layers": 30, "adapter_len": 10}, "LLaMA-Adapter"),
        ({"r": 8}, "peft_type"),
        ({"peft_type": 7}, "peft_type"),
    ],
)  # fmt: skip
def test_variants_and_foreign_adapters_are_refused_by_name(config: dict[str, Any], word: str) -> None:
    with pytest.raises(MethodError, match=word) as caught:
        check_method(config)
    assert caught.value.hint


def test_plain_lora_is_accepted() -> None:
    assert check_method({"peft_type": "lora", "use_qalora": False, "layer_replication": None}).way is Way.ROWS
