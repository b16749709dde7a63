"""Train every model that ships with the project, from text that ships with Python. Nothing is downloaded.

    python scripts/train_models.py                 all of them, about eight minutes on two cores
    python scripts/train_models.py embedding       only what is named: base, adapter, classifier, embedding

What it writes, in the order it is made (the adapter and the classifier are trained on the base):

    base         src/merge_adapter/demo/assets/base         Llama, about 1 M parameters, bf16, with tokenizer and card
    adapter      src/merge_adapter/demo/assets/adapter      LoRA on every linear layer, with its own chat template
    classifier   tests/assets/classifier_adapter            LoRA and a trained `score` head on that base
    embedding    tests/assets/embedding_adapter             LoRA on all-MiniLM-L6-v2, in sentence-transformers' layout

Seeds and data order are fixed, so that one machine gives the same files again. Other processors, other numbers of
threads and other releases of Python or torch round differently and give other weights of the same quality; the
files in the repository stay as they are until someone runs this and commits the result. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "merge_adapter" / "demo" / "assets"
TESTS = ROOT / "tests" / "assets"
BASE_ID = "demo/pydoc-llama"
EMBEDDING_BASE_ID = "sentence-transformers/all-MiniLM-L6-v2"
SEED = 20261123


def main() -> None:
    """Train what the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    makers: dict[str, Callable[[], None]] = {
        "base": _base,
        "adapter": _adapter,
        "classifier": _classifier,
        "embedding": _embedding,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"of {', '.join(makers)}; all when none is named"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of torch, part of what fixes the result"
    )
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    unknown = set(arguments.models) - set(makers)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; known are {', '.join(makers)}")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(mode=True)
    for name, make in makers.items():
        if name in (arguments.models or makers):
            logging.info("training %s", name)
            started = time.monotonic()
            make()
            logging.info("%s took %.0f s", name, time.monotonic() - started)


def _base() -> None:
    from training import language

    _replace(DEMO / "base", lambda folder: language.train_base(folder, seed=SEED))


def _adapter() -> None:
    from training import language

    _replace(
        DEMO / "adapter",
        lambda folder: language.train_adapter(folder, base=DEMO / "base", base_id=BASE_ID, seed=SEED),
    )


def _classifier() -> None:
    from training import classifier

    _replace(
        TESTS / "classifier_adapter",
        lambda folder: classifier.train(folder, base=DEMO / "base", base_id=BASE_ID, seed=SEED),
    )


def _embedding() -> None:
    from training import embedding

    _replace(
        TESTS / "embedding_adapter",
        lambda folder: embedding.train(folder, base_id=EMBEDDING_BASE_ID, seed=SEED),
    )


def _replace(target: Path, make: Callable[[Path], None]) -> None:
    """Fill a temporary folder, then put it in the target's place: a run that fails leaves the old files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        make(made)
        for path in made.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)


if __name__ == "__main__":
    main()
