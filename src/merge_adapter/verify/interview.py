"""The second half of a verification: what the models say. Tokenizer, outputs, greedy text.

The merged model answers in a process of its own; everything it is asked, it is asked in one visit.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_adapter.errors import MalformedError
from merge_adapter.types import Progress, Resolved
from merge_adapter.verify.answers import Batch
from merge_adapter.verify.asked import domain_findings, probes_section, texts_of
from merge_adapter.verify.batches import Probes, positions, prompts, random_ids, tokenized, vocabulary
from merge_adapter.verify.beginnings import Beginnings, beginnings
from merge_adapter.verify.expectations import Expectations
from merge_adapter.verify.findings import Finding, fault, note, undecided, verdict, warning
from merge_adapter.verify.greedy import judge_greedy
from merge_adapter.verify.loading import AdapterFile, Kind, inner, load_base
from merge_adapter.verify.mutants import Outcome
from merge_adapter.verify.outputs import Arms, judge_outputs, run_mutant_arms, run_reference_arms
from merge_adapter.verify.perceived import Unfed, perceived, sees_or_hears
from merge_adapter.verify.probes import Probe
from merge_adapter.verify.provenance import judge_likelihood, judge_vocabularies, likelihood
from merge_adapter.verify.sentences import Tail, installed, source_of, tail_of
from merge_adapter.verify.separate import Merged, Questions, ask_merged
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.tokens import judge_tokenizer, load_tokenizer, survey, tokenizer_folder

SETTLED_DOCUMENTS = 4
"""Documents the merged arm reads when its weights are the oracle's already: only loading remains to be seen."""


@dataclass(frozen=True)
class Subject:
    """What the first half of the gate has loaded and learned."""

    merged: Path
    sources: Resolved
    files: tuple[AdapterFile, ...]
    base_folder: Path
    kind: Kind
    adapted: Any
    """PEFT's model, unmerged."""
    expected: Expectations
    settled: bool
    """True when the merged weights leave the once-rounded oracle's answers no room to differ."""
    outcomes: list[Outcome]
    loaded_dtype: torch.dtype
    """In which the base is loaded."""
    storage: torch.dtype
    """In which the merged weights are stored."""
    embeddings: int | None
    """Rows of the merged model's input embeddings."""


