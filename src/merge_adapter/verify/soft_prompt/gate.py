"""The gate for a soft prompt that became tokens: is the merged model, with those tokens in front, base + prompt?

    R   PEFT's model: the base with the learned prompt before its input
    B   the base alone
    O   PEFT's model with the prompt rounded once to the stored dtype: what rounding costs
    M   the merged folder, in a fresh process without PEFT, its own tokens in front

All of them answer at the positions of the text, over the tokens of the base; M's new tokens are left out of the
comparison, and what they take is measured. Weights: every row that the base has must be the base's, every new input row
the prompt's, rounded once. New output rows must be the mean of the others: then no input can make one of them the
likeliest, and each has at most 1 / vocabulary of what the others have (Jensen's inequality).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.errors import BaseModelError, MalformedError, MethodError, NotFoundError
from merge_adapter.types import Progress, Resolved, Verification
from merge_adapter.verify.findings import Finding, fault, reasons, undecided, verdict, warning
from merge_adapter.verify.memory.lazy import widen
from merge_adapter.verify.models.adapters import adapter_folder, read_adapter
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.loading import (
    Loaded,
    base_folder,
    base_layout,
    load_base,
    load_model,
    read_json,
)
from merge_adapter.verify.models.storage import Checkpoint
from merge_adapter.verify.outputs.answers import answer, greedy
from merge_adapter.verify.outputs.asked import domain_findings, probes_section, texts_of
from merge_adapter.verify.outputs.fronted import Fronted
from merge_adapter.verify.outputs.greedy import judge_greedy
from merge_adapter.verify.outputs.judging import Arms, judge_outputs
from merge_adapter.verify.outputs.separate import Merged, Questions, ask_merged
from merge_adapter.verify.probes import Probe, shipped
from merge_adapter.verify.probes.batch import Batch
from merge_adapter.verify.probes.batches import Probes, positions, tokenized
from merge_adapter.verify.probes.beginnings import Beginnings, beginnings, first_tokens, of_one_length
from merge_adapter.verify.repository.configs import judge_configs
from merge_adapter.verify.repository.files import judge_files
from merge_adapter.verify.repository.tokens import load_tokenizer, survey, tokenizer_folder
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.soft_prompt.rows import judge_rows, measured_scale, prompt_faults
from merge_adapter.verify.soft_prompt.tokens import judge_rendered, judge_tokens
from merge_adapter.verify.weights.mutants import judge_mutants

_PROMPT = "prompt_embeddings"


class SoftPromptGate:
    """One verification. `run` may be called once."""

    def __init__(self, merged: Path, sources: Resolved, settings: VerifySettings, progress: Progress) -> None:
        self.merged = merged
        self.sources = sources
        self.settings = settings
        self.progress = progress
        self.findings: list[Finding] = []
        self.evidence: dict[str, Any] = {}
        self.device = torch.device("cpu" if settings.device == "auto" else settings.device)
        self._trust = settings.trust_remote_code

    def run(self) -> Verification:
        """All parts in order. See `merge_adapter.verify.verify`."""
        if not self.merged.is_dir():
            raise NotFoundError(
                f"no such folder: {self.merged}", hint="Name the folder that holds the merged model."
            )
        started = time.monotonic()
        with ExitStack() as stack:
            self._judge(stack)
        self.evidence["seconds"] = {"all": round(time.monotonic() - started, 2)}
        return Verification(verdict(self.findings), reasons(self.findings), self.evidence)

    def _judge(self, stack: ExitStack) -> None:
        repository = self.sources.base.repository
        weights = base_layout(repository)
        folder = base_folder(repository, weights)
        held = stack.enter_context(Checkpoint(folder, weights.files))
        headers = judge_files(self.merged, held, dtype=self.settings.dtype)
        self.findings += headers.findings
        self.evidence["files"] = {
            "verdict": str(verdict(headers.findings)),
            "tensors": headers.tensors,
            "bytes": headers.bytes,
            "dtypes": list(headers.dtypes),
        }
        if headers.layout is None:
            return
        with self.progress.task("Loading base and merged model", None):
            base = load_base(folder, Kind.CAUSAL, (), trust_remote_code=self._trust)
            merged = self._load_merged()
        if merged is None:
            return
        file = read_adapter(self.sources.adapter)
        prompt = file.tensors.get(_PROMPT)
        if prompt is None or len(file.tensors) != 1:
            self.findings.append(fault("adapter", "", "holds more or less than one prompt_embeddings"))
            return
        front = self._tokenizer(len(prompt), stack)
        if front is None:
            return
        self._config(merged, base, front)
        self._weights(base.model, merged.model, prompt, front)
        storage = (
            merged.model.get_input_embeddings().weight.dtype
        )  # the prompt's rows are stored with the others
        self._mutants(prompt, storage)
        del merged
        self._outputs(base.model, prompt, front, storage, stack)

    def _load_merged(self) -> Loaded | None:
        try:
            merged = load_model(self.merged, Kind.CAUSAL, trust_remote_code=self._trust)
        except (BaseModelError, MalformedError, NotFoundError) as error:
            self.findings.append(fault("files", "", error.message))
            return None
        for name in (*merged.missing, *merged.mismatched)[:5]:
            self.findings.append(fault("files", name, "is missing, or not of the shape its config calls for"))
        return merged

    # -------------------------------------------------------------------------------------- tokens

    def _tokenizer(self, count: int, stack: ExitStack) -> tuple[int, ...] | None:
        """The ids that the merged tokenizer puts in front; None when it does not put `count` there."""
        source = tokenizer_folder(self.sources, stack)
        if source is None:
            self.findings.append(undecided("tokenizer", "", "adapter and base have no tokenizer"))
            return None
        texts = [probe.plain() for probe in shipped()]
        turns = [[dict(turn) for turn in probe.messages] for probe in shipped() if probe.messages]
        plain = survey(source, texts, turns, trust=self._trust)
        found = survey(self.merged, texts, turns, trust=self._trust)
        findings = list(judge_tokens(plain, found, count))
        if not findings:
            loaded = load_tokenizer(self.merged, trust=self._trust)
            findings = list(judge_rendered(loaded, load_tokenizer(source, trust=self._trust), plain, found))
        self.findings += findings
        self.evidence["tokenizer"] = {
            "verdict": str(verdict(findings)),
            "texts": len(texts),
            "conversations": len(turns),
            "size": found.get("size"),
            "template": found.get("template"),
            "findings": [str(finding) for finding in findings],
        }
        return None if findings else tuple(found["encoded"][0][:count])

    def _config(self, merged: Loaded, base: Loaded, front: tuple[int, ...]) -> None:
        config = read_json(self.merged / "config.json")
        self.findings += judge_configs(
            config,
            self.sources.base.config,
            merged_model=merged.model,
            base_model=base.model,
            labels=None,
            asked=self.settings.dtype,
        )
        try:
            suppressed = json.loads((self.merged / "generation_config.json").read_text())["suppress_tokens"]
        except (OSError, ValueError, KeyError, TypeError):
            suppressed = []
        if not set(front) <= set(suppressed if isinstance(suppressed, list) else ()):
            text = "does not suppress the tokens of the prompt: sampled text could hold one"
            self.findings.append(warning("config", "generation_config.json", text))

    def _weights(self, base: Any, merged: Any, prompt: Tensor, front: tuple[int, ...]) -> None:
        findings, count = judge_rows(base, merged, prompt, front)
        wrong = len({finding.subject for finding in findings})
        self.findings += findings
        self.evidence["weights"] = {
            "verdict": str(verdict(findings)),
            "tensors": count,
            "updated": 2,
            "replaced": 0,
            "kept": count - 2,
            "agreement": {"exact": count - wrong, "wrong": wrong},
        }

    def _mutants(self, prompt: Tensor, storage: torch.dtype) -> None:
        outcomes = prompt_faults(prompt, storage)
        self.evidence["mutants"] = [outcome.as_json() for outcome in outcomes]
        self.findings += judge_mutants(outcomes)

    # ------------------------------------------------------------------------------------- outputs

    def _outputs(
        self, base: Any, prompt: Tensor, front: tuple[int, ...], storage: torch.dtype, stack: ExitStack
    ) -> None:
        if not self.settings.outputs:
            self.findings.append(undecided("outputs", "", "the outputs were not compared, as asked"))
            return
        tokenizer = load_tokenizer(tokenizer_folder(self.sources, stack), trust=self._trust)
        texts = texts_of(self.settings)
        self.findings += domain_findings(self.settings, self.sources)
        probes = tokenized(
            texts.asked,
            tokenizer,
            budget=self.settings.tokens(str(self.device)),
            vocabulary=min(front[0], int(base.get_input_embeddings().weight.shape[0])),
            limit=max(1, positions(base.config) - len(front)),
        )
        self.evidence["probes"] = probes_section(probes, self.settings)
        begun = self._begun(texts.shown, tokenizer, base, front)
        arms = self._arms(base, prompt, front, storage, probes, begun)
        with self.progress.task("Running the merged model on its own", None):
            merged = ask_merged(self._questions(probes, arms, front))
        if (unheard := merged.unheard()) is not None:
            self.findings.append(unheard)
            self.evidence["outputs"] = {"verdict": str(verdict([unheard]))}
            return
        assert merged.answers is not None
        part = judge_outputs(
            arms,
            merged.answers,
            Kind.CAUSAL,
            probes.batch,
            names=probes.names,
            confidence=self.settings.confidence,
            seed=self.settings.seed,
        )
        limit = len(front) / front[0]  # the mean is that of the tokens before them
        part.findings += _judge_mass(merged, limit)
        self.findings += part.findings
        self.evidence["outputs"] = {
            "verdict": str(verdict(part.findings)),
            **part.evidence,
            "prompt_tokens": {
                "count": len(front),
                "limit": limit,
                **merged.front,
            },
        }
        if arms.greedy is not None and merged.choices is not None:
            shown = begun.shown if begun is not None else ()
            found, self.evidence["greedy"] = judge_greedy(arms, merged, tokenizer, shown=shown)
            self.findings += found

    def _begun(
        self, texts: tuple[Probe, ...], tokenizer: Any, base: Any, front: tuple[int, ...]
    ) -> Beginnings | None:
        """What is continued: whole sentences and turns of one length, else the first tokens of the texts."""
        count, length = self.settings.greedy_prompts, self.settings.greedy_tokens
        if not count or not length:
            return None
        rows = min(front[0], int(base.get_input_embeddings().weight.shape[0]))
        limit = positions(base.config) - len(front) - length
        found = beginnings(texts, tokenizer, count=len(texts), vocabulary=rows, limit=limit, encoder=False)
        alike = of_one_length(found, count) if found is not None else None
        if alike is not None:
            return alike
        return first_tokens(texts, tokenizer, count=count, vocabulary=rows, limit=limit)

    def _arms(
        self,
        base: Any,
        prompt: Tensor,
        front: tuple[int, ...],
        storage: torch.dtype,
        probes: Probes,
        told: Beginnings | None,
    ) -> Arms:
        """R, O and B, on one load of the base."""
        widen(base, self.device)
        model = _prompted(base, self.sources, self.device)
        theirs = model.prompt_encoder[model.active_adapter].embedding
        if not torch.equal(theirs.weight.detach().cpu().float(), prompt.float()):
            self.findings.append(
                undecided("adapter", "", "PEFT holds another prompt than the adapter's file")
            )
        reading = Fronted(model, front=(), count=len(front), hidden=front)
        plain = Fronted(base, front=(), count=0, hidden=front)
        begun = told.batch if told is not None else None
        with self.progress.task("Running the reference", None):
            theirs.weight.data = prompt.float().to(self.device)
            reference = self._ask(reading, probes.batch)
            written = greedy(reading, begun, self.settings.greedy_tokens, self.device) if begun else None
            alone = self._ask(plain, probes.batch)
            base_written = (
                greedy(plain, begun, self.settings.greedy_tokens, self.device)[0] if begun else None
            )
            scale = measured_scale(base.get_input_embeddings())
            theirs.weight.data = (
                ((prompt.double() / scale).to(storage).double() * scale).float().to(self.device)
            )
            oracle = self._ask(reading, probes.batch)
        texts = (begun, *written) if begun is not None and written is not None else None
        return Arms(reference, alone, oracle, None, texts, base_written)

    def _ask(self, model: Fronted, batch: Batch) -> Tensor:
        return torch.cat([answer(model, Kind.CAUSAL, piece, self.device) for piece in batch.parts()])

    def _questions(self, probes: Probes, arms: Arms, front: tuple[int, ...]) -> Questions:
        return Questions(
            folder=self.merged,
            kind=Kind.CAUSAL,
            device=str(self.device),
            batch=probes.batch,
            greedy=arms.greedy[:2] if arms.greedy is not None else None,
            sentences=False,
            texts=(),
            conversations=(),
            tokenizer=False,
            trust=self._trust,
            timeout=self.settings.timeout,
            isolated=self.settings.isolated,
            front=front,
        )


def _prompted(base: Any, sources: Resolved, device: torch.device) -> Any:
    """PEFT's model over `base`. Raises MethodError when PEFT refuses."""
    import warnings

    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = adapter_folder(sources.adapter.repository)
            return PeftModel.from_pretrained(base, folder, torch_device=str(device)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise MethodError(f"PEFT cannot put this prompt before its base: {error}") from error


def _judge_mass(merged: Merged, limit: float) -> Iterator[Finding]:
    """What the new tokens take of the probability, and whether one is ever the first choice."""
    chosen, mass = int(merged.front.get("chosen", 0)), float(merged.front.get("mass", 1.0))
    if chosen:
        yield fault("outputs", "", f"a token of the prompt is the first choice at {chosen} positions")
    # the rows are rounded to the stored dtype, which moves their logits a little
    if mass > 1.1 * limit:
        text = f"the prompt's tokens have a probability of {mass:.2g} where at most {limit:.2g} is allowed"
        yield fault("outputs", "", text)
