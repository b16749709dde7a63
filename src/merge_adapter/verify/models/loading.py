"""Base, base + adapter and merged model as transformers and PEFT themselves load them.

Nothing here knows how names on the disk map to modules: transformers decides that for base and merged alike, and
PEFT decides where an adapter goes. The gate compares what they made of the files.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from merge_adapter.errors import (
    BaseModelError,
    MalformedError,
    MethodError,
    ran_out_of_memory,
)
from merge_adapter.methods.patterns import check_patterns
from merge_adapter.types import Repository, Resolved
from merge_adapter.verify.models.adapters import PREFIX, AdapterFile, peft_config, peft_folder
from merge_adapter.verify.models.kinds import AUTO_CLASS, HEADED, HEADS, Kind, trained_on
from merge_adapter.verify.models.storage import Checkpoint, Layout, layout, local_layout, same_bytes
from merge_adapter.verify.models.weighted import activate
from merge_adapter.verify.rounding import is_narrower

LONGEST_CAUSE = 400
"""Letters of a library's own message that are passed on."""


@dataclass
class Loaded:
    """A model with what its loading said."""

    model: Any
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    """Warnings raised on the way, as text."""


def base_layout(repository: Repository) -> Layout:
    """Which weight files the base loads from."""
    return layout(repository.files, lambda name: repository.read(name))


def base_folder(repository: Repository, weights: Layout) -> Path:
    """A local folder with the base's configs, code, tokenizer and the weights in use, and no other weights."""
    heavy = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")
    wanted = set(weights.files) | ({weights.index} if weights.index else set())
    wanted |= {path for path in repository.files if not path.endswith(heavy) and not path.startswith(".")}
    return repository.folder(sorted(wanted))


def _dtypes_to_load_in(held: Checkpoint) -> tuple[torch.dtype, ...]:
    """The one in use; of several first the only one in 16 bit, which keeps the others' bulk mapped, then the widest."""
    widest = held.widest_float
    short = [dtype for dtype in held.float_dtypes if dtype in (torch.bfloat16, torch.float16)]
    return tuple(dict.fromkeys((*short, widest))) if len(short) == 1 else (widest,)


def _as_stored(model: nn.Module, held: Checkpoint) -> set[str]:
    """Give each tensor of `model` the dtype that it has in its files; returns the names in the files that were found.

    transformers loads a model in one dtype, and some of its modules in fp32 whatever the files hold. What a tensor may
    err follows from the dtype it is stored in, so each is judged in that. A tensor that is made of several others goes
    by no name of the files, and stays as it was loaded.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = set()
    # ties stay ties: the data of a parameter is exchanged, not the parameter
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for known in (name, f"{prefix}{name}", name.removeprefix(prefix)):
            stored = held.tensors.get(known)
            if stored is None or stored.shape != tuple(tensor.shape):
                continue
            found.add(known)
            if tensor.is_floating_point() and stored.torch_dtype not in (None, tensor.dtype):
                own = held[known]
                if own.is_floating_point() and same_bytes(own.to(tensor.dtype), tensor.detach()):
                    tensor.data = own
            break
    return found


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Keep what the libraries would print, their progress bars and warnings, off the terminal; collect the warnings."""
    from transformers.utils import logging

    said: list[str] = []
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    said.extend(dict.fromkeys(str(entry.message) for entry in caught))


def load_model(
    folder: Path,
    kind: Kind,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    config_changes: Mapping[str, Any] | None = None,
    architecture: str = "",
) -> Loaded:
    """The model in `folder` as plain transformers loads it for `kind`, on the CPU, weights mapped from the disk.

    `architecture`: the class, where the kind does not tell it; "" for the one that the folder's config names. `dtype`
    None leaves each tensor in the dtype it is stored in. Heads the folder does not hold are made anew, and listed as
    missing. Raises BaseModelError when transformers cannot load it at all, NotFoundError or MalformedError
    for weights that cannot be read.
    """
    if dtype is not None:
        return _loaded(folder, kind, dtype, trust_remote_code, config_changes, architecture)
    with Checkpoint(folder, local_layout(folder).files) as held:
        for dtype in _dtypes_to_load_in(held):
            loaded = _loaded(folder, kind, dtype, trust_remote_code, config_changes, architecture)
            known = _as_stored(loaded.model, held) | set(loaded.unexpected)
            wider = {name for name, one in held.tensors.items() if _is_cut(one.torch_dtype, dtype)}
            if wider <= known:
                break  # else one of them goes by another name, and has lost digits
    return loaded


