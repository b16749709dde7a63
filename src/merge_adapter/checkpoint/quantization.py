"""What config.json says about how a base is stored quantised: found, named for people, judged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_DEQUANTIZED = (
    "bitsandbytes",
    "fp8",
    "finegrained_fp8",
    "mxfp8",
    "fbgemm_fp8",
    "compressed-tensors",
    "mxfp4",
)
_COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)
_WHY: Mapping[str, str] = {
    "gptq": "GPTQ packs and reorders weights by the rules of its kernels, which do not run here",
    "awq": "AWQ packs and reorders weights by the rules of its kernels, which do not run here",
    "auto-round": "AutoRound packs weights by the rules of its kernels, which do not run here",
    "aqlm": "AQLM stores sums of codebook entries, which its kernels alone read",
}


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation a config.json states, of the model or of its language part; None where it states none.

    A statement that is not an object counts as one that names no method.
    """
    for part in (config, config.get("text_config")):
        stated = part.get("quantization_config") if isinstance(part, Mapping) else None
        if stated:
            return stated if isinstance(stated, Mapping) else {}
    return None


def used_method(quantization: Mapping[str, Any]) -> str:
    """The name of the method, "" where there is none that could be one. Untrusted."""
    stated = quantization.get("quant_method")
    if stated is None and ("load_in_4bit" in quantization or "load_in_8bit" in quantization):
        return "bitsandbytes"
    return stated if isinstance(stated, str) and _NAME.fullmatch(stated) else ""


def described(quantization: Mapping[str, Any]) -> str:
    """The quantisation in a few words: `bitsandbytes, 4 bit nf4`."""
    method = used_method(quantization)
    detail = ""
    if method == "bitsandbytes":
        kind = quantization.get("bnb_4bit_quant_type")
        four = f"4 bit {kind}" if kind in ("nf4", "fp4") else "4 bit"
        detail = four if quantization.get("load_in_4bit") else "8 bit"
    elif method == "compressed-tensors":
        stated = quantization.get("format")
        detail = stated if isinstance(stated, str) and _NAME.fullmatch(stated) else ""
    return f"{method}, {detail}" if detail else method or "a method without a name"


def refusal(quantization: Mapping[str, Any]) -> str:
    """Why weights stored so are not dequantised here, one clause; "" when they are."""
    method = used_method(quantization)
    if method not in _DEQUANTIZED:
        return _WHY.get(
            method, f"it is stored by {method or 'a method without a name'}, which is not read here"
        )
    if method == "compressed-tensors":
        stated = quantization.get("format", "dense")
        if stated not in _COMPRESSED_FORMATS:
            return f"the format {stated!r:.60} of compressed-tensors is not read here"
        sparsity = quantization.get("sparsity_config")
        kind = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else "dense"
        if kind != "dense":
            return f"its weights are sparse too ({kind!r:.60}), which is not read here"
    return ""
