"""Every method of PEFT and how it is merged. docs/methods.md is generated from this table.

A test compares it with PEFT's own registry: a method that PEFT adds fails there until it is entered here.
Imports nothing of PEFT, so that a plan can look a method up without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from merge_adapter.methods.change import Kind


class Way(StrEnum):
    """How a method is merged; the values are the words of the documentation."""

    ROWS = "streamed in closed form, row block by row block"
    LAYER = "streamed through PEFT's layer, module by module"
    ALONE = "streamed through PEFT's layer, which is initialised from each module's weight"
    MEMORY = "in memory, PEFT's merge on the loaded model"
    NONE = "not mergeable"


@dataclass(frozen=True)
class Method:
    """One peft_type."""

    peft_type: str
    title: str
    way: Way
    kind: Kind | None
    """What it does to a weight; None when nothing."""
    prefixes: tuple[str, ...] = ()
    """How the names of its own tensors begin, after the module's path."""
    note: str = ""
    """Why it is not mergeable or not streamed, or a limit; one or two sentences."""
    unless: tuple[tuple[str, Any, Way], ...] = ()
    """`(config key, value, way)`: with that value the method goes another way."""
    writes: tuple[str, ...] = ("weight",)
    """Parameters of an adapted module that it can change; those that a module lacks aside."""
    reads_weights: bool = False
    """Whether PEFT's initialisation reads base weights although the saved tensors then replace what it made."""
    scaled: bool = False
    """Whether PEFT's layer multiplies the whole update by a scale, so that PEFT too can give it a weight."""

    def way_for(self, config: Mapping[str, Any]) -> Way:
        """The way for one adapter_config.json."""
        for key, value, way in self.unless:
            if config.get(key) == value:
                return way
        return self.way


_KEEP = "Keep the adapter and load it with PEFT beside its base."

_ADD, _MUL, _SET = Kind.ADDITIVE, Kind.MULTIPLICATIVE, Kind.REPLACE