def _is_cut(stored: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Whether loading in `dtype` takes digits from what is stored."""
    return stored is not None and stored.is_floating_point and is_narrower(dtype, stored)


def _loaded(
    folder: Path,
    kind: Kind,
    dtype: torch.dtype,
    trust_remote_code: bool,  # noqa: FBT001 - handed on
    config_changes: Mapping[str, Any] | None,
    architecture: str,
) -> Loaded:
    """The model with every tensor in `dtype`, but for those that transformers keeps in fp32."""
    import transformers

    changes = dict(config_changes or {})
    # heads made anew come from torch's generator: a fixed seed makes the base arm the same in every run
    with recorded() as said, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            for key, value in changes.items():
                setattr(config, key, value)
            model, info = _class(config, kind, architecture).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError) as error:
            if ran_out_of_memory(error):
                raise  # it says nothing of the model
            raise BaseModelError(
                f"transformers cannot load {folder.name} as {AUTO_CLASS.get(kind, architecture or 'its own class')}: "
                f"{one_line(error)}"
            ) from error
    model.eval()
    errors = info.get("error_msgs") or []
    if isinstance(errors, str):
        errors = [errors]
    return Loaded(
        model,
        missing=tuple(sorted(map(str, info.get("missing_keys", ())))),
        unexpected=tuple(sorted(map(str, info.get("unexpected_keys", ())))),
        mismatched=tuple(sorted(_first(entry) for entry in info.get("mismatched_keys", ()))),
        errors=tuple(map(str, errors)),
        said=tuple(said),
    )


def _class(config: Any, kind: Kind, architecture: str) -> Any:
    """The class of transformers to load for `kind`.

    AutoModel takes a checkpoint with the encoder of an encoder-decoder alone for one with both.
    """
    import transformers

    [own, *_] = config.architectures or [""]
    if kind is Kind.OTHER:
        return getattr(transformers, architecture or own)
    encoder = own if kind is Kind.EMBEDDING and own.endswith("EncoderModel") else ""
    return getattr(transformers, encoder, None) or getattr(transformers, AUTO_CLASS[kind])


def one_line(error: BaseException) -> str:
    """What went wrong, its first cause included, on one line of bounded length."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    texts = [" ".join(str(one).split()) or type(one).__name__ for one in causes]
    shown = texts[0] if texts[-1] in texts[0] else f"{texts[0]} ({texts[-1]})"
    return shown if len(shown) <= LONGEST_CAUSE else f"{shown[: LONGEST_CAUSE - 1]}…"


def _first(entry: Any) -> str:
    return str(entry[0]) if isinstance(entry, tuple | list) else str(entry)


def labels_of(adapters: tuple[AdapterFile, ...], kind: Kind) -> int | None:
    """The number of labels of a head that the adapters carry; None when they carry none."""
    for file in adapters if kind in HEADED else ():
        for head in HEADS:
            for key in (f"{PREFIX}{head}.weight", f"{PREFIX}{head}.modules_to_save.weight"):
                tensor = file.tensors.get(key)
                if tensor is not None and tensor.ndim > 1:
                    return int(tensor.shape[0])
    return None


def load_base(
    folder: Path,
    kind: Kind,
    adapters: tuple[AdapterFile, ...],
    *,
    trust_remote_code: bool,
) -> Loaded:
    """The base with its head and vocabulary sized as the adapters need them."""
    labels = labels_of(adapters, kind)
    changes = {"num_labels": labels} if labels is not None else None
    architecture = next((name for file in adapters if (name := trained_on(file.adapter.config))), "")
    base = load_model(
        folder,
        kind,
        trust_remote_code=trust_remote_code,
        config_changes=changes,
        architecture=architecture,
    )
    _fit_vocabulary(base.model, adapters)
    return base


def stack_layers(model: Any, sources: Resolved) -> None:
    """Replicate the layers of a plain base as PEFT does for an adapter with `layer_replication`; nothing for others."""
    from peft.tuners.tuners_utils import replicate_layers

    for adapter in sources.adapters:
        if adapter.method == "LORA" and adapter.config.get("layer_replication"):
            replicate_layers(model, adapter.config["layer_replication"])


def _fit_vocabulary(model: Any, adapters: tuple[AdapterFile, ...]) -> None:
    """Give the embeddings the number of rows of an embedding or a head that an adapter carries whole."""
    try:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
    except (AttributeError, NotImplementedError):
        return  # what hears or sees has none
    rows = {
        name: len(module.weight)
        for name, module in model.named_modules()
        if any(module is end for end in ends) and getattr(module, "weight", None) is not None
    }
    for file in adapters:
        for name, count in rows.items():
            for leaf in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
                tensor = file.module(name, leaf)
                if tensor is not None and tensor.ndim == 2 and len(tensor) != count:
                    model.resize_token_embeddings(len(tensor), mean_resizing=False)
                    return


def adapt(base: Any, sources: Resolved, files: tuple[AdapterFile, ...]) -> Loaded:
    """PEFT's own model over `base`, every adapter active, unmerged. `base` is changed in place.

    Raises MethodError when PEFT refuses the adapter, MalformedError for patterns that would never end.
    """
    from peft import PeftModel

    paths = [path for path, _ in base.named_modules()]
    for file in files:
        check_patterns(
            file.adapter.config, paths
        )  # PEFT matches them on every module, however long that takes
    names = tuple("default" if not at else f"adapter_{at}" for at in range(len(files)))
    missing: list[str] = []
    unexpected: list[str] = []
    with recorded() as said, ExitStack() as stack:
        try:
            model: Any = None
            for name, file in zip(names, files, strict=True):
                place = Path(stack.enter_context(TemporaryDirectory(prefix="merge-adapter-adapter-")))
                folder, config = peft_folder(file, place), peft_config(file, sources.base)
                if model is None:
                    model = PeftModel.from_pretrained(
                        base, folder, adapter_name=name, torch_device="cpu", config=config
                    )
                else:
                    model.add_adapter(name, config)
                # loading by name once more returns what from_pretrained keeps to itself: the keys that matched nothing
                result = model.load_adapter(folder, adapter_name=name, torch_device="cpu")
                missing += _untold(model, set(map(str, result.missing_keys)))
                unexpected += map(str, result.unexpected_keys)
            activate(model, names, sources)
        except (
            ValueError,
            RuntimeError,
            LookupError,
            TypeError,
            AttributeError,
            NotImplementedError,
            ImportError,
            OSError,
        ) as error:
            if ran_out_of_memory(error):
                raise
            foreign = any(words in str(error) for words in ("size mismatch", "not found in the base model"))
            hint = "Its modules belong to another base: name the one it was trained on." if foreign else ""
            raise MethodError(
                f"PEFT cannot put this adapter on its base: {one_line(error)}", hint=hint
            ) from error
    model.eval()
    return Loaded(model, missing=tuple(missing), unexpected=tuple(unexpected), said=tuple(said))


def _untold(model: nn.Module, missing: Set[str]) -> list[str]:
    """Those of `missing` that are no second name of a tensor that was there, as VB-LoRA's layers have for one bank."""
    if not missing:
        return []
    held = model.state_dict()
    told = {tensor.data_ptr() for name, tensor in held.items() if name not in missing}
    return sorted(name for name in missing if name not in held or held[name].data_ptr() not in told)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises MalformedError when it holds anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MalformedError(f"{path.name} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedError(f"{path.name} holds no JSON object")
    return document


def inner(model: Any) -> nn.Module:
    """The transformers model inside a PEFT model, its adapted layers still in place."""
    module = model.base_model.model
    assert isinstance(module, nn.Module)
    return module
