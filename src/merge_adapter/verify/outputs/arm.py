"""The merged model alone, in a process of its own: `python -I -m merge_adapter.verify.outputs.arm JOB`.

A user of the merged repository has plain transformers and no PEFT. This process is such a user: PEFT cannot be
imported, no network call is made, nothing of the verifying process's memory is shared. JOB is a folder with
`job.json` and `inputs.safetensors`; the process leaves `answers.safetensors` and `result.json` there.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter.collecting import seldom_collected
from merge_adapter.errors import StorageError, ran_out_of_memory
from merge_adapter.verify.memory.kept import check_room

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.verify.probes.batch import Batch

PAGER = "pager"
"""Socket in the job's folder to ask for weights that are not there yet; absent where all of them are."""

ANSWERS = "answers-"
"""Before the numbers of the files of answers, one for each pass."""

_NEEDED = ("answers", "fronted", "loading", "products", "tokens")
"""Modules beside this one that every job uses."""

MEDIA = "media."
"""Before the names of pictures and sounds among the inputs."""

PROMPTED = "prompted."
"""Before the names of those that belong to the prompts."""


def main(folder: Path) -> None:
    """Run one job. Any failure ends up in result.json."""
    # None makes every `import peft` fail, and transformers then believes it is not installed
    sys.modules["peft"] = None  # type: ignore[assignment]
    _prepare()
    if not sys.stdin.readline():
        return  # the verifying process has gone, or has nothing to ask
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    try:
        if (folder / PAGER).exists():
            from merge_adapter.verify.memory.mapped import paged
            from merge_adapter.verify.outputs.asking import AskingPager

            with AskingPager(folder / PAGER, Path(job["merged"])) as pager, paged(pager):
                work(folder, job, result)
        else:
            work(folder, job, result)
    except Exception as error:  # noqa: BLE001 - whatever the foreign model does is the answer
        result |= failure(error)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def failure(error: Exception) -> dict[str, str]:
    """What an error says: of the model, under `error`, or of a machine with too little room for it, under `stopped`."""
    of_the_machine = isinstance(error, StorageError) or ran_out_of_memory(error)
    return {"stopped" if of_the_machine else "error": f"{type(error).__name__}: {error}"}


def _prepare() -> None:
    """Import what every job needs, while the verifying process does other things."""
    for name in ("transformers.modeling_utils", *(f"merge_adapter.verify.{part}" for part in _NEEDED)):
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - said when it is needed
            return


def work(folder: Path, job: dict[str, Any], result: dict[str, Any]) -> None:
    """The job itself; fills `result` and leaves files of answers, one for each pass."""
    import torch
    from safetensors.torch import load_file

    from merge_adapter.verify.memory.products import fast_products
    from merge_adapter.verify.probes.batch import Batch

    torch.set_num_threads(job["threads"])
    if job["tokenizer"]:
        from merge_adapter.verify.repository.tokens import survey

        result["tokenizer"] = survey(
            Path(job["merged"]), job["texts"], job["conversations"], trust=job["trust"]
        )
    inputs = load_file(folder / "inputs.safetensors")
    if "ids" not in inputs:
        return
    media = {name.removeprefix(MEDIA): value for name, value in inputs.items() if name.startswith(MEDIA)}
    batch = Batch(inputs["ids"], inputs["mask"], media, tuple(job["cuts"]), job["classes"])
    with fast_products(torch.device(job["device"])):
        if job["sentences"]:
            _embed(folder, job, batch)
        else:
            _answer(folder, job, batch, inputs, result)


def _answer(
    folder: Path, job: dict[str, Any], batch: Batch, inputs: dict[str, Tensor], result: dict[str, Any]
) -> None:
    """What plain transformers makes of the folder."""
    import torch
    from safetensors.torch import save_file

    from merge_adapter.verify.memory.lazy import widen
    from merge_adapter.verify.models.kinds import Kind
    from merge_adapter.verify.models.loading import load_model
    from merge_adapter.verify.outputs.answers import answer, continued, taught
    from merge_adapter.verify.outputs.fronted import Fronted
    from merge_adapter.verify.probes.batch import Batch

    kind, device = Kind(job["kind"]), torch.device(job["device"])
    loaded = load_model(Path(job["merged"]), kind, trust_remote_code=job["trust"])
    result["missing"] = list(loaded.missing)
    widen(loaded.model, device)
    model, front = loaded.model, job["front"]
    if front:
        model = Fronted(model, front=front, count=len(front), hidden=front)
    for at, piece in enumerate(batch.parts()):
        _leave(folder, at, answer(model, kind, piece, device))
    if "prompts" in inputs:
        media = {n.removeprefix(PROMPTED): value for n, value in inputs.items() if n.startswith(PROMPTED)}
        prompts, text = Batch(inputs["prompts"], inputs["prompts_mask"], media), inputs["continuation"]
        choices = taught(model, prompts, text, device, kind)
        written = continued(model, prompts, text, choices, device, kind)
        save_file({"choices": choices, "written": written}, folder / "text.safetensors")
    if front:
        result["front"] = {"mass": model.mass, "chosen": model.chosen}


def _embed(folder: Path, job: dict[str, Any], batch: Batch) -> None:
    """What sentence-transformers makes of the folder, pooling and all."""
    import torch

    from merge_adapter.verify.memory.lazy import widen
    from merge_adapter.verify.outputs.sentences import embed_whole, load_whole

    device = torch.device(job["device"])
    model = load_whole(Path(job["merged"]), trust=job["trust"])
    widen(model, device)
    for at, piece in enumerate(batch.parts()):
        _leave(folder, at, embed_whole(model, piece.ids, piece.mask, device))


def _leave(folder: Path, at: int, answers: Tensor) -> None:
    """Write the answers of one pass where the verifying process finds them."""
    from safetensors.torch import save_file

    check_room(folder, answers.nbytes)
    save_file({"answers": answers.contiguous()}, folder / f"{ANSWERS}{at:06}.safetensors")


if __name__ == "__main__":
    with seldom_collected():
        main(Path(sys.argv[1]))
