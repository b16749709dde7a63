"""A base stored quantised, as the library of its format dequantises it.

transformers loads the base and has bitsandbytes, compressed-tensors or its own code turn it into 16 bit; the result
is saved once, and the gate goes on with it as with any base. FP8 that no library reads on a CPU (FBGEMM's, and blocks
that do not divide their weights) is dequantised here by the format's definition. Nothing is shared with the code
that dequantises while merging, so that an error there is a difference here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from merge_adapter.errors import BaseModelError, InputError, StorageError
from merge_adapter.verify.models.kinds import AUTO_CLASS, Kind
from merge_adapter.verify.models.loading import recorded
from merge_adapter.verify.models.storage import Checkpoint, local_layout

_KEY = "quantization_config"
_PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}
"""Method -> the module it needs. FP8 and MXFP4 are dequantised by transformers itself."""
_LEFT_OUT = ("input_scale_ub", "input_scale", "activation_scale")
"""Tensors that only say how to run a quantised weight."""


def stated(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How a config.json says that the model, or its language part, is quantised; None when it does not."""
    for part in (config, config.get("text_config")):
        found = part.get(_KEY) if isinstance(part, Mapping) else None
        if found:
            return found if isinstance(found, Mapping) else {}
    return None


def check_library(config: Mapping[str, Any]) -> None:
    """Raise InputError when judging a base of this config needs a library that is not installed."""
    quantization = stated(config)
    method = _method(quantization) if quantization is not None else ""
    package = _PACKAGES.get(method)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(
            f"the base is stored quantised by {method}, and {package} is not installed: no merge could be verified",
            hint="Install it: pip install 'merge-adapter[quantized]'. Or merge unverified with --no-verify.",
        )


def dequantized_folder(base: Path, place: Path, kind: Kind, *, trust_remote_code: bool) -> Path:
    """Write the model in `base` as a plain 16-bit checkpoint into the empty folder `place`, and return that.

    Holds the whole 16-bit model in memory while it writes. Raises BaseModelError when the libraries cannot, and
    StorageError when the disk cannot.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    try:
        suffix = _by_definition(base, config)
        if suffix:
            write_scaled(base, place, suffix, config)
        else:
            _write_loaded(base, place, config, kind, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, ImportError) as error:
        raise BaseModelError(
            f"transformers cannot dequantise the base, so that nothing could be compared with it: {error}",
            hint="Name the 16-bit original with --base-model, or merge into it with --quantized-base original.",
        ) from error
    plain = {key: value for key, value in config.items() if key != _KEY}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in plain["text_config"].items() if key != _KEY}
    (place / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    for code in base.rglob("*.py") if trust_remote_code else ():
        target = place / code.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(code, target)
    return place


@contextmanager
def _saving(place: Path) -> Iterator[None]:
    """Tell a disk that refuses from libraries that do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the 16-bit form of the base, which the gate compares with, cannot be written to {place.parent}: {error}",
            hint="It takes two bytes a weight. Free them there, or let TMPDIR name a folder on a larger disk.",
        ) from error


def _write_loaded(
    base: Path, place: Path, config: Mapping[str, Any], kind: Kind, *, trust_remote_code: bool
) -> None:
    with recorded(), torch.no_grad():
        model = _loaded(base, config, kind, trust_remote_code=trust_remote_code)
        # what it was converted with on the way in would quantise it again on the way out
        model._weight_conversions = None
        with _saving(place):
            model.save_pretrained(place)


def _loaded(base: Path, config: Mapping[str, Any], kind: Kind, *, trust_remote_code: bool) -> Any:
    import transformers
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import AutoQuantizationConfig

    quantization = stated(config) or {}
    bits = _method(quantization) == "bitsandbytes"
    asked: dict[str, Any] = {}
    if not bits:
        asked["quantization_config"] = AutoQuantizationConfig.from_dict(dict(quantization))
        asked["quantization_config"].dequantize = True
    model = _class_of(config, kind, transformers).from_pretrained(
        base,
        dtype="auto",
        device_map="cpu",
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        **asked,
    )
    if bits:
        # bitsandbytes holds these layers the other way round, and so they come out of it
        turned = [
            name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D
        ]
        coded = [
            name
            for name, module in model.named_modules()
            if hasattr(getattr(module, "weight", None), "quant_state")
        ]
        model = model.dequantize()
        for name in coded:
            # FP4 has a code for -0, which bitsandbytes reads as 0 or as -0, depending on the sizes of the weight
            model.get_submodule(name).weight.add_(0.0)
        for name in turned:
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False)
    elif hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _class_of(config: Mapping[str, Any], kind: Kind, transformers: Any) -> Any:
    """The class the checkpoint was saved from, so that no tensor of it is left out; else that of the task."""
    named = config.get("architectures")
    found = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    return found if hasattr(found, "from_pretrained") else getattr(transformers, AUTO_CLASS[kind])


def _method(quantization: Mapping[str, Any]) -> str:
    stated_method = quantization.get("quant_method")
    if stated_method is None and ("load_in_4bit" in quantization or "load_in_8bit" in quantization):
        return "bitsandbytes"
    return str(stated_method)


# ------------------------------------------------------------------------------------ FP8 by its definition


def _by_definition(base: Path, config: Mapping[str, Any]) -> str:
    """How the names of scales end in a checkpoint that transformers cannot dequantise; "" when it can."""
    quantization = stated(config) or {}
    method = _method(quantization)
    if method == "fbgemm_fp8":
        return "_scale"
    if method not in ("fp8", "mxfp8"):
        return ""
    tall, wide = quantization.get("weight_block_size") or (1, 1)
    with Checkpoint(base, local_layout(base).files) as held:
        for name, tensor in held.tensors.items():
            if f"{name}_scale_inv" in held and (tensor.shape[-2] % tall or tensor.shape[-1] % wide):
                return "_scale_inv"
    return ""


def write_scaled(base: Path, place: Path, suffix: str, config: Mapping[str, Any]) -> None:
    """Write `weight * scale` for every weight with scales beside it, file by file, in the dtype of the config."""
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    block = (stated(config) or {}).get("weight_block_size")
    files = local_layout(base)
    weight_map: dict[str, str] = {}
    total = 0
    with Checkpoint(base, files.files) as held:
        for file in files.files:
            tensors = {}
            for name in (name for name, tensor in held.tensors.items() if tensor.file == file):
                if name.endswith(_LEFT_OUT) or (name.endswith(suffix) and name.removesuffix(suffix) in held):
                    continue
                tensors[name] = held[name]
                if (scale := f"{name}{suffix}") in held:
                    tensors[name] = _product(tensors[name], held[scale], block).to(dtype)
            target = file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            with _saving(place):
                save_file(tensors, place / target, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, target)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if files.index is not None:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _product(weight: Tensor, scale: Tensor, block: Any) -> Tensor:
    """Each element times the scale of its block, fp32. Without a stated block the grid divides the weight evenly."""
    factors = scale.float() if scale.dtype is not torch.uint8 else torch.exp2(scale.double() - 127).float()
    if factors.numel() == 1:
        return weight.float() * factors.reshape(())
    rows, columns = weight.shape[-2:]
    if factors.ndim < 2:
        factors = factors[:, None]
    tall, wide = block or (rows // factors.shape[-2], columns // factors.shape[-1])
    factors = factors.index_select(-2, torch.arange(rows) // tall)
    return weight.float() * factors.index_select(-1, torch.arange(columns) // wide)