METHODS: tuple[Method, ...] = (
    Method("LORA", "LoRA (rsLoRA, lora_bias, patterns)", Way.ROWS, _ADD, ("lora_",), "DoRA is multiplicative.",
           reads_weights=True, scaled=True),
    Method("ADALORA", "AdaLoRA", Way.LAYER, _ADD, ("lora_", "ranknum"), scaled=True),
    Method("ADAMSS", "AdaMSS", Way.ALONE, _MUL, ("adamss_",), writes=("weight", "bias")),
    Method("BEFT", "BEFT", Way.LAYER, _ADD, ("beft_",), "Changes biases only; each target needs one.",
           writes=("bias",)),
    Method("BOFT", "BOFT", Way.LAYER, _MUL, ("boft_",)),
    Method("C3A", "C3A", Way.LAYER, _ADD, ("c3a_",)),
    Method("DEFT", "DEFT", Way.LAYER, _MUL, ("deft_",), reads_weights=True),
    Method("DELORA", "DeLoRA", Way.LAYER, _ADD, ("delora_",), reads_weights=True),
    Method("FOURIERFT", "FourierFT", Way.LAYER, _ADD, ("fourierft_",)),
    Method("FROD", "FRoD", Way.MEMORY, _MUL, ("frod_",),
           "Its initialisation decomposes the weights of all layers together."),
    Method("GLORA", "GLoRA", Way.LAYER, _MUL, ("glora_",), writes=("weight", "bias")),
    Method("GRALORA", "GraLoRA", Way.LAYER, _ADD, ("gralora_",), scaled=True),
    Method("HIRA", "HiRA", Way.LAYER, _MUL, ("hira_",)),
    Method("HRA", "HRA", Way.LAYER, _MUL, ("hra_",)),
    Method("IA3", "IA3", Way.LAYER, _MUL, ("ia3_",), writes=("weight", "bias")),
    Method("LN_TUNING", "LN tuning", Way.LAYER, _SET, ("ln_tuning_",), reads_weights=True, writes=("weight", "bias")),
    Method("LOHA", "LoHa", Way.LAYER, _ADD, ("hada_",), scaled=True),
    Method("LOKR", "LoKr", Way.LAYER, _ADD, ("lokr_",), scaled=True),
    Method("MISS", "MiSS", Way.LAYER, _ADD, ("miss_",), "With init_weights=bat it is multiplicative."),
    Method("OFT", "OFT", Way.LAYER, _MUL, ("oft_",)),
    Method("OSF", "OSF", Way.ALONE, _MUL, ("osf_",)),
    Method("PEANUT", "PEANuT", Way.LAYER, _MUL, ("peanut_",)),
    Method("PSOFT", "PSOFT", Way.ALONE, _MUL, ("psoft_",)),
    Method("PVERA", "PVeRA", Way.LAYER, _ADD, ("pvera_",)),
    Method("RANDLORA", "RandLoRA", Way.LAYER, _ADD, ("randlora_",), scaled=True),
    Method("ROAD", "RoAd", Way.LAYER, _MUL, ("road_",), writes=("weight", "bias")),
    Method("SHIRA", "SHiRA", Way.LAYER, _ADD, ("shira_",), scaled=True),
    Method("SUPERTUNING", "Supertuning", Way.LAYER, _ADD, ("supertuning_",), reads_weights=True,
           unless=(("save_precomputed_indices", False, Way.ALONE),)),
    Method("TINYLORA", "TinyLoRA", Way.LAYER, _ADD, ("tinylora_",), reads_weights=True),
    Method("TRAINABLE_TOKENS", "Trainable tokens", Way.LAYER, _SET, ("trainable_tokens_",), reads_weights=True),
    Method("UNILORA", "UniLoRA", Way.LAYER, _ADD, ("unilora_",)),
    Method("VBLORA", "VB-LoRA", Way.LAYER, _ADD, ("vblora_",)),
    Method("VERA", "VeRA", Way.LAYER, _ADD, ("vera_",)),
    Method("WAVEFT", "WaveFT", Way.LAYER, _ADD, ("waveft_",)),
    Method("ADAPTION_PROMPT", "Adaption prompt (LLaMA-Adapter)", Way.NONE, None, (),
           "It adds gated attention over learned prompts inside the layers, which no weight of the base can hold."),
    Method("CARTRIDGE", "Cartridge", Way.NONE, None, (),
           "It is a trained key-value cache: an input to attention, not a weight."),
    Method("CPT", "CPT", Way.NONE, None, (), "It is a learned prompt: an input to the model, not a weight."),
    Method("LILY", "Lily", Way.NONE, None, ("lily_",),
           "A router mixes its factors anew for every token, so no fixed weight equals it."),
    Method("MULTITASK_PROMPT_TUNING", "Multitask prompt tuning", Way.NONE, None, (),
           "It is a learned prompt: an input to the model, not a weight."),
    Method("POLY", "Poly", Way.NONE, None, ("poly_",),
           "Each input chooses its mixture of skills through task ids, so no fixed weight equals it."),
    Method("PREFIX_TUNING", "Prefix tuning", Way.NONE, None, (),
           "It is a learned key-value prefix of every layer: an input to attention, not a weight."),
    Method("PROMPT_TUNING", "Prompt tuning", Way.NONE, None, (),
           "It is a learned prompt: an input to the model, not a weight. On a causal language model"
           " `--soft-prompt tokens` makes it rows of the vocabulary."),
    Method("P_TUNING", "P-tuning", Way.NONE, None, (),
           "It is a learned prompt: an input to the model, not a weight. On a causal language model"
           " `--soft-prompt tokens` makes it rows of the vocabulary."),
    Method("SHADOW", "ShadowPEFT", Way.NONE, None, ("shadow_",),
           "It runs a second small model beside the base, which no weight of the base can hold."),
    Method("XLORA", "X-LoRA", Way.NONE, None, (),
           "A classifier mixes its LoRAs anew for every token, so no fixed weight equals it; PEFT's own"
           " merge_and_unload returns the base unchanged. Merge one of the LoRAs that it mixes instead."),
)  # fmt: skip
"""Mergeable methods first, each part in alphabetical order."""