class Interview:
    """Puts the probes to every arm. `run` fills `findings` and `evidence`."""

    def __init__(self, subject: Subject, settings: VerifySettings, progress: Progress) -> None:
        self.subject = subject
        self.settings = settings
        self.progress = progress
        self.findings: list[Finding] = []
        self.evidence: dict[str, Any] = {}
        self.device = settings.device
        if settings.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._trust = settings.trust_remote_code

    def run(self) -> None:
        """Ask, and judge the answers."""
        with ExitStack() as stack:
            chosen = texts_of(self.settings)
            texts = chosen.asked
            source = tokenizer_folder(self.subject.sources, stack)
            tokenizer = load_tokenizer(source, trust=self._trust)
            probes = self._probes(texts, tokenizer) if self.settings.outputs else None
            tail = self._tail()
            begun = self._begun(chosen.shown, tokenizer, probes) if probes is not None else None
            arms = self._arms(probes, tail, begun) if probes is not None else None
            questions = self._questions(texts, source, probes, arms, tail)
            with self.progress.task("Running the merged model on its own", None):
                merged = ask_merged(questions)
            self._tokenizer(questions, merged, source)
            self._outputs(probes, arms, merged)
            if arms is not None and arms.greedy is not None and merged.choices is not None:
                found, self.evidence["greedy"] = judge_greedy(
                    arms, merged, tokenizer, shown=begun.shown if begun is not None else ()
                )
                self.findings += found

    def _probes(self, texts: tuple[Probe, ...], tokenizer: Any) -> Probes | None:
        subject, seed = self.subject, self.settings.seed
        probes = self._perceived(texts, tokenizer)
        self.findings += domain_findings(self.settings, subject.sources)
        if isinstance(probes, Unfed):
            self._unfed(probes)
            if subject.kind is not Kind.VISION_TEXT:
                return None
            probes = None
        if probes is None:
            rows = vocabulary(subject.adapted)
            if rows is None:
                self._unfed(Unfed("it takes no token ids"))
                return None
            limit, budget = positions(subject.adapted.config), self.settings.tokens(self.device)
            if tokenizer is None:
                self.findings.append(note("outputs", "", "no tokenizer: probed with seeded random token ids"))
                probes = random_ids(budget=budget, vocabulary=rows, limit=limit, seed=seed)
            else:
                probes = tokenized(texts, tokenizer, budget=budget, vocabulary=rows, limit=limit)
        self.evidence["probes"] = probes_section(probes, self.settings)
        return probes

    def _perceived(self, texts: tuple[Probe, ...], tokenizer: Any) -> Probes | Unfed | None:
        """What a model that sees or hears is asked; None for models of text."""
        subject, model = self.subject, inner(self.subject.adapted)
        if not sees_or_hears(subject.kind, model):
            return None
        budget, seed = self.settings.tokens(self.device), self.settings.seed
        found = perceived(
            subject.kind,
            model,
            texts,
            tokenizer,
            subject.base_folder,
            budget=budget,
            seed=seed,
            device=torch.device(self.device),
        )
        if isinstance(found, Probes):
            text = f"{len(found.batch)} documents were compared: {found.source}; no processor was run"
            self.findings.append(note("outputs", "", text))
        return found

    def _unfed(self, unfed: Unfed) -> None:
        """Say what the outputs part cannot ask, and leave the answer open."""
        what = "outputs on pictures" if self.subject.kind is Kind.VISION_TEXT else "outputs"
        text = (
            f"{what} were not compared: this gate cannot feed this {self.subject.kind} model, {unfed.reason}"
        )
        self.findings.append(undecided("outputs", "", text))

    def _begun(self, texts: tuple[Probe, ...], tokenizer: Any, probes: Probes) -> Beginnings | None:
        """What is continued greedily, by the kinds that write text from text."""
        kind, count = self.subject.kind, self.settings.greedy_prompts
        rows, length = vocabulary(self.subject.adapted), self.settings.greedy_tokens
        if kind not in (Kind.CAUSAL, Kind.SEQ2SEQ) or rows is None or not count or not length:
            if kind in (Kind.VISION_TEXT, Kind.SPEECH):
                self.findings.append(note("greedy", "", f"greedy text of a {kind} model was not compared"))
            return None
        found = None
        if tokenizer is not None:
            found = beginnings(
                texts,
                tokenizer,
                count=count,
                vocabulary=rows,
                limit=positions(self.subject.adapted.config) - length,
                encoder=kind is Kind.SEQ2SEQ,
            )
        if found is None:
            cut = prompts(probes.batch, count)
            found = Beginnings(cut, ()) if cut is not None else None
        return found

    def _tail(self) -> Tail | None:
        """How embeddings are pooled; None for mean pooling, and for other kinds of model."""
        repository = source_of(self.subject.sources) if self.subject.kind is Kind.EMBEDDING else None
        if repository is None:
            return None
        if not installed():
            text = "sentence-transformers is not installed: embeddings were mean-pooled, its own pooling is not judged"
            self.findings.append(warning("outputs", "", text))
            return None
        try:
            return tail_of(repository)
        except MalformedError as error:
            self.findings.append(warning("outputs", "", f"{error.message}; embeddings were mean-pooled"))
            return None

    def _arms(self, probes: Probes, tail: Tail | None, begun: Beginnings | None) -> Arms | None:
        """The arms of this process; None, and the answer left open, where base + adapter itself cannot be run."""
        try:
            return self._run_arms(probes, tail, begun)
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            text = (
                f"outputs were not compared: base + adapter, a {self.subject.kind} model, cannot be run on "
                f"{probes.source}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            self.findings.append(undecided("outputs", "", text))
            return None

    def _run_arms(self, probes: Probes, tail: Tail | None, begun: Beginnings | None) -> Arms:
        subject, settings = self.subject, self.settings
        plain = load_base(
            subject.base_folder,
            subject.kind,
            subject.files,
            dtype=subject.loaded_dtype,
            trust_remote_code=self._trust,
        )
        arms = run_reference_arms(
            subject.adapted,
            plain.model,
            subject.expected,
            subject.kind,
            probes.batch,
            storage=subject.storage,
            device=torch.device(self.device),
            with_ceiling=not subject.settled,
            prompts=begun.batch if begun is not None else None,
            greedy_tokens=settings.greedy_tokens,
            seed=settings.seed,
            progress=self.progress,
            tail=tail,
        )
        if settings.full_mutants and subject.outcomes:
            outcomes = run_mutant_arms(
                plain.model,
                subject.expected,
                subject.outcomes,
                arms,
                subject.kind,
                probes.batch,
                storage=subject.storage,
                device=torch.device(self.device),
                confidence=settings.confidence,
                seed=settings.seed,
                progress=self.progress,
                tail=tail,
            )
            self.evidence["mutants"] = [outcome.as_json() for outcome in outcomes]
        return arms

    def _questions(
        self,
        texts: tuple[Probe, ...],
        source: Path | None,
        probes: Probes | None,
        arms: Arms | None,
        tail: Tail | None,
    ) -> Questions:
        batch: Batch | None = None
        if probes is not None and arms is not None:
            batch = probes.batch.part(0, SETTLED_DOCUMENTS) if self.subject.settled else probes.batch
        return Questions(
            folder=self.subject.merged,
            kind=self.subject.kind,
            dtype=self.subject.storage,
            device=self.device,
            batch=batch,
            greedy=arms.greedy[:2] if arms is not None and arms.greedy is not None else None,
            sentences=tail is not None,
            texts=tuple(probe.plain() for probe in texts),
            conversations=tuple([dict(turn) for turn in probe.messages] for probe in texts if probe.messages),
            tokenizer=source is not None,
            trust=self._trust,
            timeout=self.settings.timeout,
            # with nothing to run, a process of its own would show no more than this one
            isolated=self.settings.isolated and batch is not None,
        )

    def _tokenizer(self, questions: Questions, merged: Merged, source: Path | None) -> None:
        if source is None:
            return
        expected = survey(source, questions.texts, questions.conversations, trust=self._trust)
        sources = self.subject.sources
        if sources.tokenizer is not None and sources.tokenizer.origin != sources.base.repository.origin:
            own = survey(self.subject.base_folder, questions.texts, (), trust=self._trust)
            self.findings += judge_vocabularies(expected, own)
        found = list(judge_tokenizer(merged.tokenizer, expected, embeddings=self.subject.embeddings))
        self.findings += found
        self.evidence["tokenizer"] = {
            "verdict": str(verdict(found)),
            "texts": len(questions.texts),
            "conversations": len(questions.conversations),
            "size": merged.tokenizer.get("size"),
            "template": merged.tokenizer.get("template"),
            "findings": [str(finding) for finding in found],
        }

    def _likelihood(self, arms: Arms, probes: Probes) -> None:
        """How well base + adapter and base alone predict the probes: a sign of a foreign base."""
        ids, mask = probes.batch.ids, probes.batch.mask
        reference, base = likelihood(arms.reference, ids, mask), likelihood(arms.base, ids, mask)
        self.evidence["outputs"]["nats_per_token"] = {
            "adapted": float(f"{reference:.4g}"),
            "base": float(f"{base:.4g}"),
        }
        self.findings += judge_likelihood(reference, base, int(arms.reference.shape[-1]))

    def _outputs(self, probes: Probes | None, arms: Arms | None, merged: Merged) -> None:
        if merged.error:
            text = f"the merged model could not be run on its own: {merged.error}"
            self.findings.append(fault("outputs", "", text))
            self.evidence["outputs"] = {"verdict": "fail"}
        elif not self.settings.outputs:
            self.findings.append(undecided("outputs", "", "the outputs were not compared, as asked"))
        elif arms is not None and probes is not None and merged.answers is not None:
            part = judge_outputs(
                arms,
                merged.answers,
                self.subject.kind,
                probes.batch,
                names=probes.names,
                confidence=self.settings.confidence,
                seed=self.settings.seed,
                settled=self.subject.settled,
            )
            self.findings += part.findings
            self.evidence["outputs"] = {"verdict": str(verdict(part.findings)), **part.evidence}
            if self.subject.kind is Kind.CAUSAL and probes.source == "text":
                self._likelihood(arms, probes)
