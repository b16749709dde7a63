"""What a user can choose about a verification. Light: importing this loads no model library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_adapter.types import DType
from merge_adapter.verify.probes.domain import Dataset


@dataclass(frozen=True)
class VerifySettings:
    """Equal settings, sources and merged files give the same verdict and the same numbers on one machine."""

    dtype: DType = DType.AUTO
    """The dtype the merge was asked for. AUTO: the merged tensors must keep the base's; a merge that narrowed
    them unasked fails."""
    probe_tokens: int | None = None
    """Tokens that every arm of the output part reads. None: as many as it takes to show that the adapter does more than
    rounding, 512 at most on a CPU and 2048 on a GPU. Four documents are read in any case; see
    `merge_adapter.verify.outputs.rounds`."""
    probes: Path | None = None
    """The user's own probe documents, one per line, or JSON lines (.jsonl) with a `text` or `messages` key each; they
    come before the ones that ship with the package."""
    dataset_probes: bool = True
    """Whether the pipeline fetches documents of the data sets that the adapter's card names, where `probes` is None."""
    domain: tuple[Dataset, ...] = ()
    """What it found: their documents come before the ones that ship with the package."""
    greedy_tokens: int = 16
    """Length of the greedy continuations, 0 for none. About a sentence; each token reads all weights once more."""
    greedy_prompts: int = 4
    """How many documents are continued."""
    outputs: bool = True
    """False judges files, weights, modules, tokenizer and configs only; the verdict is then inconclusive at best."""
    isolated: bool = True
    """The merged model runs in a process of its own, without PEFT and offline. False runs it in this process:
    sooner done, and it shows less."""
    full_mutants: bool = False
    """True runs every injected fault through the modules and outputs parts too, not the weights part alone."""
    device: str = "cpu"
    """Where the output part computes: `auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:N`."""
    trust_remote_code: bool = False
    """Run the modelling code that the base repository carries."""
    seed: int = 0
    """Of the random vectors, token ids, bootstrap and injected faults."""
    confidence: float = 0.99
    """One-sided level of the bootstrap bounds in the output part."""
    timeout: float = 3600.0
    """Seconds after which the process that runs the merged model is stopped."""

    def tokens(self, device: str) -> int:
        """The number of probe tokens on `device`: of those asked for, or the most that are read."""
        if self.probe_tokens is not None:
            return self.probe_tokens
        return 512 if device == "cpu" else 2048
