"""PEFT's own model around a base of ghosts: which adapter tensor belongs to which module, and its layers."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from merge_adapter.errors import AccountingError, MethodError, ShapeError
from merge_adapter.methods.adapter_file import PREFIX
from merge_adapter.methods.change import TensorSpec, Weights
from merge_adapter.methods.peft_layers.ghost import Watch

ADAPTER = "default"
"""The adapter's name inside PEFT."""

_REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError, re.error)
"""What PEFT raises for a config that it cannot put on a model."""

_TRAINING_ONLY: Mapping[str, Any] = {
    "init_lora_weights": True,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "megatron_config": None,
}
"""Config keys that only say how training began, with values that read no file and import no module.

The factors come from the adapter's file; adapters that need a changed base are refused before this.
"""
_SIZES = (
    "r", "init_r", "target_r", "mini_r", "hybrid_r", "u", "num_vectors", "vector_length", "theta_d_length",
    "n_frequency", "block_size", "oft_block_size", "boft_block_size", "boft_block_num", "num_subspaces",
    "subspace_rank", "depth", "group_size", "gralora_k",
)  # fmt: skip
"""Config keys that size what PEFT allocates."""


@dataclass(frozen=True)
class Layer:
    """One adapted module: PEFT's layer, or several around one module, innermost first."""

    path: str
    layers: tuple[Any, ...]
    base: torch.nn.Module
    """The module of the base inside."""
    only: tuple[str, ...] | None = None
    """Parameters that the layers target by name (`target_parameters`); None for those of the method."""


@dataclass(frozen=True)
class Assigned:
    """The tensors of an adapter, each given to what it belongs to."""

    of_module: Mapping[str, tuple[str, ...]]
    """Module path -> adapter tensors."""
    shared: tuple[str, ...]
    """Adapter tensors that all modules use."""
    parameters: Mapping[str, tuple[str, ...]]
    """Parameter of the base model -> adapter tensor that takes its place, then others that say the same again."""