_AROUND = """\
LoRA on torch's `MultiheadAttention` changes both of its weights, as PEFT's layer does. LoRAs that began with PiSSA,
OLoRA, CorDA, LoRA-GA or LoftQ and were saved *converted* are plain LoRAs. Saved unconverted they fit the base as it was
changed at the start: give that one with `--base-model`. A base that still holds what PiSSA takes out is recognised.

`layer_replication` gives a deeper model: every replica gets weights of its own, and `config.json` the new number of
layers. PEFT's own merge adds each replica's update to all of them. It is refused where the family's layers are not all
of one kind, since no `config.json` describes such a stack.

A few models cannot be streamed whatever the method: those whose tensors transformers converts on loading, by an
operation that it cannot undo. The base is then loaded with transformers, the strategy is `memory`, and the tensors in
question are stored under the names they have in memory, which transformers loads as well. Plan and report say so.

Tensors may have other names than PEFT writes: a prefix doubled or missing, parts that FSDP, DeepSpeed, torch.compile or
the adapter's own name add, modules where transformers 4 had them. They are read so when exactly one reading uses every
tensor, and the report says it. What `adapter_config.json` says was trained and the file lacks is refused, and so are
factors of modules that it does not target: PEFT would load the adapter without them.
""".splitlines()

_REFUSED = """\
LoRA variants that PEFT itself cannot merge are refused as well: aLoRA, Arrow and QALoRA. So is LoRA on a convolution
with groups or dilation, or one that pads otherwise than with zeros: PEFT's update is a convolution without, which the
layer's weight cannot hold. And so is one of two weights that T5 and its like tie, whose `config.json` cannot untie them
without changing what else the model computes.
Adapters of other libraries (AdapterHub's bottleneck adapters and their like) add layers that no weight of the base can
hold.

The patterns of `adapter_config.json` are matched within 10 seconds of processor time, or the adapter is refused.
""".splitlines()

_BY_TYPE: Mapping[str, Method] = {method.peft_type: method for method in METHODS}


def find_method(peft_type: str) -> Method | None:
    """The entry of a `peft_type` in upper case; None for one this table does not know."""
    return _BY_TYPE.get(peft_type)


def what_to_do(method: Method) -> str:
    """The next step for a method that cannot be merged."""
    if method.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        return (
            "Say --soft-prompt tokens where its base is a causal language model; otherwise load it with PEFT."
        )
    if (
        method.peft_type == "XLORA"
    ):  # the copies in its own subfolders have names that PEFT itself does not load
        return "Name as the adapter one of those that adapter_config.json lists under `adapters`."
    return _KEEP


def document() -> str:
    """The text of docs/methods.md."""
    lines = [
        "# Methods",
        "",
        "How `merge-adapter` merges each method of PEFT. This page is generated from"
        " `src/merge_adapter/methods/table.py`",
        "(`python -m merge_adapter.methods.table docs/methods.md`), and a test compares it with PEFT's own registry.",
        "",
        "*Additive* methods make W + D with D independent of W; *multiplicative* ones make a function of W; methods",
        "that *replace* put trained tensors in the place of the base's. All are computed in float32 and rounded once.",
        "`--weight` other than 1 is for methods whose layer PEFT itself can scale:"
        f" {', '.join(m.title.partition(' (')[0] for m in METHODS if m.scaled)}.",
        "",
        "## Merged",
        "",
        *_table((m for m in METHODS if m.kind), ("Method", "`peft_type`", "Kind", "How", "Notes")),
        "",
        *_AROUND,
        "",
        "## Not mergeable",
        "",
        "The command ends with exit code 3 and says so. The adapter still works through PEFT, unmerged.",
        "",
        *_table((m for m in METHODS if not m.kind), ("Method", "`peft_type`", "Why")),
        "",
        *_REFUSED,
        "",
    ]
    return "\n".join(lines)


def _table(methods: Iterable[Method], header: tuple[str, ...]) -> list[str]:
    rows = [header, tuple("---" for _ in header)]
    for method in methods:
        kind = (str(method.kind), _how(method)) if method.kind else ()
        rows.append((method.title, f"`{method.peft_type}`", *kind, method.note))
    return ["| " + " | ".join(row) + " |" for row in rows]


def _how(method: Method) -> str:
    other = [f"; with `{key}={value}` {way.value}" for key, value, way in method.unless]
    return method.way.value + "".join(other)


if __name__ == "__main__":
    import sys

    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
