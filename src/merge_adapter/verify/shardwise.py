"""The gate where the model is never here as a whole: shard by shard, as they come by.

Base and merged model are opened once, on files that have their full size and hold their headers only. Where each
tensor lies is read from this process's own mappings, so that a tensor is judged exactly when the shards that hold it
are here, whatever it is called. A shard that the Hub copies from the base is the base's by its hash.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_adapter.errors import BaseModelError, MalformedError
from merge_adapter.types import Progress, Resolved, Verification
from merge_adapter.verify.findings import Finding, Weight, fault, reasons, undecided, verdict
from merge_adapter.verify.gate import Gate
from merge_adapter.verify.memory.places import Place, Places, same_in, supported
from merge_adapter.verify.models.adapters import AdapterFile, fitted, read_adapter
from merge_adapter.verify.models.kinds import kind_of
from merge_adapter.verify.models.loading import Loaded, adapt, inner, labels_of, load_base
from merge_adapter.verify.models.storage import Checkpoint, Layout
from merge_adapter.verify.outputs.interview import Interview, Subject
from merge_adapter.verify.probes.batches import vocabulary
from merge_adapter.verify.repository.files import judge_files, unloaded_tensors
from merge_adapter.verify.repository.processors import judge_processors
from merge_adapter.verify.repository.provenance import judge_effect, judge_provenance
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.weights.computed import Computed
from merge_adapter.verify.weights.expectations import Expectations, expectations
from merge_adapter.verify.weights.judging import Agreement, TensorEvidence
from merge_adapter.verify.weights.layers import LayerEvidence, judge_layers, layer_findings, layer_section
from merge_adapter.verify.weights.mutants import Outcome, judge_mutants, run_mutants
from merge_adapter.verify.weights.tensors import (
    judge_held,
    key_set,
    named_tensors,
    stored_dtypes,
    weights_part,
    weights_section,
)

_ALTERNATIVE = "Leave the disk budget out: with the whole model on the disk the gate can judge it."


class ShardGate(Gate):
    """Judges shards as they come. `start`, then `judge` and `judge_copied` for each, then `settle`, then `close`."""

    def __init__(
        self,
        merged: Path,
        base: Path,
        weights: tuple[str, ...],
        sources: Resolved,
        settings: VerifySettings,
        progress: Progress,
    ) -> None:
        """`merged` and `base` hold configs and weight files without data; `weights` names the base's."""
        super().__init__(merged, sources, settings, progress)
        self.kind = kind_of(sources)
        self.files: tuple[AdapterFile, ...] = ()
        self.base_folder = base
        self.outcomes: list[Outcome] = []
        self.unpaged = ""
        """Why the outputs part cannot be run on weights that come and go; "" when it can."""
        self._base_files = weights
        self._base_places: dict[str, Place] = {}
        self._merged_places: dict[str, Place] = {}
        self._owners: dict[str, str] = {}
        self._merged_tensors: dict[str, Tensor] = {}
        self._expected = Expectations()
        self._tensors: list[TensorEvidence] = []
        self._layers_found: list[LayerEvidence] = []
        self._layers_skipped = 0
        self._weight_findings: list[Finding] = []
        self._layer_faults: list[Finding] = []

    # ------------------------------------------------------------------------------------------- opening

    def start(self) -> None:
        """Open base, adapter and merged model without their data.

        Raises BaseModelError, with the tensor's name, where the data of one could not be followed to its shards.
        """
        if not supported():
            raise BaseModelError(
                "a disk budget needs Linux: only there can it be seen what lies in which shard"
            )
        started = time.monotonic()
        self.files = tuple(read_adapter(adapter) for adapter in self.sources.adapters)
        self.held = self._stack.enter_context(Checkpoint(self.base_folder, self._base_files))
        headers = judge_files(self.merged, self.held, dtype=self.settings.dtype)
        self.findings += headers.findings
        self.evidence["files"] = {
            "verdict": str(verdict(headers.findings)),
            "tensors": headers.tensors,
            "bytes": headers.bytes,
            "dtypes": list(headers.dtypes),
        }
        if headers.layout is None:
            raise MalformedError(f"the planned weights cannot be read: {headers.findings[0]}")
        self._merged_layout = headers.layout
        trust = self.settings.trust_remote_code
        with self.progress.task("Opening base and adapter", None):
            base = load_base(self.base_folder, self.kind, self.files, trust_remote_code=trust)
            self.adapted: Any = self._adapted(base)
        merged = self._load_merged(self.kind)
        if merged is None:
            raise BaseModelError(f"the merged model cannot be opened: {self.findings[-1]}", hint=_ALTERNATIVE)
        self._load_report(merged, base)
        self._config(merged, base, labels_of(self.files, self.kind))
        self.findings += judge_provenance(self.sources)
        self.findings += judge_processors(self.merged, self.sources)
        self._place(base, merged)
        self._unloaded = merged.unexpected
        self.model = merged.model
        self._note_time("loading", started)

    def _adapted(self, base: Loaded) -> Any:
        self.files = fitted(self.files, base.model)
        adapted = adapt(base.model, self.sources, self.files)
        self._adapter_findings(adapted, self.files)
        return adapted.model

    def _place(self, base: Loaded, merged: Loaded) -> None:
        """Find every tensor in its shard."""
        where = Places(self.base_folder)
        fresh = set(base.missing)
        tensors = _base_tensors(self.adapted, self._owners)
        self._expected.plain.update(tensors)
        for name, tensor in tensors.items():
            place = where.find(tensor)
            if place is not None:
                self._base_places[name] = place
            elif name not in fresh and tensor.numel():
                raise _lost(name, "the base")
        where = Places(self.merged)
        self._merged_tensors = named_tensors(merged.model)
        absent = set(merged.missing)
        for name, tensor in self._merged_tensors.items():
            place = where.find(tensor)
            if place is not None:
                self._merged_places[name] = place
            elif name not in absent and tensor.numel():
                raise _lost(name, "the merged model")
        self._weight_findings += key_set(set(tensors), set(self._merged_tensors))

    # ------------------------------------------------------------------------------------ what belongs together

    @property
    def together(self) -> tuple[frozenset[str], ...]:
        """Merged shards that must be judged at once, because a layer of the adapter has tensors in each of them."""
        by_owner: dict[str, set[str]] = {}
        for name, owner in self._owners.items():
            if owner and name in self._merged_places:
                by_owner.setdefault(owner, set()).add(self._merged_places[name].file)
        return tuple(frozenset(files) for files in by_owner.values() if len(files) > 1)

    @property
    def wanted(self) -> Mapping[str, frozenset[str]]:
        """Merged shard -> the base's shards that its tensors are compared with."""
        found: dict[str, set[str]] = {}
        for name, place in self._merged_places.items():
            base = self._base_places.get(name)
            if base is not None:
                found.setdefault(place.file, set()).add(base.file)
        return {file: frozenset(files) for file, files in found.items()}

    def may_be_copied(self, file: str) -> bool:
        """Whether, for all the gate knows, the adapter changes nothing in this shard."""
        names = self._names_in({file})
        if any(self._owners.get(name) for name in names):
            return False
        return not expectations(self.adapted, self.sources, self.files, only=names).updates

    # ------------------------------------------------------------------------------------------- judging

    def judge(self, shards: Mapping[str, Path]) -> tuple[Finding, ...]:
        """Judge the merged shards that lie in the given files, while the base's that they need are here.

        The faults that were found: with any, they may not leave.
        """
        started = time.monotonic()
        found = [
            fault("files", name, "is not laid out as planned")
            for name, path in shards.items()
            if not _same_head(self.merged / name, path)
        ]
        if not found:
            found = self._judge_weights(shards)
        self._weight_findings += found
        self._note_time("weights", started)
        return tuple(finding for finding in found if finding.weight is Weight.FAULT)

    def _judge_weights(self, shards: Mapping[str, Path]) -> list[Finding]:
        names = self._names_in(set(shards))
        held = {
            name: same_in(
                shards[self._merged_places[name].file], self._merged_places[name], self._merged_tensors[name]
            )
            for name in self._merged_tensors
            if name in names
        }
        expected = expectations(self.adapted, self.sources, self.files, only=names)
        self.findings += [undecided("adapter", "", text) for text in expected.disagreements]
        self._keep(expected)
        tensors, found = judge_held(expected, held, self.sources, self.progress)
        unjudged = names - {entry.name for entry in tensors} - {finding.subject for finding in found}
        found += [undecided("weights", name, "was not judged") for name in sorted(unjudged)]
        self._tensors += tensors
        self._judge_layers(expected, held, tensors)
        if not self.outcomes and expected.updates:
            self.outcomes = run_mutants(expected, stored_dtypes(expected, held), self.settings.seed)
        layout = Layout(tuple(shards))
        place = next(iter(shards.values())).parent
        found += unloaded_tensors(place, layout, self.held, self._unloaded)
        return [*found, *self._layer_faults]

    def _judge_layers(
        self, expected: Expectations, held: Mapping[str, Tensor], tensors: list[TensorEvidence]
    ) -> None:
        cast = any(entry.agreement is Agreement.CAST_FIRST for entry in tensors)
        found, skipped = judge_layers(
            expected, held, seed=self.settings.seed, allow_cast=cast, progress=self.progress
        )
        self._layers_found += found
        self._layers_skipped += skipped
        self._layer_faults = [one for one in layer_findings(found) if one.weight is Weight.FAULT]

    def _keep(self, expected: Expectations) -> None:
        """Remember what the outputs part needs: recipes, not tensors as large as the model."""
        for name, update in expected.updates.items():
            self._expected.plain.pop(name, None)
            self._expected.updates[name] = update
            if isinstance(update, Computed):
                self.unpaged = f"{name} is changed by PEFT's own layer, which needs its weights whole"
                self._expected.updates.clear()
                return

    def judge_copied(self, file: str) -> None:
        """A shard that the Hub copies from the base, for which `may_be_copied` holds: the same bytes by their hash."""
        for name in sorted(self._names_in({file})):
            tensor = self._merged_tensors[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = tuple(tensor.shape)
            self._tensors.append(TensorEvidence(name, "kept", dtype, shape, Agreement.EXACT, tensor.numel()))

    def _names_in(self, files: set[str]) -> set[str]:
        return {name for name, place in self._merged_places.items() if place.file in files}

    # ------------------------------------------------------------------------------------------- verdict

    def settle(self, *, ended_early: bool = False) -> None:
        """Put the parts together: all of them, or those that there were when a fault ended the work."""
        judged = {entry.name for entry in self._tensors} | {one.subject for one in self._weight_findings}
        if not ended_early:
            left = sorted(set(self._merged_places) - judged)
            self._weight_findings += [undecided("weights", name, "was not judged") for name in left]
        self.part = weights_part(self._tensors, self._weight_findings)
        self.findings += self.part.findings
        self.evidence["weights"] = weights_section(self.part)
        self.findings += judge_effect([entry.effect for entry in self._tensors if entry.kind == "update"])
        layers = list(layer_findings(self._layers_found))
        known = set(self.part.findings)
        self.findings += [finding for finding in layers if finding not in known]
        if self._layers_found:
            self.evidence["modules"] = layer_section(
                self._layers_found, self._layers_skipped, str(verdict(layers))
            )
        self.evidence["mutants"] = [outcome.as_json() for outcome in self.outcomes]
        self.findings += judge_mutants(self.outcomes)

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that is mapped, in base or merged model."""
        places = (*self._base_places.values(), *self._merged_places.values())
        return max((place.bytes for place in places), default=0)

    def ask(self, merged: Path, settings: VerifySettings) -> None:
        """The second half of the gate, on the merged model in the folder `merged`; after `settle`.

        With `settings.outputs` the weights of both models are read, through the pager in force.
        """
        started = time.monotonic()
        self.findings = [one for one in self.findings if one.part not in ("outputs", "tokenizer")]
        interview = Interview(
            Subject(
                merged,
                self.sources,
                self.files,
                self.base_folder,
                self.kind,
                self.adapted,
                self._expected,
                self.part.settled,
                self.outcomes,
                stored_dtypes(self._expected, self._merged_tensors),
                vocabulary(self.model),
            ),
            settings,
            self.progress,
        )
        interview.run()
        self.findings += interview.findings
        self.evidence |= interview.evidence
        self._note_time("outputs", started)

    def verification(self, *more: Finding) -> Verification:
        """What was found so far, and `more`."""
        found = [*self.findings, *more]
        seconds = {name: round(value, 2) for name, value in self._seconds.items()}
        return Verification(verdict(found), reasons(found), {**self.evidence, "seconds": seconds})

    def close(self) -> None:
        """Let go of every file."""
        self._stack.close()


def _lost(name: str, where: str) -> BaseModelError:
    return BaseModelError(
        f"{name}: loading {where} makes this tensor anew from the stored ones, so that it cannot be judged shard by "
        "shard",
        hint=_ALTERNATIVE,
    )


def _base_tensors(model: Any, owners: dict[str, str]) -> dict[str, Tensor]:
    """The base's tensors inside PEFT's `model`, under the names they have without it; fills name -> adapted layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Tensor] = {}
    handled = ""
    for path, module in inner(model).named_modules(remove_duplicate=False):
        if handled and path.startswith(f"{handled}."):
            continue
        layer: Any = module
        if isinstance(module, AuxiliaryTrainingWrapper):
            layer = module.original_module
        elif isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
        if layer is not module:
            handled = path
            own = {**named_tensors(layer)}
        else:
            skipped = module._non_persistent_buffers_set
            own = {
                leaf: tensor.detach()
                for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
                if tensor is not None and leaf not in skipped
            }
        for leaf, tensor in own.items():
            name = f"{path}.{leaf}" if path else leaf
            found[name] = tensor
            owners[name] = path if layer is not module else ""
    return found


def _same_head(planned: Path, written: Path) -> bool:
    """Whether two weight files have one size and one header."""
    if planned.stat().st_size != written.stat().st_size:
        return False
    with planned.open("rb") as one, written.open("rb") as other:
        length = 8 + int.from_bytes(one.read(8), "little")
        one.seek(0)
        return one.read(length) == other.read(length)
