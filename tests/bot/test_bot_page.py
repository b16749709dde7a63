"""The page: safe without a browser, and in headless Chromium the whole way from login to pull request."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from merge_adapter.bot.jobs import Job, JobKind, JobOptions, JobRequest, JobState, Outcome, Source
from merge_adapter.bot.pages import login
from merge_adapter.bot.pages.render import static_file
from merge_adapter.bot.queue import Lease, Queue
from merge_adapter.bot.rows import find_job, list_jobs
from merge_adapter.bot.runners.base import LOG_FILE
from merge_adapter.bot.server import RunningBot, start
from merge_adapter.bot.submission import Submitted
from merge_adapter.bot.vault import open_vault
from merge_adapter.errors import StorageError
from merge_adapter.hub.oauth import Login


@pytest.fixture
def bot(settings: Any) -> Iterator[RunningBot]:
    with start(settings) as running:
        yield running


def get(
    bot: RunningBot, path: str, *, cookie: str = "", headers: dict[str, str] | None = None
) -> tuple[int, str, Any]:
    request = Request(f"{bot.url}{path}", headers={"Cookie": cookie, **(headers or {})})
    try:
        with urlopen(request) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def post(
    bot: RunningBot, path: str, fields: str, *, cookie: str = "", origin: str | None = None
) -> tuple[int, str]:
    headers = {"Cookie": cookie, "Content-Type": "application/x-www-form-urlencoded", "HX-Request": "true"}
    request = Request(
        f"{bot.url}{path}", fields.encode(), {**headers, **({"Origin": origin} if origin else {})}
    )
    try:
        with urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


class _Jar:
    """Catches the cookie that a session sets."""

    def set_cookie(self, name: str, value: str, **_: Any) -> None:
        self.cookie = f"{name}={value}"
        self.csrf = login._csrf(value)


def logged_in(bot: RunningBot, user: str, token: str, *, member: str = "", writes: str = "") -> _Jar:
    jar, parts = _Jar(), login.Parts(bot.settings, bot.queue, bot.inbox, open_vault(bot.settings))
    login.begin_session(jar, Login(user, (member,), token, 3600.0, (writes,)), parts)  # type: ignore[arg-type]
    return jar


def running(bot: RunningBot, adapter: str, **changes: Any) -> str:
    """A job that worker "w" has for ever."""
    submission = bot.queue.submit(JobRequest(adapter, "a" * 40, Source.WEBHOOK, private=False, **changes))
    assert isinstance(submission, Submitted)
    for_ever = Queue(bot.queue.store, lease_seconds=1e6)
    while (lease := for_ever.claim("w")) is not None:
        if lease.job.id == submission.job_id:
            return submission.job_id
    raise AssertionError("somebody else has it")


def found_job(bot: RunningBot, job_id: str) -> Job:
    job = find_job(bot.queue.store, job_id)
    assert job is not None
    return job


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def test_what_strangers_wrote_is_shown_as_text(bot: RunningBot) -> None:
    """A message, a log and a link from an untrusted repository cannot become markup."""
    request = JobRequest("ada/x", "a" * 40, Source.WEBHOOK, private=False, options=JobOptions(license="mit"))
    submission = bot.queue.submit(request)
    assert isinstance(submission, Submitted)
    lease = bot.queue.claim("w")
    assert lease is not None
    folder = bot.settings.job_folder(submission.job_id)
    folder.mkdir(parents=True)
    (folder / LOG_FILE).write_text(HOSTILE)
    publication = {"url": "javascript:alert(1)", "operation": HOSTILE}
    bot.queue.finish(lease, Outcome(JobState.REFUSED, 3, HOSTILE, HOSTILE, "fail", publication))
    status, page, headers = get(bot, f"/jobs/{submission.job_id}")
    assert status == 200 and "&lt;script&gt;" in page
    assert "<script>alert" not in page and "<img src=x" not in page and "javascript:" not in page
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert (
        "unsafe" not in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    )
    assert get(bot, f"/jobs?q={'%3Cscript%3E'}&state=nonsense&page=-1")[0] == 200
    assert "<script>alert" not in get(bot, "/%3Cscript%3Ealert(1)%3C/script%3E")[1]


def test_a_job_tells_what_was_chosen_and_whose_token_it_was(bot: RunningBot) -> None:
    """In words of the page: nobody there set HF_TOKEN, and a verification writes nowhere."""
    combined = JobOptions(adapters=("ada/two@v1",), weights=(0.7, 0.3), target_repo="ada/both")
    judged = JobRequest(
        "ada/x", "a" * 40, Source.COMMENT, JobKind.VERIFY, private=False, options=JobOptions(merged="ada/m")
    )
    pages = []
    for request in (JobRequest("ada/x", "a" * 40, Source.WEBHOOK, private=False, options=combined), judged):
        submission = bot.queue.submit(request)
        assert isinstance(submission, Submitted)
        lease = bot.queue.claim("w")
        assert lease is not None
        bot.queue.finish(lease, Outcome(JobState.REFUSED, 2, "the token in HF_TOKEN may not see it"))
        pages.append(get(bot, f"/jobs/{submission.job_id}")[1])
    first, second = pages
    assert "ada/two@v1" in first and "0.7, 0.3" in first and "ada/both" in first
    assert "the bot&#39;s token may not see it" in first and "HF_TOKEN" not in first
    assert "Judges" in second and "ada/m" in second and "verify:" not in second


def test_private_jobs_do_not_exist_for_others(bot: RunningBot) -> None:
    submission = bot.queue.submit(JobRequest("ada/secret-thing", "a" * 40, Source.WEBHOOK, private=True))
    assert isinstance(submission, Submitted)
    eve, ada = logged_in(bot, "eve", "hf_e"), logged_in(bot, "ada", "hf_ada")
    for path in ("", "/live", "/log", "/report", "/report.json"):
        address = f"/jobs/{submission.job_id}{path}"
        assert get(bot, address)[0] == get(bot, address, cookie=eve.cookie)[0] == 404
    assert post(bot, f"/jobs/{submission.job_id}/cancel", f"csrf={eve.csrf}", cookie=eve.cookie)[0] == 404
    assert "secret-thing" in get(bot, f"/jobs/{submission.job_id}", cookie=ada.cookie)[1]
    assert "secret-thing" in get(bot, "/jobs", cookie=ada.cookie)[1]
    assert "secret-thing" not in get(bot, "/jobs", cookie=eve.cookie)[1] + get(bot, "/")[1]


def test_forms_need_a_session_its_token_and_our_origin(bot: RunningBot) -> None:
    submission = bot.queue.submit(JobRequest("ada/x", "a" * 40, Source.WEBHOOK, private=False))
    assert isinstance(submission, Submitted)
    ada, eve = logged_in(bot, "ada", "hf_ada"), logged_in(bot, "eve", "hf_e")
    address = f"/jobs/{submission.job_id}/cancel"
    assert post(bot, address, "csrf=")[0] == 403
    assert post(bot, address, f"csrf={eve.csrf}", cookie=ada.cookie)[0] == 403
    assert post(bot, address, f"csrf={ada.csrf}", cookie=ada.cookie, origin="https://evil.example")[0] == 403
    assert post(bot, address, f"csrf={eve.csrf}", cookie=eve.cookie)[0] == 403
    found = find_job(bot.queue.store, submission.job_id)
    assert found is not None and found.state is JobState.QUEUED
    assert post(bot, address, f"csrf={ada.csrf}", cookie=ada.cookie, origin=bot.url)[0] == 204
    found = find_job(bot.queue.store, submission.job_id)
    assert found is not None and (found.state, found.message) == (JobState.CANCELLED, "cancelled by ada")


def test_reading_members_see_an_organisations_jobs_and_writing_ones_cancel_them(bot: RunningBot) -> None:
    submission = bot.queue.submit(JobRequest("acme/x", "a" * 40, Source.WEBHOOK, private=True))
    assert isinstance(submission, Submitted)
    reader = logged_in(bot, "rae", "hf_r", member="acme")
    writer = logged_in(bot, "wil", "hf_w", member="acme", writes="acme")
    address = f"/jobs/{submission.job_id}"
    assert "Cancel this job" not in get(bot, address, cookie=reader.cookie)[1]
    assert post(bot, f"{address}/cancel", f"csrf={reader.csrf}", cookie=reader.cookie)[0] == 403
    assert "Cancel this job" in get(bot, address, cookie=writer.cookie)[1]
    assert post(bot, f"{address}/cancel", f"csrf={writer.csrf}", cookie=writer.cookie)[0] == 204


def test_the_form_says_what_is_wrong(bot: RunningBot, push_adapter: Any) -> None:
    ada = logged_in(bot, "ada", "hf_ada")
    for fields, message in (
        ("adapter=../../etc", "is not a Hub id"),
        ("adapter=ada/none-such", "ada/none-such"),
        ("adapter=ada/none-such", "your login may not see it"),
        ("adapter=a/b&dtype=int3", "expected one of"),
        ("adapter=a/b&base_model=/etc", "is not a Hub id"),
    ):
        status, text = post(bot, "/jobs", f"{fields}&csrf={ada.csrf}", cookie=ada.cookie)
        assert status in (404, 422) and message in text and 'role="alert"' in text
    assert post(bot, "/plan", "x" * 70_000, cookie=ada.cookie)[0] == 413
    assert list_jobs(bot.queue.store) == []


_SLOW_PLAN = """#!/bin/sh
echo begun >> {folder}/begun
while [ ! -e {folder}/go ]; do sleep 0.1; done
echo '{{"error": {{"message": "no plan", "hint": ""}}}}'
"""


def test_plans_that_wait_their_turn_keep_no_page_waiting(
    bot: RunningBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    """Each user has one made at a time, and there are never more than two; the others wait without a thread."""
    program = tmp_path / "slow"
    program.write_text(_SLOW_PLAN.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    users = [logged_in(bot, name, f"hf_{name}") for name in ("ada", "eve", "rae")]
    asked = [users[0]] * 50 + users[1:]

    def begun() -> int:
        path = tmp_path / "begun"
        return path.read_text().count("begun") if path.exists() else 0

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [
            pool.submit(post, bot, "/plan", f"adapter=ada/x&csrf={one.csrf}", cookie=one.cookie)
            for one in asked
        ]
        try:
            eventually(lambda: begun() == 2)
            with urlopen(f"{bot.url}/health", timeout=60) as health:
                assert health.status == 200
            assert begun() == 2
        finally:
            (tmp_path / "go").touch()
        assert all(answer.result()[0] == 422 for answer in answers)
    assert begun() == len(asked)


def test_what_is_not_the_askers_fault_is_not_called_so(bot: RunningBot, settings: Any) -> None:
    """The store or the Hub away, or an address that is only posted to: a page that says it, and a fitting status."""
    status, page, _ = get(bot, "/plan")
    assert status == 405 and "this address is not a page" in page
    settings.database.rename(settings.database.with_suffix(".away"))
    ada = "merge_adapter_session=x"
    seen = {get(bot, path, cookie=ada)[0] for path in ("/", "/jobs", "/jobs/x", "/metrics", "/health")}
    assert seen == {503}
    assert "the bot&#39;s store" in get(bot, "/", cookie=ada)[1]


def test_a_bug_has_a_page_of_its_own(bot: RunningBot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like every other error, and without a word of what the exception said."""
    monkeypatch.setattr("merge_adapter.bot.pages.views.list_jobs", lambda *_, **__: 1 / 0)
    status, page, headers = get(bot, "/jobs")
    assert status == 500 and "merge-adapter has a bug" in page and "division" not in page
    assert "script-src 'self'" in headers["Content-Security-Policy"]