@dataclass(frozen=True)
class AdaptedModel:
    """PEFT's model with the adapter's layers in it, their values on the meta device until `load`."""

    peft: Any = field(repr=False)
    config: Any = field(repr=False)
    reads: frozenset[str]
    """Operations of the initialisation that read base weights."""

    def layers(self) -> tuple[Layer, ...]:
        """Every adapted module, in the model's order."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        found: list[Layer] = []
        inside = ""
        for path, module in self.peft.base_model.model.named_modules():
            if inside and path.startswith(inside):
                continue
            if isinstance(module, AuxiliaryTrainingWrapper):
                module = module.token_adapter
            if isinstance(module, BaseTunerLayer):
                inside = f"{path}."
                found.append(_layer(path, module))
        return tuple(found)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the layers the adapter's values, floating ones as float32."""
        from peft import set_peft_model_state_dict

        real = {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
        with quiet():
            set_peft_model_state_dict(self.peft, real, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        self.peft.eval()
        empty = [name for name, tensor in self._own_tensors() if tensor.is_meta]
        if empty:
            raise AccountingError(
                f"After loading, {len(empty)} tensors of PEFT's layers have no values: {', '.join(empty[:5])}.",
                tensors=tuple(empty),
                hint="The adapter's file is incomplete; save it again.",
            )

    def _own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in self.layers():
            inside = {id(tensor) for tensor in (*layer.base.parameters(), *layer.base.buffers())}
            for part in layer.layers:
                for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                    if id(tensor) not in inside:
                        yield f"{layer.path}.{name}", tensor


def adapt(
    model: torch.nn.Module, config: Mapping[str, Any], *, only: str | None = None, weight: float = 1.0
) -> AdaptedModel:
    """Build PEFT's layers into `model`, without values for their parameters.

    `only` restricts them to the one module of that path, whose weight is then real. `weight` multiplies the scale of
    every layer, which the method must have. `model` is changed. Raises MethodError with PEFT's reason when it refuses.
    """
    from peft import PeftModel

    parsed = parse_config(config)
    watch = Watch(model)
    with quiet(), watch:
        try:
            _fix_targets(parsed, model, only)
            # Values of the adapter's parameters come from its file; buffers are made here, for real.
            made = PeftModel(model, parsed, adapter_name=ADAPTER, low_cpu_mem_usage=only is None)
        except _REFUSALS as error:
            raise MethodError(
                f"PEFT cannot put this {config.get('peft_type')} adapter on its base:"
                f" {type(error).__name__}: {error}",
                hint="Check that the base is the one the adapter was trained on.",
            ) from error
    made.eval()
    adapted = AdaptedModel(made, parsed, frozenset(watch.reads))
    if weight != 1.0:
        for layer in adapted.layers():
            for part in layer.layers:
                part.scaling[ADAPTER] *= weight
    return adapted


def parse_config(config: Mapping[str, Any]) -> Any:
    """adapter_config.json as PEFT's config object, for merging; keys it does not know are left out."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(str(config["peft_type"]).upper())]
    known = {entry.name for entry in dataclasses.fields(made) if entry.init}
    values = {key: value for key, value in config.items() if key in known and key != "peft_type"}
    values |= {
        "inference_mode": True,
        "base_model_name_or_path": None,
        "revision": None,
        "auto_mapping": None,
    }
    values |= {key: value for key, value in _TRAINING_ONLY.items() if key in known}
    try:
        with quiet():
            return made(**values)
    except (TypeError, ValueError) as error:
        raise MethodError(
            f"PEFT does not accept adapter_config.json: {error}",
            hint="Restore the config that PEFT saved with the adapter.",
        ) from error


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
    """Raise ShapeError for a config that asks PEFT to allocate more than the adapter's file can fill."""
    elements = sum(spec.elements for spec in tensors.values())
    for key in _SIZES:
        value = config.get(key)
        if isinstance(value, int) and value > elements:
            raise ShapeError(
                f"adapter_config.json: {key} is {value}, the adapter's file holds {elements} numbers in all.",
                hint="The config belongs to another adapter or was changed; restore it.",
            )


def assign(
    adapted: AdaptedModel,
    tensors: Mapping[str, TensorSpec],
    parameters: Collection[str],
    *,
    shapes_known: bool = True,
) -> Assigned:
    """Give every adapter tensor to a module, to all of them, or to a parameter of the base that it replaces.

    `parameters` are the names of the base model's. `shapes_known` False where shapes depend on weights; PEFT
    then compares them when it loads. Raises AccountingError for tensors left over or missing, ShapeError for
    tensors of another shape than PEFT's layers have.
    """
    expected = _saved_form(adapted, parameters)
    replaced: dict[str, tuple[str, ...]] = {}
    own = {}
    for name, spec in tensors.items():
        parameter = _parameter_name(name)
        if parameter in parameters:
            replaced[parameter] = tuple(sorted((*replaced.get(parameter, ()), name), key=_depth))
        else:
            own[name] = spec
    converted = _as_loaded(adapted, own)
    _check_complete(expected, converted, own)
    if shapes_known:
        _check_shapes(expected, converted)
    paths = sorted((layer.path for layer in adapted.layers()), key=len, reverse=True)
    of_module: dict[str, list[str]] = {}
    shared = []
    for name in own:
        owner = _owner(name, paths)
        if owner is None:
            shared.append(name)
        else:
            of_module.setdefault(owner, []).append(name)
    return Assigned({path: tuple(names) for path, names in of_module.items()}, tuple(shared), replaced)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back PEFT's advice to people who train; what matters for a merge is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_all(adapter: Weights, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those tensors of an adapter, in their own dtypes."""
    return {name: adapter.read(name) for name in names}


def _layer(path: str, outer: Any) -> Layer:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [outer]
    while isinstance(layers[-1].base_layer, BaseTunerLayer):
        layers.append(layers[-1].base_layer)
    layers.reverse()
    named = tuple(layer.parameter_name for layer in layers if isinstance(layer, ParamWrapper))
    return Layer(path, tuple(layers), layers[0].base_layer, named or None)


def _fix_targets(config: Any, model: torch.nn.Module, only: str | None) -> None:
    """Name the target modules one by one, as PEFT's own rule finds them, and keep `modules_to_save` away.

    PEFT would copy the modules to save, weights and all; their tensors replace base tensors and need no layer.
    """
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    if only is not None:
        config.target_modules, config.modules_to_save = [only], None
        for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if hasattr(config, key):
                setattr(config, key, None)
        return
    if not getattr(config, "modules_to_save", None):
        return
    if config.target_modules:
        _maybe_include_all_linear_layers(config, model)
        config.target_modules = [name for name, _ in model.named_modules() if name and _matches(config, name)]
        for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if hasattr(config, key):
                setattr(config, key, None)
    config.modules_to_save = None


def _matches(config: Any, name: str) -> bool:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    found = check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


def _saved_form(adapted: AdaptedModel, parameters: Collection[str]) -> dict[str, tuple[int, ...]]:
    """What PEFT would save of this model, apart from parameters of the base: name -> shape."""
    from peft import get_peft_model_state_dict

    with quiet():
        state = get_peft_model_state_dict(adapted.peft, adapter_name=ADAPTER, save_embedding_layers=False)
    return {
        name: tuple(value.shape) for name, value in state.items() if _parameter_name(name) not in parameters
    }


def _parameter_name(name: str) -> str:
    """The base parameter that an adapter tensor of this name would replace."""
    parts = name.removeprefix(PREFIX).split(".")
    return ".".join(
        part for part in parts if part not in ("base_layer", "modules_to_save", "original_module")
    )


def _depth(name: str) -> tuple[bool, int]:
    """What PEFT reads comes first: the trained tensor, outside its wrapper, before the frozen original."""
    return ".original_module." in name, name.count(".")


def _as_loaded(adapted: AdaptedModel, own: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The adapter's names and shapes after PEFT's conversion of adapters from transformers 4."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    empty = {name: torch.empty(spec.shape, device="meta") for name, spec in own.items()}
    with quiet():
        made = convert_peft_adapter_state_dict_for_transformers(
            model=adapted.peft, peft_config=adapted.config, adapter_state_dict=empty, adapter_name=ADAPTER
        )
    return {name: tuple(value.shape) for name, value in made.items()}


def _check_complete(
    expected: Mapping[str, tuple[int, ...]],
    got: Mapping[str, tuple[int, ...]],
    own: Mapping[str, TensorSpec],
) -> None:
    missing = sorted(set(expected) - set(got))
    unknown = sorted(set(got) - set(expected))
    if unknown:
        raise AccountingError(
            f"{len(unknown)} adapter tensors have no module to change: {', '.join(unknown[:5])}.",
            tensors=tuple(name for name in own if name in unknown) or tuple(unknown),
            hint="The adapter was trained on another architecture; name its base with --base-model.",
        )
    if missing:
        raise AccountingError(
            f"{len(missing)} tensors that PEFT expects for adapter_config.json are not in the adapter's file:"
            f" {', '.join(missing[:5])}.",
            tensors=tuple(missing),
            hint="The config belongs to another adapter or the file was cut; save the adapter again.",
        )


def _check_shapes(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in got.items():
        if expected[name] != shape:
            raise ShapeError(
                f"{name}: expected {list(expected[name])} by adapter_config.json and the base, got {list(shape)}.",
                hint="The adapter was trained on another base, see --base-model, or its config was changed. Where the"
                " vocabulary was resized in training, LoRA alone is merged on its rows, by streaming.",
            )


def _owner(name: str, paths: list[str]) -> str | None:
    """The adapted module with the longest common path, or None when the tensor lies beside all modules."""
    path = name.removeprefix(PREFIX)
    for candidate in paths:
        if path.startswith(f"{candidate}."):
            return candidate
    parts = path.split(".")
    best = max(paths, key=lambda candidate: _common(candidate.split("."), parts), default=None)
    # An adapter of transformers 4 names experts that are inside one module now: layer and block must agree.
    return best if best is not None and _common(best.split("."), parts) >= 4 else None


def _common(left: list[str], right: list[str]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
