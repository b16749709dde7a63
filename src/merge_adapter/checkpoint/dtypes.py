"""Dtype codes of the safetensors format and torch's dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from merge_adapter.errors import MalformedError
from merge_adapter.types import DType

if TYPE_CHECKING:
    import torch

CODES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""Code -> name in torch. The packed 4 and 6 bit codes have none."""

TARGETS: Mapping[DType, str] = {DType.FLOAT32: "F32", DType.BFLOAT16: "BF16", DType.FLOAT16: "F16"}
"""The codes of the dtypes a user can ask for."""


@cache
def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a code. Raises MalformedError where torch has none."""
    import torch

    name = CODES.get(code)
    found = getattr(torch, name, None) if name else None
    if not isinstance(found, torch.dtype):
        raise MalformedError(
            f"torch {torch.__version__} has no dtype for {code}.", hint="Merge into a base in 16 or 32 bit."
        )
    return found


@cache
def code_of(dtype: torch.dtype) -> str:
    """The code of a torch dtype. Raises MalformedError where the format has none."""
    import torch

    for code, name in CODES.items():
        if getattr(torch, name, None) is dtype:
            return code
    raise MalformedError(f"safetensors has no code for {dtype}.", hint="Merge into a base in 16 or 32 bit.")
