"""The merged model alone, in a process of its own: `python -I -m merge_adapter.verify.arm JOB`.

A user of the merged repository has plain transformers and no PEFT. This process is such a user: PEFT cannot be
imported, no network call is made, nothing of the verifying process's memory is shared. JOB is a folder with
`job.json` and `inputs.safetensors`; the process leaves `answers.safetensors` and `result.json` there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Run one job. Any failure ends up in result.json under `error`, and in the exit status."""
    # None makes every `import peft` fail, and transformers then believes it is not installed
    sys.modules["peft"] = None  # type: ignore[assignment]
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    try:
        work(folder, job, result)
    except Exception as error:  # noqa: BLE001 - whatever the foreign model does is the answer
        result["error"] = f"{type(error).__name__}: {error}"
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def work(folder: Path, job: dict[str, Any], result: dict[str, Any]) -> None:
    """The job itself; fills `result` and leaves answers.safetensors."""
    import torch
    from safetensors.torch import load_file, save_file

    from merge_adapter.verify.answers import Batch, answer, greedy, taught
    from merge_adapter.verify.lazy import widen
    from merge_adapter.verify.loading import Kind, load_model

    torch.set_num_threads(job["threads"])
    if job["tokenizer"]:
        from merge_adapter.verify.tokens import survey

        result["tokenizer"] = survey(
            Path(job["merged"]), job["texts"], job["conversations"], trust=job["trust"]
        )
    inputs = load_file(folder / "inputs.safetensors")
    if "ids" not in inputs:
        return
    kind = Kind(job["kind"])
    loaded = load_model(
        Path(job["merged"]), kind, dtype=getattr(torch, job["dtype"]), trust_remote_code=job["trust"]
    )
    result["missing"] = list(loaded.missing)
    result["mismatched"] = list(loaded.mismatched)
    device = torch.device(job["device"])
    widen(loaded.model, device)
    batch = Batch(inputs["ids"], inputs["mask"])
    answers = [answer(loaded.model, kind, piece, device) for piece in batch.parts()]
    tensors = {"answers": torch.cat(answers)}
    if "prompts" in inputs:
        prompts = Batch(inputs["prompts"], torch.ones_like(inputs["prompts"]))
        tensors["choices"] = taught(loaded.model, prompts, inputs["continuation"], device)
        if not torch.equal(tensors["choices"], inputs["continuation"]):
            ids, _ = greedy(loaded.model, prompts, inputs["continuation"].shape[1], device)
            tensors["written"] = ids
    save_file(tensors, folder / "answers.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
