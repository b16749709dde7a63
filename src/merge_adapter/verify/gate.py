"""The order of the parts, and the verdict.

Cheap and decisive parts come first: files, weights, mutants; then the merged model's answers in a process of its own.
Each part leaves findings; the heaviest of them is the verdict.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from merge_adapter.errors import BaseModelError, MalformedError, NotFoundError
from merge_adapter.packaging.tokenizer import template_beside
from merge_adapter.types import Progress, Resolved, Verification
from merge_adapter.verify.answers import Batch
from merge_adapter.verify.batches import Probes, random_ids, tokenized
from merge_adapter.verify.configs import judge_configs
from merge_adapter.verify.expectations import Expectations, expectations
from merge_adapter.verify.files import judge_files, local_layout, unloaded_tensors
from merge_adapter.verify.findings import Finding, Weight, fault, note, undecided, verdict
from merge_adapter.verify.greedy import judge_greedy
from merge_adapter.verify.layers import judge_layers, layer_findings, layer_section
from merge_adapter.verify.loading import (
    Kind,
    Loaded,
    adapt,
    base_folder,
    base_layout,
    kind_of,
    labels_of,
    load_base,
    load_model,
    read_adapter,
    read_json,
    stored_dtype,
)
from merge_adapter.verify.mutants import judge_mutants, run_mutants
from merge_adapter.verify.outputs import Arms, judge_outputs, run_reference_arms
from merge_adapter.verify.probes import VERSION, Probe, from_file, shipped
from merge_adapter.verify.separate import Merged, ask_merged
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.storage import Checkpoint
from merge_adapter.verify.tensors import WeightsPart, evidence_of, judge_tensors, named_tensors
from merge_adapter.verify.tokens import judge_tokenizer, survey
from merge_adapter.verify.weights import Agreement

EXACT_DOCUMENTS = 4
"""Documents the merged arm reads when its weights are bit for bit the oracle's: only loading remains to be seen."""

PROMPT_TOKENS = 16
"""Length of the prompts that are continued greedily."""