def test_a_publication_that_tells_little_is_shown(bot: RunningBot) -> None:
    """What ran elsewhere may be of another version: no field of it is sure to be there."""
    pages = []
    for number, publication in enumerate(({"url": f"{bot.url}/ada/x"}, {"url": f"{bot.url}/x", "number": 7})):
        job_id = running(bot, f"ada/x{number}")
        lease = Lease(found_job(bot, job_id), "w", 1)
        bot.queue.finish(lease, Outcome(JobState.DONE, 0, verdict="pass", publication=publication))
        status, page, _ = get(bot, f"/jobs/{job_id}")
        assert status == 200
        pages.append(page)
    assert "Open the repository" in pages[0] and "Open pull request 7" in pages[1]
    assert 'Verdict: <span class="pass">' in pages[0], "there is no report that would tell"


def test_an_open_job_tells_what_comes_next(bot: RunningBot) -> None:
    """One that is being stopped offers no second stop; one that waits for another try asks nothing of anybody."""
    ada = logged_in(bot, "ada", "hf_ada")
    stopping = running(bot, "ada/stopping")
    assert "Cancel this job" in get(bot, f"/jobs/{stopping}", cookie=ada.cookie)[1]
    bot.queue.cancel(stopping, reason="cancelled by ada")
    page = get(bot, f"/jobs/{stopping}", cookie=ada.cookie)[1]
    assert "Stopping: cancelled by ada" in page and "Starting" not in page and "Cancel this job" not in page
    waiting = running(bot, "ada/waiting")
    failure = Outcome(JobState.FAILED, 5, "the connection failed", "Run the same command again.")
    bot.queue.retry(Lease(found_job(bot, waiting), "w", 1), failure)
    page = get(bot, f"/jobs/{waiting}")[1]
    assert "Tried once; next try at" in page and "the connection failed" in page
    assert "the same command" not in page


