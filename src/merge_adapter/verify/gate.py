"""The order of the parts, and the verdict.

Cheap and decisive parts come first: files, weights, mutants; then the merged model's answers in a process of its own.
Each part leaves findings; the heaviest of them is the verdict.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from merge_adapter.errors import BaseModelError, MalformedError, NotFoundError
from merge_adapter.types import Progress, Resolved, Verification
from merge_adapter.verify.findings import Finding, fault, reasons, undecided, verdict
from merge_adapter.verify.models.adapters import AdapterFile, fitted, names_read, read_adapter, saved_twice
from merge_adapter.verify.models.kinds import Kind, kind_of
from merge_adapter.verify.models.loading import (
    Loaded,
    adapt,
    base_folder,
    base_layout,
    labels_of,
    load_base,
    load_model,
    read_json,
)
from merge_adapter.verify.models.quantized import dequantized_folder, stated
from merge_adapter.verify.models.storage import Checkpoint, Layout, local_layout
from merge_adapter.verify.outputs.interview import Interview, Subject
from merge_adapter.verify.outputs.placed import known_oracle
from merge_adapter.verify.outputs.process import OwnProcess
from merge_adapter.verify.outputs.sentences import judge_modules
from merge_adapter.verify.probes.batches import vocabulary
from merge_adapter.verify.repository.configs import judge_configs, judge_generation
from merge_adapter.verify.repository.files import judge_files, unloaded_tensors
from merge_adapter.verify.repository.processors import judge_processors
from merge_adapter.verify.repository.provenance import judge_effect, judge_provenance
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.weights.expectations import Expectations, expectations
from merge_adapter.verify.weights.judging import Agreement
from merge_adapter.verify.weights.layers import judge_layers, layer_findings, layer_section
from merge_adapter.verify.weights.mutants import Outcome, judge_mutants, run_mutants
from merge_adapter.verify.weights.tensors import (
    WeightsPart,
    judge_tensors,
    named_tensors,
    stored_dtypes,
    weights_section,
)


class Gate:
    """One verification. `run` may be called once."""

    def __init__(self, merged: Path, sources: Resolved, settings: VerifySettings, progress: Progress) -> None:
        self.merged = merged
        self.sources = sources
        self.settings = settings
        self.progress = progress
        self.findings: list[Finding] = []
        self.evidence: dict[str, Any] = {}
        self._stack = ExitStack()
        self._seconds: dict[str, float] = {}

    def run(self) -> Verification:
        """All parts in order. See `merge_adapter.verify.verify`."""
        if not self.merged.is_dir():
            raise NotFoundError(
                f"no such folder: {self.merged}", hint="Name the folder that holds the merged model."
            )
        with self._stack:
            self._judge()
        self.evidence["seconds"] = {name: round(value, 2) for name, value in self._seconds.items()}
        return Verification(verdict(self.findings), reasons(self.findings), self.evidence)

    # ------------------------------------------------------------------------------------------ parts

    def _judge(self) -> None:
        kind = kind_of(self.sources)
        files = tuple(read_adapter(adapter) for adapter in self.sources.adapters)
        folder, base_files = self._base(kind)
        held = self._stack.enter_context(Checkpoint(folder, base_files.files))
        layout = self._files(kind, held)
        if layout is None:
            return
        own = None
        if self.settings.outputs and self.settings.isolated:
            own = self._stack.enter_context(OwnProcess())
        started = time.monotonic()
        base, adapted, expected, files = self._load(folder, kind, files)
        merged = self._load_merged(kind)
        self._note_time("loading", started)
        if merged is None:
            return
        self._load_report(merged, base)
        self._config(merged, base, labels_of(files, kind))
        storage = stored_dtypes(expected, named_tensors(merged.model))
        started = time.monotonic()
        weights = self._weights(expected, merged.model)
        self.findings += unloaded_tensors(self.merged, layout, held, merged.unexpected)
        self._note_time("weights", started)
        started = time.monotonic()
        self._layers(expected, merged.model, weights)
        self._note_time("modules", started)
        started = time.monotonic()
        outcomes = self._mutants(expected, storage)
        self._note_time("mutants", started)
        subject = Subject(
            self.merged,
            self.sources,
            files,
            folder,
            kind,
            adapted.model,
            expected,
            weights.settled,
            outcomes,
            storage,
            vocabulary(merged.model),
            known_oracle(weights, named_tensors(merged.model)),
        )
        del merged
        self._interview(subject, own)

    def _files(self, kind: Kind, held: Checkpoint) -> Layout | None:
        """Judge the merged folder by its files; None where they name no weights to go on with."""
        started = time.monotonic()
        headers = judge_files(self.merged, held, dtype=self.settings.dtype)
        self.findings += headers.findings
        self.evidence["files"] = {
            "verdict": str(verdict(headers.findings)),
            "tensors": headers.tensors,
            "bytes": headers.bytes,
            "dtypes": list(headers.dtypes),
        }
        self._note_time("files", started)
        self.findings += judge_modules(self.merged, self.sources, pooled=kind is Kind.EMBEDDING)
        return headers.layout

    def _load(
        self, folder: Path, kind: Kind, files: tuple[AdapterFile, ...]
    ) -> tuple[Loaded, Loaded, Expectations, tuple[AdapterFile, ...]]:
        """Base, base + adapter, what the merged model must hold, and the adapters' files as they fit the base."""
        trust = self.settings.trust_remote_code
        with self.progress.task("Loading base and adapter", None):
            base = load_base(folder, kind, files, trust_remote_code=trust)
            files = fitted(files, base.model)
            adapted = adapt(base.model, self.sources, files)
        self._adapter_findings(adapted, files)
        self.findings += judge_provenance(self.sources)
        self.findings += judge_processors(self.merged, self.sources)
        expected = expectations(adapted.model, self.sources, files)
        self.findings += [undecided("adapter", "", text) for text in expected.disagreements]
        return base, adapted, expected, files

    def _interview(self, subject: Subject, own: OwnProcess | None) -> None:
        started = time.monotonic()
        interview = Interview(subject, self.settings, self.progress, own)
        interview.run()
        self.findings += interview.findings
        self.evidence |= interview.evidence
        self._note_time("outputs", started)

    def _base(self, kind: Kind) -> tuple[Path, Layout]:
        """Where the base's weights lie; of one stored quantised, its 16-bit form in a folder of our own."""
        repository = self.sources.base.repository
        files = base_layout(repository)
        folder = base_folder(repository, files)
        if stated(self.sources.base.config) is None:
            return folder, files
        started = time.monotonic()
        place = Path(self._stack.enter_context(TemporaryDirectory(prefix="merge-adapter-")))
        with self.progress.task("Dequantising the base", None):
            trust = self.settings.trust_remote_code
            folder = dequantized_folder(folder, place, kind, trust_remote_code=trust)
        self._note_time("dequantising", started)
        return folder, local_layout(folder)

    def _note_time(self, part: str, started: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.monotonic() - started

    def _adapter_findings(self, adapted: Loaded, files: tuple[AdapterFile, ...]) -> None:
        """Every tensor of the adapter must have gone somewhere in PEFT's own hands."""
        self.findings += names_read(files)
        again = saved_twice(files)
        foreign = [name for name in adapted.unexpected if name not in again]
        if foreign:
            text = f"{len(foreign)} tensors of the adapter match nothing in this base"
            self.findings.append(fault("adapter", foreign[0], text))
        if adapted.missing:
            count = len(adapted.missing)
            text = (
                f"{count} tensors that PEFT expects are not in the adapter: another base, or a partial file"
            )
            self.findings.append(undecided("adapter", adapted.missing[0], text))

    def _load_merged(self, kind: Kind) -> Loaded | None:
        try:
            with self.progress.task("Loading the merged model", None):
                return load_model(self.merged, kind, trust_remote_code=self.settings.trust_remote_code)
        except (BaseModelError, MalformedError, NotFoundError) as error:
            self.findings.append(fault("files", "", error.message))
            return None

    def _load_report(self, merged: Loaded, base: Loaded) -> None:
        for name in merged.mismatched[:5]:
            self.findings.append(fault("files", name, "does not have the shape its config calls for"))
        for name in merged.missing[:5]:
            self.findings.append(
                fault("files", name, f"is missing; loading made it anew ({len(merged.missing)} such)")
            )
        for text in merged.errors[:3]:
            self.findings.append(fault("files", "", f"loading reported: {' '.join(text.split())[:300]}"))
        fresh = sorted(set(merged.unexpected) - set(base.unexpected))
        if fresh:
            text = f"{len(fresh)} tensors that no module loads and the base does not have"
            self.findings.append(fault("files", fresh[0], text))

    def _config(self, merged: Loaded, base: Loaded, labels: int | None) -> None:
        try:
            raw = read_json(self.merged / "config.json")
        except MalformedError as error:
            self.findings.append(fault("config", "config.json", error.message))
            return
        self.findings += judge_configs(
            raw,
            self.sources.base.config,
            merged_model=merged.model,
            base_model=base.model,
            labels=labels,
            asked=self.settings.dtype,
        )
        self.findings += judge_generation(merged.model, base.model)

    def _weights(self, expected: Expectations, model: Any) -> WeightsPart:
        part = judge_tensors(expected, model, self.sources, self.progress)
        self.findings += part.findings
        updated = [entry for entry in part.tensors if entry.kind == "update"]
        self.findings += judge_effect([entry.effect for entry in updated])
        self.evidence["weights"] = weights_section(part)
        return part

    def _layers(self, expected: Expectations, model: Any, weights: WeightsPart) -> None:
        cast = any(entry.agreement is Agreement.CAST_FIRST for entry in weights.tensors)
        held = named_tensors(model)
        found, skipped = judge_layers(
            expected, held, seed=self.settings.seed, allow_cast=cast, progress=self.progress
        )
        findings = list(layer_findings(found))
        self.findings += findings
        if found:
            self.evidence["modules"] = layer_section(found, skipped, str(verdict(findings)))

    def _mutants(self, expected: Expectations, storage: Mapping[str, torch.dtype]) -> list[Outcome]:
        with self.progress.task("Injecting faults", None):
            full = self.settings.full_mutants
            outcomes = run_mutants(expected, storage, self.settings.seed, full=full)
        self.evidence["mutants"] = [outcome.as_json() for outcome in outcomes]
        self.findings += judge_mutants(outcomes)
        return outcomes