class Gate:
    """One verification. `run` may be called once."""

    def __init__(self, merged: Path, sources: Resolved, settings: VerifySettings, progress: Progress) -> None:
        self.merged = merged
        self.sources = sources
        self.settings = settings
        self.progress = progress
        self.device = _device(settings.device)
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
        base_files = base_layout(self.sources.base.repository)
        folder = base_folder(self.sources.base.repository, base_files)
        held = self._stack.enter_context(Checkpoint(folder, base_files.files))
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
        if headers.layout is None:
            return
        started = time.monotonic()
        trust = self.settings.trust_remote_code
        dtype = stored_dtype(held)
        with self.progress.task("Loading base and adapter", None):
            base = load_base(folder, kind, files, dtype=dtype, trust_remote_code=trust)
            adapted = adapt(base.model, self.sources, files)
        self._adapter_findings(adapted)
        expected = expectations(adapted.model, self.sources, files)
        self.findings += [undecided("adapter", "", text) for text in expected.disagreements]
        merged = self._load_merged(kind)
        self._note_time("loading", started)
        if merged is None:
            return
        started = time.monotonic()
        self._load_report(merged, base)
        self._config(merged, base, labels_of(files))
        with Checkpoint(self.merged, headers.layout.files) as own:
            storage = stored_dtype(own)
        weights = self._weights(expected, merged.model)
        self.findings += unloaded_tensors(self.merged, headers.layout, held, merged.unexpected)
        self._note_time("weights", started)
        self._layers(expected, merged.model, weights)
        embeddings = _embeddings(merged.model)
        del merged
        started = time.monotonic()
        self._mutants(expected, storage)
        self._note_time("mutants", started)
        started = time.monotonic()
        self._answers(adapted, folder, kind, files, expected, weights, dtype, storage, embeddings)
        self._note_time("outputs", started)

    def _note_time(self, part: str, started: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.monotonic() - started

    def _adapter_findings(self, adapted: Loaded) -> None:
        """Every tensor of the adapter must have gone somewhere in PEFT's own hands."""
        if adapted.unexpected:
            text = f"{len(adapted.unexpected)} tensors of the adapter match nothing in this base"
            self.findings.append(fault("adapter", adapted.unexpected[0], text))
        if adapted.missing:
            count = len(adapted.missing)
            text = (
                f"{count} tensors that PEFT expects are not in the adapter: another base, or a partial file"
            )
            self.findings.append(undecided("adapter", adapted.missing[0], text))

    def _load_merged(self, kind: Kind) -> Loaded | None:
        try:
            with Checkpoint(self.merged, local_layout(self.merged).files) as own:
                dtype = stored_dtype(own)
            with self.progress.task("Loading the merged model", None):
                return load_model(
                    self.merged, kind, dtype=dtype, trust_remote_code=self.settings.trust_remote_code
                )
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
            self.findings.append(fault("files", "", f"loading reported: {text[:300]}"))
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
            merged_config=merged.model.config,
            base_config=base.model.config,
            labels=labels,
        )

    def _weights(self, expected: Expectations, model: Any) -> WeightsPart:
        part = judge_tensors(expected, model, self.sources, self.progress)
        self.findings += part.findings
        updated = [entry for entry in part.tensors if entry.kind == "update"]
        self.evidence["weights"] = {
            "verdict": str(verdict(part.findings)),
            "tensors": len(part.tensors),
            "updated": len(updated),
            "replaced": sum(entry.kind == "replaced" for entry in part.tensors),
            "kept": sum(entry.kind == "kept" for entry in part.tensors),
            "agreement": dict(Counter(str(entry.agreement) for entry in part.tensors)),
            "alpha": _span([entry.alpha for entry in updated]),
            "retained": _span([entry.retained for entry in updated]),
            "effect": _span([entry.effect for entry in updated]),
            "worst_error": _span([entry.worst for entry in updated]),
            "per_tensor": [
                evidence_of(entry) for entry in part.tensors if entry.kind != "kept" or entry.diagnosis
            ],
        }
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

    def _mutants(self, expected: Expectations, storage: torch.dtype) -> None:
        with self.progress.task("Injecting faults", None):
            results = run_mutants(expected, storage, self.settings.seed)
        self.evidence["mutants"] = results
        self.findings += judge_mutants(results)

    # ---------------------------------------------------------------------------------------- answers

    def _answers(
        self,
        adapted: Loaded,
        folder: Path,
        kind: Kind,
        files: tuple[Any, ...],
        expected: Expectations,
        weights: WeightsPart,
        dtype: torch.dtype,
        storage: torch.dtype,
        embeddings: int | None,
    ) -> None:
        """Tokenizer, outputs and greedy text: everything the merged arm's process is asked."""
        own = self._probe_texts()
        texts = [probe.plain() for probe in own]
        conversations = [[dict(turn) for turn in probe.messages] for probe in own if probe.messages]
        source = self._tokenizer_folder()
        expected_survey = (
            survey(source, texts, conversations, trust=self.settings.trust_remote_code) if source else None
        )
        probes = self._probes(own, source, adapted.model, kind)
        arms: Arms | None = None
        if self.settings.outputs and probes is not None:
            plain = load_base(
                folder, kind, files, dtype=dtype, trust_remote_code=self.settings.trust_remote_code
            )
            arms = run_reference_arms(
                adapted.model,
                plain.model,
                expected,
                kind,
                probes.batch,
                storage=storage,
                device=torch.device(self.device),
                with_ceiling=not weights.exact,
                prompts=_prompts(probes.batch, self.settings.greedy_prompts) if kind is Kind.CAUSAL else None,
                greedy_tokens=self.settings.greedy_tokens,
                seed=self.settings.seed,
                progress=self.progress,
            )
        batch = probes.batch if probes is not None and arms is not None else None
        if batch is not None and weights.exact:
            batch = batch.part(0, EXACT_DOCUMENTS)
        merged = self._ask(
            kind, storage, batch, arms, texts, conversations, tokenizer=expected_survey is not None
        )
        if expected_survey is not None:
            found = list(judge_tokenizer(merged.tokenizer, expected_survey, embeddings=embeddings))
            self.findings += found
            self.evidence["tokenizer"] = _tokenizer_evidence(
                found, merged.tokenizer, len(texts), len(conversations)
            )
        if merged.error:
            self.findings.append(
                fault("outputs", "", f"the merged model could not be run on its own: {merged.error}")
            )
            return
        if not self.settings.outputs:
            self.findings.append(undecided("outputs", "", "the outputs were not compared, as asked"))
            return
        if arms is None or probes is None or merged.answers is None:
            return
        part = judge_outputs(
            arms,
            merged.answers,
            kind,
            probes.batch,
            names=probes.names,
            confidence=self.settings.confidence,
            seed=self.settings.seed,
        )
        self.findings += part.findings
        self.evidence["outputs"] = {"verdict": str(verdict(part.findings)), **part.evidence}
        if arms.greedy is not None and merged.choices is not None:
            self._greedy(arms, merged, source)

    def _ask(
        self,
        kind: Kind,
        storage: torch.dtype,
        batch: Batch | None,
        arms: Arms | None,
        texts: list[str],
        conversations: list[Any],
        *,
        tokenizer: bool,
    ) -> Merged:
        with self.progress.task("Running the merged model on its own", None):
            return ask_merged(
                self.merged,
                kind=kind,
                dtype=storage,
                device=self.device,
                batch=batch,
                greedy=(arms.greedy[0], arms.greedy[1])
                if arms is not None and arms.greedy is not None
                else None,
                texts=texts,
                conversations=conversations,
                tokenizer=tokenizer,
                trust=self.settings.trust_remote_code,
                timeout=self.settings.timeout,
                # with nothing to run, a process of its own would show no more than this one
                isolated=self.settings.isolated and batch is not None,
            )

    def _greedy(self, arms: Arms, merged: Merged, source: Path | None) -> None:
        tokenizer = _tokenizer(source, trust=self.settings.trust_remote_code)
        found, rows = judge_greedy(arms, merged, tokenizer)
        self.findings += found
        self.evidence["greedy"] = rows

    def _probe_texts(self) -> tuple[Probe, ...]:
        own = from_file(self.settings.probes) if self.settings.probes is not None else ()
        return (*own, *shipped())

    def _tokenizer_folder(self) -> Path | None:
        repository = self.sources.tokenizer
        if repository is None:
            return None
        names = [name for name in repository.files if _is_tokenizer_file(name)]
        # AutoTokenizer asks the model's config which class to use when the tokenizer's own does not say
        place = repository.folder(names)
        template = template_beside(self.sources)
        if (place / "config.json").exists() and not template:
            return place
        base = self.sources.base.repository
        joined = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-adapter-tokenizer-"))
        )
        for name in names:
            target = joined / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((place / name).read_bytes())
        for name, content in template.items():
            target = joined / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (joined / "config.json").write_bytes(base.read("config.json"))
        return joined

    def _probes(self, own: tuple[Probe, ...], source: Path | None, model: Any, kind: Kind) -> Probes | None:
        vocabulary = _embeddings(model)
        if vocabulary is None:
            self.findings.append(
                undecided("outputs", "", f"this gate cannot feed a {kind} model without text")
            )
            return None
        limit = _positions(model.config)
        tokenizer = _tokenizer(source, trust=self.settings.trust_remote_code)
        budget = self.settings.tokens(self.device)
        if tokenizer is None:
            self.findings.append(note("outputs", "", "no tokenizer: probed with seeded random token ids"))
            probes = random_ids(budget=budget, vocabulary=vocabulary, limit=limit, seed=self.settings.seed)
        else:
            probes = tokenized(own, tokenizer, budget=budget, vocabulary=vocabulary, limit=limit)
        self.evidence["probes"] = {
            "version": VERSION,
            "source": probes.source,
            "documents": len(probes.batch),
            "tokens": probes.tokens,
            "chat_templated": probes.templated,
            "own": str(self.settings.probes.name) if self.settings.probes else None,
        }
        return probes


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tokenizer(source: Path | None, *, trust: bool) -> Any:
    if source is None:
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust, local_files_only=True
        )
    except Exception:  # noqa: BLE001 - the survey has already said why
        return None


