"""The demo's story: push an adapter, and find its merged model offered as a pull request.

Nothing in it is played: a Hub process with git and large-file storage, the real huggingface_hub client, a
webhook delivered over HTTP to the bot of `merge-adapter serve`, its queue and its worker, which runs
`merge-adapter run` in a process of its own, and really trained models.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from merge_adapter.demo.following import find_push, follow, repeat, report_of
from merge_adapter.errors import HubError, InputError, NotEquivalentError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from merge_adapter.bot.jobs import Job
    from merge_adapter.bot.server import RunningBot

ASSETS = Path(__file__).parent / "assets"
BASE, ADAPTER = ASSETS / "base", ASSETS / "adapter"
BASE_ID, ADAPTER_ID = "demo/pydoc-llama", "demo/pydoc-llama-answers"
OWNER, BOT = "ada", "merge-bot"
"""Users: one who trains models, and the bot. Both belong to the organisation `demo`."""
DELIVERY_SECONDS = 120.0
"""How long a webhook may take; it arrives within a second."""
_NEEDED = ("fastapi", "uvicorn", "jinja2", "pygit2", "lz4", "jwt", "cryptography")
"""Modules of the extra `demo` that the embedded Hub and the bot run on."""


def run_demo(*, keep: bool, console: Console) -> None:
    """Play the whole job on an embedded Hub in a temporary folder and print it stage by stage.

    With `keep` the Hub stays up until Ctrl-C. Raises InputError when the extra `demo` is not installed,
    NotEquivalentError when the gate does not pass the merge, and whatever a stage raises.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"the embedded Hub needs packages that are not installed: {', '.join(missing)}",
            hint="Install them: pip install 'merge-adapter[demo]'",
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="merge-adapter-demo-") as name, _own_client_home(Path(name)):
        _Story(console, Path(name)).tell(keep=keep, started=started)