def test_a_user_has_a_limit_and_their_token_is_kept_sealed(bot: RunningBot, push_adapter: Any) -> None:
    repo_id, _ = push_adapter("ada/limits")
    ada = logged_in(bot, "ada", "hf_ada")
    for number in range(bot.settings.jobs_per_user):
        fields = f"adapter={repo_id}&target_repo=ada/t{number}&csrf={ada.csrf}"
        assert post(bot, "/jobs", fields, cookie=ada.cookie)[0] == 204
    status, text = post(
        bot, "/jobs", f"adapter={repo_id}&target_repo=ada/one-more&csrf={ada.csrf}", cookie=ada.cookie
    )
    assert status == 403 and "open jobs" in text
    job = list_jobs(bot.queue.store)[0]
    assert job.request.token is not None and b"hf_ada" not in job.request.token
    assert open_vault(bot.settings).open(job.request.token) == "hf_ada"
    for path in bot.settings.data.glob("bot.sqlite3*"):
        assert b"hf_ada" not in path.read_bytes()
    assert post(bot, "/logout", f"csrf={ada.csrf}", cookie=ada.cookie)[0] == 200
    assert "Log out" not in get(bot, "/", cookie=ada.cookie)[1]


def test_the_vendored_script_asks_nothing_of_other_hosts(bot: RunningBot) -> None:
    """No page names another host to load from, and static files are kept for ever under their hash."""
    _, page, _ = get(bot, "/")
    for name in ("htmx-4.0.1.min.js", "app.css", "icon.svg"):
        assert f"/static/{name}?" in page
        assert static_file(name) is not None
    assert 'src="http' not in page and 'rel="stylesheet" href="http' not in page
    assert "immutable" in get(bot, "/static/app.css")[2]["Cache-Control"]
    assert get(bot, "/static/..%2f..%2fsettings.py")[0] == 404


