"""`make soak`: kill the bot's server and workers at random moments, and count what is left on the Hub.

Adapters are pushed to an embedded Hub, whose webhooks call a bot that is killed with SIGKILL, the server or its worker
or a merge, every few seconds, and started again; webhooks are replayed and forged meanwhile. In the end every
adapter must have exactly one pull request, ready, of its own commit. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from localhub.process import LocalHub
from merge_adapter.bot.jobs import JobState
from merge_adapter.bot.probe import payload
from merge_adapter.bot.rows import count_jobs, list_jobs
from merge_adapter.bot.store import Store

ASSETS = Path(__file__).parents[1] / "src" / "merge_adapter" / "demo" / "assets"
SECRET = "soak"
USER, TOKEN = "ada", "hf_ada"
BASE = "demo/pydoc-llama"


@dataclass
class Bot:
    """A bot that is killed and started again on the same folder and port."""

    config: Path
    log: Path
    process: subprocess.Popen[str] | None = None
    url: str = ""
    kills: Counter[str] = field(default_factory=Counter)

    def ensure(self) -> None:
        """Start it when it does not run, and again when it does not come up, as a supervisor would."""
        for wait in (0.0, 1.0, 5.0, 30.0):
            if self.process is not None and self.process.poll() is None and self.url:
                return
            time.sleep(wait)
            self._start()
            if not self.url:
                self.kills["failed start"] += 1
                _tell(f"the server did not start: {self.last_words()}")
        if not self.url:
            raise RuntimeError(f"the server does not start: {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-1500:]

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "merge_adapter", "serve", "--config", str(self.config)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.process.stdout.close()
        if not self.url:
            self.process.wait()

    def kill_something(self, dice: random.Random) -> None:
        """SIGKILL to the server, its worker, or a merge."""
        assert self.process is not None
        with suppress(psutil.Error):
            server = psutil.Process(self.process.pid)
            targets = {"server": [server], "worker": server.children()}
            targets["merge"] = [child for worker in targets["worker"] for child in worker.children()]
            kind = dice.choice([name for name, found in targets.items() if found])
            dice.choice(targets[kind]).kill()
            self.kills[kind] += 1
            if kind == "server":
                self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(90)


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended as by Ctrl-C, and no bot is left behind
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="merge-adapter-soak-") as name, _own_caches(Path(name)):
        place = Path(name)
        with LocalHub(place / "hub", {USER: TOKEN}, {"demo": [USER]}) as hub:
            from huggingface_hub import HfApi

            api = HfApi(endpoint=hub.url, token=TOKEN)
            bot = Bot(_config(place, hub.url, options.workers), place / "bot.log")
            try:
                return _soak(api, bot, place, options, dice)
            finally:
                bot.stop()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills, on average")
    parser.add_argument("--minutes", type=float, default=120.0, help="give up after this long")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@contextmanager
def _own_caches(place: Path) -> Iterator[None]:
    os.environ.update(
        HF_HOME=str(place / "client"), HF_XET_CACHE=str(place / "xet"), HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    yield


def _config(place: Path, hub_url: str, workers: int) -> Path:
    settings = {
        "data": str(place / "bot"),
        "port": 0,
        "endpoint": hub_url,
        "token": TOKEN,
        "webhook_secret": SECRET,
        "watch": [USER],
        "workers": workers,
        "lease_seconds": 5.0,
        "attempts": 1000,
        "first_wait": 1.0,
        "longest_wait": 5.0,
    }
    path = place / "bot.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return path


def _soak(api: Any, bot: Bot, place: Path, options: argparse.Namespace, dice: random.Random) -> int:
    api.create_repo(BASE)
    api.upload_folder(repo_id=BASE, folder_path=ASSETS / "base")
    bot.ensure()
    pushed = _push_all(api, bot, options.adapters, dice)
    deadline = time.monotonic() + options.minutes * 60
    with Store(place / "bot" / "bot.sqlite3") as store:
        while time.monotonic() < deadline:
            _pause(dice.expovariate(1 / options.every), bot)
            bot.ensure()
            _noise(bot, dice, pushed)
            counts = {state.value: number for state, number in count_jobs(store).items()}
            _tell(f"{counts}, killed {dict(bot.kills)}")
            if not counts.get("queued") and not counts.get("running"):
                break  # done, or ended otherwise, which is judged
            bot.kill_something(dice)
        bot.ensure()
        return _judge(api, store, pushed, bot)


def _push_all(api: Any, bot: Bot, number: int, dice: random.Random) -> dict[str, str]:
    """Push the adapters and tell the bot of each, in any order; repository -> commit."""
    pushed: dict[str, str] = {}
    for index in range(number):
        repo_id = f"{USER}/soak-{index:03}"
        api.create_repo(repo_id)
        pushed[repo_id] = api.upload_folder(repo_id=repo_id, folder_path=ASSETS / "adapter").oid
    names = list(pushed)
    dice.shuffle(names)
    for repo_id in names:
        while _send(bot, repo_id, pushed[repo_id]) not in (200, 202):
            bot.ensure()
    return pushed


def _noise(bot: Bot, dice: random.Random, pushed: dict[str, str]) -> None:
    """A replay, a forgery, and a push of a commit that was never made."""
    repo_id = dice.choice(list(pushed))
    _send(bot, repo_id, pushed[repo_id])
    _send(bot, repo_id, f"{dice.getrandbits(160):040x}", secret="forged")
    _send(bot, repo_id, f"{dice.getrandbits(160):040x}")


def _send(bot: Bot, repo_id: str, sha: str, *, secret: str = SECRET) -> int:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    refs = [{"ref": "refs/heads/main", "oldSha": None, "newSha": sha}]
    body = payload(repo_id, action="update", scope="repo.content", refs=refs)
    request = Request(  # the bot's own address
        f"{bot.url}/webhook", json.dumps(body).encode(), {"X-Webhook-Secret": secret}, method="POST"
    )
    try:
        with urlopen(request, timeout=10) as answer:  # the bot's own address
            return int(answer.status)
    except HTTPError as error:
        error.close()
        return error.code
    except (URLError, OSError):
        return 0


def _pause(seconds: float, bot: Bot) -> None:
    end = time.monotonic() + min(seconds, 60)
    while time.monotonic() < end:
        bot.ensure()
        time.sleep(0.2)


def _judge(api: Any, store: Store, pushed: dict[str, str], bot: Bot) -> int:
    """Compare what the Hub holds with what was pushed."""
    jobs = list_jobs(store, limit=10 * len(pushed))
    problems = [
        f"{job.request.adapter}: {job.state.value} {job.message}"
        for job in jobs
        if job.state is not JobState.DONE
    ]
    problems += [f"{repo_id} has no job" for repo_id in set(pushed) - {job.request.adapter for job in jobs}]
    if len(jobs) > len(pushed):
        problems.append(f"{len(jobs)} jobs for {len(pushed)} adapters")
    for repo_id, sha in pushed.items():
        found = list(api.get_repo_discussions(f"{repo_id}-merged", discussion_type="pull_request"))
        states = [one.status for one in found]
        if states != ["open"]:
            problems.append(f"{repo_id}-merged has pull requests {states}, expected one that is open")
            continue
        report = api.hf_hub_download(
            f"{repo_id}-merged", "merge_report.json", revision=f"refs/pr/{found[0].num}"
        )
        merged = json.loads(Path(report).read_text())
        if merged["adapter"]["revision"] != sha or merged["verification"]["verdict"] != "pass":
            problems.append(f"{repo_id}-merged holds a merge of {merged['adapter']['revision']}")
    attempts = sum(job.attempt for job in jobs)
    _tell(f"{len(pushed)} adapters, {attempts} attempts, killed {dict(bot.kills)}: {len(problems)} problems")
    for problem in problems:
        _tell(problem)
    return 1 if problems else 0


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # this program's output


if __name__ == "__main__":
    sys.exit(main())