@contextmanager
def _own_client_home(place: Path) -> Iterator[None]:
    """Caches and settings of the Hub's client below `place`: the demo touches none of the user's.

    The client reads them when it is first imported, which is after this. Its chunk cache must not outlive
    the Hub: the client would skip uploads of chunks that a later Hub does not have.
    """
    settings = {
        "HF_HOME": str(place / "client"),
        "HF_XET_CACHE": str(place / "client" / "xet"),
        "HF_HUB_CACHE": str(place / "client" / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{
            name: ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
            for name in ("NO_PROXY", "no_proxy")  # programs read one or the other
        },
    }
    before = {name: os.environ.get(name) for name in (*settings, "HF_ENDPOINT")}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Story:
    """The stages in order, each printed as it happens."""

    def __init__(self, console: Console, place: Path) -> None:
        self._console = console
        self._place = place
        self._tokens = {name: f"hf_{secrets.token_hex(17)}" for name in (OWNER, BOT)}
        self._stage = 0

    def tell(self, *, keep: bool, started: float) -> None:
        from localhub.process import LocalHub

        self._begin("An embedded Hub")
        organizations = {"demo": [f"{OWNER}:admin", f"{BOT}:write"]}
        secret = secrets.token_hex(16)
        with (
            LocalHub(self._place / "hub", self._tokens, organizations) as hub,
            self._bot(hub.url, secret) as bot,
        ):
            os.environ["HF_ENDPOINT"] = hub.url
            self._fact("at", hub.url)
            self._fact("users", f"{OWNER}, who trains models, and {BOT}, both of the organisation demo")
            self._watch(hub.url, bot, secret)
            sha = self._push(hub.url)
            job = self._await(bot, sha)
            report = self._merge(bot, job)
            self._published(report)
            self._compare(hub.url, report["publication"])
            self._repeat(bot, job)
            url = report["publication"]["url"]
            self._console.print()
            self._console.print(Text.assemble(("Pull request  ", "bold"), (url, "bold cyan")))
            self._console.print(Text(f"All of it took {time.monotonic() - started:.0f} s.", style="dim"))
            if keep:
                self._stay(bot)
            else:
                self._console.print(
                    Text("The Hub is gone now; merge-adapter demo --keep leaves it up.", style="dim")
                )

    def _bot(self, endpoint: str, secret: str) -> AbstractContextManager[RunningBot]:
        """The bot, as `merge-adapter serve` runs it, with one worker."""
        from merge_adapter.bot.server import start
        from merge_adapter.bot.settings import BotSettings

        (self._place / "bot").mkdir()
        return start(
            BotSettings(
                data=self._place / "bot",
                port=0,
                endpoint=endpoint,
                token=self._tokens[BOT],
                webhook_secret=secret,
                watch=("demo",),
                log_file=str(self._place / "bot" / "log.jsonl"),
            )
        )

    def _watch(self, endpoint: str, bot: RunningBot, secret: str) -> None:
        self._begin("A bot that watches what is pushed to demo/*")
        self._api(endpoint, BOT).create_webhook(
            url=bot.webhook_url, watched=[{"type": "org", "name": "demo"}], domains=["repo"], secret=secret
        )
        self._fact("webhook to", bot.webhook_url)

    def _push(self, endpoint: str) -> str:
        """Upload both; returns the commit of the adapter, for which the webhook is to come."""
        self._begin(f"{OWNER} pushes a base model and an adapter")
        self._upload(endpoint, BASE_ID, BASE)
        return self._upload(endpoint, ADAPTER_ID, ADAPTER)

    def _upload(self, endpoint: str, repo_id: str, folder: Path) -> str:
        api = self._api(endpoint, OWNER)
        api.create_repo(repo_id)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload what was trained"
        )
        size = sum(path.stat().st_size for path in folder.iterdir())
        self._fact(repo_id, f"{size / 1e6:.1f} MB, commit {commit.oid[:12]}")
        return str(commit.oid)

    def _await(self, bot: RunningBot, sha: str) -> Job:
        """Wait for the job of the adapter's push; other pushes, such as the base model's, start none."""
        self._begin("The webhook arrives, and becomes a job")
        job = find_push(bot, ADAPTER_ID, sha, seconds=DELIVERY_SECONDS)
        if job is None:
            raise HubError(
                f"no webhook told of the push to {ADAPTER_ID} within {DELIVERY_SECONDS:.0f} s",
                hint="Something on this machine may block connections to 127.0.0.1.",
            )
        self._fact("push", f"{ADAPTER_ID} at {sha[:12]}")
        self._fact("job", f"{job.id}, on the bot's page: {bot.url}/jobs/{job.id}")
        return job

    def _merge(self, bot: RunningBot, job: Job) -> dict[str, Any]:
        """Watch the job run; its report."""
        self._begin(f"{BOT} runs: merge-adapter run {ADAPTER_ID}")
        from merge_adapter.report.progress import progress_for
        from merge_adapter.report.terminal import show_verdict

        ended = follow(bot, job.id, progress_for(self._console, quiet=False))
        report = report_of(bot, ended)
        if report is not None:
            show_verdict(self._console, report["verification"])
        if ended.verdict != "pass" or report is None or "publication" not in report:
            raise NotEquivalentError(
                f"the job of the demo's own models ended as {ended.state.value}: {ended.message}",
                hint=f"The merge of the shipped models should pass: please report this. {ended.hint}".rstrip(),
            )
        return report

    def _published(self, report: dict[str, Any]) -> None:
        from merge_adapter.report.document import REPORT_FILE

        self._begin("A pull request with weights, tokenizer, card and report")
        publication = report["publication"]
        self._fact("repository", publication["repo"])
        paths = [*(entry["path"] for entry in report["output"]["files"]), REPORT_FILE]
        self._fact("files", ", ".join(sorted(paths)))
        self._fact("state", "draft" if publication["draft"] else "open, ready to merge")

    def _compare(self, endpoint: str, publication: dict[str, Any]) -> None:
        self._begin("The pull request's model, downloaded and loaded without PEFT")
        from merge_adapter.demo.samples import write_samples

        folder = self._api(endpoint, OWNER).snapshot_download(
            publication["repo"], revision=publication["commit"]
        )
        table = Table(show_lines=True, header_style="bold", expand=True)
        for heading in ("asked", "base", "base + adapter", "merged"):
            table.add_column(heading, overflow="fold", ratio=1)
        samples = write_samples(BASE, ADAPTER, Path(folder))
        for sample in samples:
            cells = (sample.question, sample.base, sample.adapted, sample.merged)
            table.add_row(*(Text(cell) for cell in cells))
        self._console.print(table)
        same = sum(sample.adapted == sample.merged for sample in samples)
        self._fact("same words", f"{same} of {len(samples)} answers of base + adapter and of merged")

    def _repeat(self, bot: RunningBot, job: Job) -> None:
        self._begin("The same asked for again")
        again = repeat(bot, job)
        publication = again.publication or {}
        self._fact("published", str(publication.get("operation", again.state.value)))

    def _stay(self, bot: RunningBot) -> None:
        self._console.print(
            Text(f"The Hub stays up, and the bot's page at {bot.url}. Ctrl-C ends them.", style="bold")
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            self._console.print(Text("Ended.", style="dim"))

    def _api(self, endpoint: str, user: str) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=endpoint, token=self._tokens[user])

    def _begin(self, title: str) -> None:
        self._stage += 1
        self._console.print()
        self._console.print(Text(f"{self._stage}. {title}", style="bold"))

    def _fact(self, name: str, value: str) -> None:
        self._console.print(Text.assemble((f"   {name}  ", "dim"), value))