def _is_tokenizer_file(name: str) -> bool:
    heavy = (
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".h5",
        ".msgpack",
        ".onnx",
        ".gguf",
        ".md",
        ".png",
        ".jpg",
    )
    return (
        "/" not in name
        and not name.startswith(".")
        and not name.endswith(heavy)
        and name != "adapter_config.json"
    )


def _embeddings(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def _positions(config: Any) -> int:
    """The longest document the model has positions for."""
    for source in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                # RoBERTa's kind spends the padding id and one more on an offset
                return max(1, value - 2)
    return 2048


def _prompts(batch: Batch, count: int) -> Batch | None:
    """The beginnings of the first documents that are long enough, all of one length, unpadded."""
    length = min(PROMPT_TOKENS, int(batch.ids.shape[1]))
    whole = [at for at in range(len(batch)) if int(batch.mask[at, :length].sum()) == length][:count]
    return Batch(batch.ids[whole, :length], batch.mask[whole, :length]) if whole else None


def _span(values: Iterable[float | None]) -> dict[str, float] | None:
    found = sorted(value for value in values if value is not None and abs(value) < float("inf"))
    if not found:
        return None
    return {
        "min": float(f"{found[0]:.4g}"),
        "median": float(f"{found[len(found) // 2]:.4g}"),
        "max": float(f"{found[-1]:.4g}"),
    }


def _tokenizer_evidence(
    found: list[Finding], merged: Mapping[str, Any], texts: int, conversations: int
) -> dict[str, Any]:
    return {
        "verdict": str(verdict(found)),
        "texts": texts,
        "conversations": conversations,
        "size": merged.get("size"),
        "template": merged.get("template"),
        "findings": [str(finding) for finding in found],
    }


def reasons(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The findings as sentences, the most telling first, equal ones told once with their number."""
    grouped: dict[tuple[Weight, str, str], list[str]] = {}
    for finding in findings:
        grouped.setdefault((finding.weight, finding.part, finding.text.split(" (")[0]), []).append(
            str(finding)
        )
    ordered = sorted(grouped.items(), key=lambda item: (-item[0][0], -len(item[1])))
    found = []
    for (weight, _, _), texts in ordered:
        more = f" (and {len(texts) - 1:,} more like it)" if len(texts) > 1 else ""
        prefix = {Weight.WARNING: "warning: ", Weight.NOTE: "note: "}.get(weight, "")
        found.append(f"{prefix}{texts[0]}{more}")
    if not any(weight >= Weight.UNDECIDED for (weight, _, _), _ in ordered):
        found.insert(
            0, "every tensor is base + adapter within the rounding of its dtype, and the outputs agree"
        )
    return tuple(found)
