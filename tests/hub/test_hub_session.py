"""What is repeated, what is not, and which texts are cleaned of tokens."""

from __future__ import annotations

import time

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from merge_adapter.errors import HubError, StorageError
from merge_adapter.hub.access import redact, token_situation
from merge_adapter.hub.errors import Call, translate, translated
from merge_adapter.hub.session import Patience, once, repeat

HASTY = Patience(attempts=3, first_wait=0.0, longest_wait=0.0)
TOKEN = "hf_" + "a" * 30


def answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("GET", "http://127.0.0.1/api/models/a/b")
    return HfHubHTTPError("refused", response=httpx2.Response(status, request=request, headers=headers))


def failing(*errors: Exception):
    """A call that raises these in turn and then returns 7; and the list of its attempts."""
    left, attempts = list(errors), []

    def call() -> int:
        attempts.append(time.monotonic())
        if left:
            raise left.pop(0)
        return 7

    return call, attempts


@pytest.mark.parametrize(
    "error", [answer(429), answer(503), httpx2.ReadError("cut"), httpx2.ReadTimeout("slow")]
)
def test_what_passes_by_itself_is_repeated(error: Exception) -> None:
    """Until it works."""
    call, attempts = failing(error, error)
    assert repeat(call, HASTY) == 7
    assert len(attempts) == 3


@pytest.mark.parametrize("error", [answer(404), answer(401), answer(403), ValueError("x")])
def test_what_does_not_pass_by_itself_is_raised_at_once(error: Exception) -> None:
    """A second try would say the same."""
    call, attempts = failing(error)
    with pytest.raises(type(error)):
        repeat(call, HASTY)
    assert len(attempts) == 1


def test_patience_ends() -> None:
    """With the last error."""
    call, attempts = failing(*[answer(503)] * 5)
    with pytest.raises(HfHubHTTPError):
        repeat(call, HASTY)
    assert len(attempts) == HASTY.attempts


def test_the_server_says_how_long_to_wait() -> None:
    """Up to a limit, beyond which it is told instead."""
    assert HASTY.wait(0, 4.0) == 4.0
    assert Patience(first_wait=1, longest_wait=5).wait(10, None) == 5
    call, attempts = failing(answer(429, **{"Retry-After": "3600"}))
    with pytest.raises(HfHubHTTPError):
        repeat(call, HASTY)
    assert len(attempts) == 1


def test_what_must_not_happen_twice_is_looked_for_first() -> None:
    """The answer was lost, but the work was done."""
    call, attempts = failing(httpx2.ReadError("cut"))
    assert once(call, lambda: 9, HASTY) == 9
    assert len(attempts) == 1


def test_what_did_not_happen_is_sent_again() -> None:
    """Looking found nothing."""
    call, attempts = failing(answer(502), httpx2.RemoteProtocolError("cut"))
    assert once(call, lambda: None, HASTY) == 7
    assert len(attempts) == 3


def test_after_the_last_attempt_it_is_looked_once_more() -> None:
    """The last one may have been the one that worked."""
    call, attempts = failing(*[httpx2.ReadError("cut")] * 3)
    found = iter([None, None, 5])
    assert once(call, lambda: next(found), HASTY) == 5
    assert len(attempts) == 3


@pytest.mark.parametrize(
    "text",
    [
        f"Illegal header value b'Bearer {TOKEN}'",
        f"https://user:{TOKEN}@huggingface.co/x",
        "Bearer eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJyZXBvIn0.c2ln",
        "Authorization: Bearer something-else",
        "token=secret-of-this-call",
    ],
)
def test_whatever_looks_like_a_token_is_blotted_out(text: str) -> None:
    """The token of the call by value, all others by their shape."""
    clean = redact(text, token="secret-of-this-call")
    assert "<token>" in clean
    for secret in (TOKEN, "eyJzdWIi", "something-else", "secret-of-this-call"):
        assert secret not in clean


def test_ordinary_words_stay() -> None:
    """Names of packages and repositories are no tokens."""
    text = "hf_xet and hf_hub_url of org/hf_model failed"
    assert redact(text) == text


def test_causes_are_cleaned_too() -> None:
    """A traceback prints the whole chain."""
    with pytest.raises(HubError) as caught, translated(Call("read", "http://hub", TOKEN)):
        try:
            raise ValueError(f"inner {TOKEN}")
        except ValueError as error:
            raise httpx2.LocalProtocolError(f"Illegal header value {TOKEN}") from error
    seen: BaseException | None = caught.value
    while seen is not None:
        assert TOKEN not in str(seen)
        seen = seen.__cause__
    assert TOKEN not in repr(Call("read", "http://hub", TOKEN))


def test_bugs_are_not_turned_into_errors_of_the_hub() -> None:
    """A TypeError of ours stays one."""
    with pytest.raises(TypeError), translated(Call("read", "http://hub")):
        raise TypeError("ours")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/cache/blob"),
        RuntimeError(
            "Task error: File reconstruction error: IO Error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_cache_is_told_as_what_it_is(error: Exception) -> None:
    """Exit 2, not 5: the Hub is not to blame. hf_xet says it in words of its own."""
    told = translate(error, Call("download x", "http://hub"))
    assert isinstance(told, StorageError)
    assert "HF_HOME" in told.hint


def test_the_source_of_the_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """People have several; the message says which was used."""
    assert "passed" in token_situation("x")
    assert "no token" in token_situation(None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert token_situation(None) == "the token in HF_TOKEN"
    monkeypatch.setenv("HF_OIDC_RESOURCE", "ann/model")
    assert "ann/model" in token_situation(None)
