"""The second half of a verification: what the models say. Tokenizer, outputs, greedy text.

The merged model answers in a process of its own; everything it is asked, it is asked in one visit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from merge_adapter.errors import MalformedError, ran_out_of_memory
from merge_adapter.types import Progress, Resolved
from merge_adapter.verify.findings import Finding, note, undecided, verdict, warning
from merge_adapter.verify.models.adapters import AdapterFile
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.loading import inner, load_base, stack_layers
from merge_adapter.verify.outputs.answers import LANGUAGE
from merge_adapter.verify.outputs.asked import domain_findings, probes_section, texts_of
from merge_adapter.verify.outputs.greedy import judge_written
from merge_adapter.verify.outputs.judging import judge_outputs
from merge_adapter.verify.outputs.placed import Known
from merge_adapter.verify.outputs.process import OwnProcess
from merge_adapter.verify.outputs.reading import Reading, Written
from merge_adapter.verify.outputs.reference import ReferenceArms, Setting
from merge_adapter.verify.outputs.rounds import first_round, rounds
from merge_adapter.verify.outputs.sentences import Tail, installed, source_of, tail_of
from merge_adapter.verify.outputs.separate import Merged, Questions, ask_merged
from merge_adapter.verify.probes import Probe
from merge_adapter.verify.probes.batch import Batch
from merge_adapter.verify.probes.batches import Probes, positions, prompts, random_ids, tokenized, vocabulary
from merge_adapter.verify.probes.beginnings import Beginnings, beginnings, first_tokens, spoken
from merge_adapter.verify.probes.perceived import Unfed, perceived, sees_or_hears
from merge_adapter.verify.repository.provenance import judge_likelihood, judge_vocabularies
from merge_adapter.verify.repository.tokens import judge_tokenizer, load_tokenizer, survey, tokenizer_folder
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.mutants import Outcome

_UNHEARD = (
    "base + adapter never calls this module, whose weight the module around it reads: the update, which is not zero, "
    "acts in the merged model alone; leave the module out of target_modules, and train again or remove its factors"
)


@dataclass(frozen=True)
class Heard:
    """What the arms of this process answered and wrote."""

    reading: Reading
    written: Written | None


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
    storage: Mapping[str, torch.dtype]
    """In which the merged model holds each tensor that must change."""
    embeddings: int | None
    """Rows of the merged model's input embeddings."""
    known: Mapping[str, Known] = field(default_factory=dict)
    """The once-rounded oracle of the tensors that the weights part has found it for."""