_LINES = "e => { const text = document.createRange(); text.selectNodeContents(e); return text.getClientRects().length }"


@pytest.mark.parametrize("width", [390, 1100])
def test_long_names_and_messages_break_no_page(bot: RunningBot, browser: Any, width: int) -> None:
    """Strangers choose names and messages: no page is wider than its window, no other cell loses its words."""
    word = "x" * 96
    options = JobOptions(target_repo=f"ada/{word}", base_model=f"ada/{word}", adapters=(f"ada/{word}@v1",))
    long = running(bot, f"ada/{word}", subfolder=word, options=options)
    url = f"https://example.org/{word * 3}"
    outcome = Outcome(JobState.REFUSED, 2, url, url, publication={"url": url, "operation": word})
    bot.queue.finish(Lease(found_job(bot, long), "w", 1), outcome)
    logged = running(bot, f"ada/{word}", subfolder=f"{word}/{word}")
    folder = bot.settings.job_folder(logged)
    folder.mkdir(parents=True)
    (folder / LOG_FILE).write_text(f"{word * 4}\n" * 100)
    page = browser.new_page(viewport={"width": width, "height": 800})
    for path in ("/", "/jobs", f"/jobs/{long}", f"/jobs/{logged}"):
        page.goto(f"{bot.url}{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    end = page.locator(".log pre").bounding_box()
    seen = page.locator(".log").bounding_box()
    assert end["y"] < seen["y"], "the log is longer than what is shown of it"
    assert abs(end["y"] + end["height"] - seen["y"] - seen["height"]) < 40
    page.goto(f"{bot.url}/jobs")
    assert page.locator("td[data-label=From]").first.evaluate(_LINES) == 1


def test_a_job_is_watched_through_a_failing_bot(
    bot: RunningBot, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that failed changes nothing on the page, and the next one goes on with it."""
    job_id = running(bot, "ada/watched")
    page = browser.new_page()
    page.goto(f"{bot.url}/jobs/{job_id}")

    def fail(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("merge_adapter.bot.pages.views.live", fail)
        for _ in range(2):
            with page.expect_response(lambda answer: answer.url.endswith("/live") and answer.status == 503):
                pass
    assert "running" in page.inner_text("#live")
    bot.queue.finish(Lease(found_job(bot, job_id), "w", 1), Outcome(JobState.DONE, 0, verdict="pass"))
    page.locator("#live .state.done").wait_for(timeout=60_000)


def test_from_login_to_pull_request_in_a_browser(
    tmp_path: Path, lm_base: Path, lm_adapter: Path, make_settings: Any, browser: Any
) -> None:
    """Log in with the Hub, see the plan, start, watch, read the verdict, open the pull request. The merge is made
    with the user's own token: the bot's account may not write there."""
    from huggingface_hub import HfApi

    from localhub.process import LocalHub

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = f"--oauth-client=bot:sec=http://127.0.0.1:{port}/login/callback"
    users = {"ada": "hf_ada_of_this_hub", "merge-bot": "hf_merge_bot"}
    with LocalHub(tmp_path / "hub", users, {"demo": ["ada"]}, options=[client]) as hub:
        api = HfApi(endpoint=hub.url, token=users["ada"])
        for repo_id, folder in (("demo/pydoc-llama", lm_base), ("ada/by-hand", lm_adapter)):
            api.create_repo(repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        settings = replace(
            make_settings(hub.url, tmp_path / "bot", workers=1, lease_seconds=30.0, port=port),
            token=users["merge-bot"],
            oauth_client_id="bot",
            oauth_client_secret="sec",
        )
        with start(settings) as bot:
            _walk(browser, bot, hub.url, users["ada"])


def _walk(browser: Any, bot: RunningBot, hub_url: str, token: str) -> None:
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if "Content Security" in message.text else None,
    )
    page.on("request", lambda request: asked.append(request.url))
    page.goto(bot.url)
    page.get_by_role("link", name="Log in with Hugging Face").first.click()
    page.fill("input[name=token]", token)
    page.locator("button[value=allow]").click()
    page.wait_for_url(f"{bot.url}/")
    assert page.get_by_role("button", name="Log out").is_visible()
    page.get_by_label("Adapter", exact=True).fill("ada/by-hand")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Merge it").wait_for(timeout=120_000)
    assert "demo/pydoc-llama" in page.inner_text("#plan") and "ada/by-hand-merged" in page.inner_text("#plan")
    page.get_by_role("button", name="Merge it").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/*", timeout=120_000)
    address = page.url
    pull = page.get_by_role("link", name="Open pull request 1")
    page.locator("progress").or_(pull).first.wait_for(timeout=240_000)
    pull.wait_for(timeout=240_000)
    assert "Verdict: pass" in page.inner_text("main")
    assert page.locator("figure svg").count() >= 1
    assert pull.get_attribute("href") == f"{hub_url}/ada/by-hand-merged/discussions/1"
    _check_phone(page)
    page.goto(f"{bot.url}/jobs")
    page.get_by_label("Search").fill("nothing-like-it")
    page.get_by_text("No job fits this filter.").wait_for()
    page.get_by_label("Search").fill("by-hand")
    page.get_by_role("link", name="ada/by-hand").wait_for()
    assert "q=by-hand" in page.url
    assert complaints == []
    assert {url.split("/")[2] for url in asked} <= {bot.url.split("/")[2], hub_url.split("/")[2]}
    cookies = {one["name"]: one for one in context.cookies()}
    assert cookies[login.SESSION]["httpOnly"] and token not in str(cookies)
    stranger = browser.new_context(color_scheme="dark").new_page()
    stranger.goto(address)
    assert stranger.get_by_role("button", name="Cancel this job").count() == 0
    assert stranger.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(11, 15, 25)"


def _check_phone(page: Any) -> None:
    """Nothing is wider than a phone, and the keyboard reaches the skip link first."""
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.set_viewport_size({"width": 1100, "height": 900})