class Interview:
    """Puts the probes to every arm. `run` fills `findings` and `evidence`."""

    def __init__(
        self,
        subject: Subject,
        settings: VerifySettings,
        progress: Progress,
        own: OwnProcess | None = None,
    ) -> None:
        """`own`: the merged model's process, where it was started before."""
        self.subject = subject
        self._own = own
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
            tokenizer = load_tokenizer(source, (probe.plain() for probe in texts), trust=self._trust)
            probes = self._probes(texts, tokenizer) if self.settings.outputs else None
            tail = self._tail()
            begun = self._begun(chosen.shown, tokenizer, probes) if probes is not None else None
            place = Path(stack.enter_context(TemporaryDirectory(prefix="merge-adapter-answers-")))
            heard = self._heard(probes, tail, begun, place) if probes is not None else None
            questions = self._questions(texts, source, probes, heard, tail)
            with self.progress.task("Running the merged model on its own", None):
                merged = ask_merged(questions, self._own)
            self._tokenizer(questions, merged, source)
            self._outputs(probes, heard, merged)
            if heard is not None and heard.written is not None and merged.choices is not None:
                found, self.evidence["greedy"] = judge_written(
                    heard.written,
                    heard.reading.largest_change,
                    merged,
                    tokenizer,
                    shown=begun.shown if begun is not None else (),
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
            text = f"{len(found.batch)} documents were compared: {found.source}"
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
        """What is continued greedily, or answered: by the kinds that write text from text or from sounds."""
        kind, count = self.subject.kind, self.settings.greedy_prompts
        rows, places = vocabulary(self.subject.adapted), positions(self.subject.adapted.config)
        # prompt and continuation share the model's positions, of which there may be few
        length = min(self.settings.greedy_tokens, places // 2)
        if kind is Kind.SPEECH and count and length:
            return replace(spoken(probes.batch, probes.names, count), length=length)
        if kind not in (Kind.CAUSAL, Kind.SEQ2SEQ) or rows is None or not count or not length:
            if kind is Kind.VISION_TEXT:
                self.findings.append(note("greedy", "", f"greedy text of a {kind} model was not compared"))
            return None
        found = None
        if tokenizer is not None:
            found = beginnings(
                texts,
                tokenizer,
                count=count,
                vocabulary=rows,
                limit=places - length,
                encoder=kind is Kind.SEQ2SEQ,
            )
            if found is None:
                found = first_tokens(texts, tokenizer, count=count, vocabulary=rows, limit=places - length)
        elif (cut := prompts(probes.batch, count, longest=places - length)) is not None:
            found = Beginnings(cut, ())
        return replace(found, length=length) if found is not None else None

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

    def _heard(
        self, probes: Probes, tail: Tail | None, begun: Beginnings | None, place: Path
    ) -> Heard | None:
        """The arms of this process; None, and the answer left open, where base + adapter itself cannot be run."""
        try:
            return self._listen(probes, tail, begun, place)
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            if ran_out_of_memory(error):
                raise  # of the machine, not of the model
            text = (
                f"outputs were not compared: base + adapter ({self.subject.kind}) cannot be run on "
                f"{probes.source}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            self.findings.append(undecided("outputs", "", text))
            return None

    def _listen(self, probes: Probes, tail: Tail | None, begun: Beginnings | None, place: Path) -> Heard:
        subject, settings = self.subject, self.settings
        plain = load_base(
            subject.base_folder,
            subject.kind,
            subject.files,
            trust_remote_code=self._trust,
        )
        stack_layers(plain.model, subject.sources)
        setting = Setting(
            subject.kind,
            subject.storage,
            torch.device(self.device),
            settings.confidence,
            settings.seed,
            place,
            tail,
        )
        arms = ReferenceArms(subject.adapted, plain.model, subject.expected, subject.known, setting)
        faults = settings.full_mutants and bool(subject.outcomes)
        count = len(probes.batch)
        # a number asked for is a number read; and M reads all documents where its weights leave something open
        whole = settings.probe_tokens is not None or faults or not subject.settled
        reading = arms.read(
            self._divided(probes.batch),
            (count,) if whole else rounds(count, settings.confidence),
            kept=count if faults else self._told(count),
            with_ceiling=not subject.settled,
            progress=self.progress,
        )
        self.findings += [undecided("outputs", path, _UNHEARD) for path in arms.unheard()]
        written = None
        if begun is not None:
            written = arms.write(begun.batch, begun.length, self.progress)
        if faults:
            outcomes = arms.inject(reading, subject.outcomes, self.progress)
            self.evidence["mutants"] = [outcome.as_json() for outcome in outcomes]
        return Heard(reading, written)

    def _told(self, documents: int) -> int:
        """How many of them the merged model reads: those of the first round where only loading remains to be seen."""
        if not self.subject.settled:
            return documents
        return min(documents, first_round(self.settings.confidence))

    def _divided(self, batch: Batch) -> Batch:
        """The same documents, in passes that the merged model's can equal."""
        cuts = (self._told(len(batch)),) if self._told(len(batch)) < len(batch) else ()
        rows = vocabulary(self.subject.adapted) if self.subject.kind in LANGUAGE else None
        return replace(batch, cuts=cuts, classes=rows or 1)

    def _questions(
        self,
        texts: tuple[Probe, ...],
        source: Path | None,
        probes: Probes | None,
        heard: Heard | None,
        tail: Tail | None,
    ) -> Questions:
        batch: Batch | None = None
        written = heard.written if heard is not None else None
        if probes is not None and heard is not None:
            batch = self._divided(probes.batch).part(0, self._told(len(probes.batch)))
        return Questions(
            folder=self.subject.merged,
            kind=self.subject.kind,
            device=self.device,
            batch=batch,
            greedy=(written.prompts, written.text) if written is not None else None,
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

    def _likelihood(self, reading: Reading) -> None:
        """How well base + adapter and base alone predict the probes: a sign of a foreign base."""
        if reading.nats is None or not all(map(math.isfinite, reading.nats)):
            return
        adapted, base = reading.nats
        self.evidence["outputs"]["nats_per_token"] = {
            "adapted": float(f"{adapted:.4g}"),
            "base": float(f"{base:.4g}"),
        }
        self.findings += judge_likelihood(adapted, base, reading.reference.shape[-1])

    def _outputs(self, probes: Probes | None, heard: Heard | None, merged: Merged) -> None:
        if (unheard := merged.unheard()) is not None:
            self.findings.append(unheard)
            self.evidence["outputs"] = {"verdict": str(verdict([unheard]))}
        elif not self.settings.outputs:
            self.findings.append(undecided("outputs", "", "the outputs were not compared, as asked"))
        elif heard is not None and probes is not None and merged.answers is not None:
            part = judge_outputs(
                heard.reading,
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
            if part.evidence and self.subject.kind is Kind.CAUSAL and probes.source == "text":
                self._likelihood(heard.reading)
