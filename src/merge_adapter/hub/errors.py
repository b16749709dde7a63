"""The one place where the client's errors become ours: what failed, for whom, and the exact fix."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import httpx2
from huggingface_hub.errors import (
    DeviceCodeError,
    DisabledRepoError,
    EntryNotFoundError,
    FileDuplicationError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

from merge_adapter.errors import (
    HubError,
    InputError,
    MergeAdapterError,
    NotFoundError,
    PolicyError,
    StorageError,
)
from merge_adapter.hub.access import has_token, oidc_resource, redact, token_situation

CLIENT_ERRORS = (
    OSError,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    OIDCError,
    DeviceCodeError,
    EntryNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
    FileDuplicationError,
    HFValidationError,
    RuntimeError,  # hf_xet reports every failure of its own as one
    ValueError,  # so does the client for a refused LFS batch and for an answer it cannot read
)
"""What the client is known to raise; anything else is a bug of ours and stays as it is."""

AGAIN = "Run the same command again: it continues where it stopped."
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_SERVER_TEXT_LIMIT = 500
"""Characters of a server's own message that are shown."""


class RefusedError(HubError):
    """The Hub refused: it has to be allowed first, and waiting changes nothing."""


class ConflictError(HubError):
    """Somebody else changed what was to be changed; looking again and deciding anew is safe."""


@dataclass(frozen=True)
class Call:
    """What was being done when an error came: the facts that its message carries."""

    doing: str
    """A verb phrase: "read config.json of owner/name"."""
    endpoint: str
    token: str | Literal[False] | None = field(default=None, repr=False)
    repo_id: str | None = None
    revision: str | None = None
    path: str | None = None

    @property
    def page(self) -> str:
        """The repository's page, where a person can act."""
        return f"{self.endpoint}/{self.repo_id}" if self.repo_id else self.endpoint


@contextmanager
def translated(call: Call) -> Iterator[None]:
    """Run one call of the client; whatever it raises leaves as one of our errors, chained, without secrets."""
    try:
        yield
    except MergeAdapterError:
        raise
    except CLIENT_ERRORS as error:
        _scrub(error, call.token)
        raise translate(error, call) from error


def translate(error: BaseException, call: Call) -> MergeAdapterError:
    """Our error for `error` of the client, as far as it can be told what it means."""
    if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__  # the client says that it failed; why is behind it
    if isinstance(error, GatedRepoError):
        return _gated(error, call)
    if isinstance(error, (RevisionNotFoundError, RepositoryNotFoundError, EntryNotFoundError)):
        return _missing(error, call)
    if isinstance(error, (OIDCError, LocalTokenNotFoundError, DeviceCodeError)):
        return _no_identity(error, call)
    if isinstance(error, HfHubHTTPError):
        return _refused(error, call)
    if isinstance(error, HFValidationError):
        return InputError(f"cannot {call.doing}: {_text(error, call)}", hint="A Hub id reads owner/name.")
    code = _error_number(error)
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        place = getattr(error, "filename", None) or "the cache of huggingface_hub"
        return StorageError(
            f"cannot {call.doing}: {os.strerror(code)} ({place})",
            hint="Free space, or point HF_HOME to a larger disk.",
        )
    if isinstance(error, PermissionError):
        return StorageError(
            f"cannot {call.doing}: {error.strerror} ({error.filename})",
            hint="Point HF_HOME to a folder that this user may write.",
        )
    return _unreachable(error, call)


def _error_number(error: BaseException) -> int | None:
    """What the operating system said, to Python or to hf_xet, which has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    said = _RUST_ERROR.search(str(error))
    return int(said[1]) if said else None


def status_of(error: BaseException) -> int | None:
    """HTTP status behind an error or its causes; None when no answer came."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError):
            return int(seen.response.status_code)
        seen = seen.__cause__
    return None


def _gated(error: GatedRepoError, call: Call) -> MergeAdapterError:
    if has_token(call.token):
        asked = f"Ask for access at {call.page} with the account behind {token_situation(call.token)}."
        asked += " A fine-grained token also needs 'Read access to contents of all public gated repos'."
    else:
        asked = f"Ask for access at {call.page}, then set HF_TOKEN to a token of that account."
    return PolicyError(
        f"{call.repo_id} is gated and {token_situation(call.token)} has no access: cannot {call.doing}"
        f"{_server_text(error, call)}",
        hint=asked,
    )


def _missing(error: BaseException, call: Call) -> MergeAdapterError:
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(
            f"{call.repo_id} has no revision {call.revision!r}",
            hint=f"Its branches and tags are listed at {call.page}/tree/main.",
        )
    if isinstance(error, EntryNotFoundError):
        return NotFoundError(
            f"{call.repo_id} has no file {call.path!r} at {call.revision}"
            if call.path
            else _text(error, call),
            hint=f"Look at {call.page}/tree/{call.revision or 'main'}.",
        )
    status = status_of(error)
    if status == 401 and has_token(call.token):
        return HubError(
            f"cannot {call.doing}: the Hub does not accept {token_situation(call.token)}",
            hint=f"It may have expired or been revoked. Make a new one at {call.endpoint}/settings/tokens.",
        )
    if has_token(call.token):
        hint = f"Check the name. If it is private, give {token_situation(call.token)} read access to it."
    else:
        hint = "Check the name. If it is private, set HF_TOKEN or run: hf auth login"
    return NotFoundError(
        f"{call.repo_id} does not exist on {call.endpoint}, or it is private and "
        f"{token_situation(call.token)} may not see it",
        hint=hint,
    )


def _no_identity(error: BaseException, call: Call) -> MergeAdapterError:
    if isinstance(error, OIDCError):
        return HubError(
            f"cannot {call.doing}: no token could be had from the Trusted Publisher: {_text(error, call)}",
            hint="Give the workflow job `permissions: id-token: write`, or unset HF_OIDC_RESOURCE and set HF_TOKEN.",
        )
    return HubError(
        f"cannot {call.doing}: {token_situation(call.token)}",
        hint=f"Set HF_TOKEN to a token from {call.endpoint}/settings/tokens, or run: hf auth login",
    )


def _refused(error: HfHubHTTPError, call: Call) -> MergeAdapterError:
    status = int(error.response.status_code)
    said = _server_text(error, call)
    situation = token_situation(call.token)
    url = error.response.request.url
    if url.path.endswith("/oauth/token"):
        return RefusedError(
            f"cannot {call.doing}: the Hub refused the Trusted Publisher exchange (HTTP {status}){said}",
            hint=(
                f"In the settings of the repository in HF_OIDC_RESOURCE ({oidc_resource()}), add this workflow's "
                "repository, file and environment as a Trusted Publisher; the exchange cannot create repositories."
            ),
        )
    if isinstance(error, DisabledRepoError):
        return RefusedError(f"cannot {call.doing}: {call.repo_id} has been disabled{said}")
    if status == 401:
        hint = f"Make a new token at {call.endpoint}/settings/tokens and set HF_TOKEN."
        if not has_token(call.token):
            hint = f"Set HF_TOKEN to a token from {call.endpoint}/settings/tokens, or run: hf auth login"
        return RefusedError(f"cannot {call.doing}: the Hub does not accept {situation}{said}", hint=hint)
    if status == 403:
        return RefusedError(
            f"cannot {call.doing}: {situation} is not allowed to (HTTP 403){said}",
            hint=_permission_hint(call, said),
        )
    if status in (409, 412):
        return ConflictError(f"cannot {call.doing}: it changed meanwhile (HTTP {status}){said}", hint=AGAIN)
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"after {wait} seconds" if wait and wait.isdigit() else "in some minutes"
        return HubError(
            f"cannot {call.doing}: the Hub limits the rate of requests (HTTP 429){said}",
            hint=f"Run the same command again {when}: what was uploaded is not uploaded twice.",
        )
    if status >= 500:
        return HubError(
            f"cannot {call.doing}: the Hub failed (HTTP {status}){said}",
            hint=AGAIN,
        )
    return RefusedError(f"cannot {call.doing}: the Hub refused (HTTP {status}){said}")


def _permission_hint(call: Call, said: str) -> str:
    if "disabled" in said and "discussion" in said.lower():
        return f"Enable the community tab in the settings of {call.repo_id}, or use --publish new-repo."
    if oidc_resource() and call.token is None:
        return (
            f"A Trusted Publisher token writes to {oidc_resource()} alone and creates no repository: create "
            f"{call.repo_id or 'the target'} once by hand and let HF_OIDC_RESOURCE name it, or set HF_TOKEN instead."
        )
    owner = (call.repo_id or "").split("/")[0] or "the owner"
    return (
        f"A fine-grained token needs 'Write access to contents/settings' for {owner} (new repositories, commits) "
        f"and 'Interact with discussions / Open pull requests' for {call.repo_id}; a classic one needs the role "
        f"'write', and its account must be a member of {owner} with write rights. "
        f"Edit it at {call.endpoint}/settings/tokens."
    )


def _unreachable(error: BaseException, call: Call) -> MergeAdapterError:
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"cannot {call.doing}: HF_HUB_OFFLINE is set", hint="Unset HF_HUB_OFFLINE.")
    if isinstance(error, FileMetadataError):
        return HubError(
            f"cannot {call.doing}: {call.endpoint} does not answer as a Hub: {_text(error, call)}",
            hint="Check HF_ENDPOINT, and proxies that remove headers.",
        )
    if "HTTP status client error" in str(error):
        return _xet_refused(error, call)
    if not isinstance(error, (httpx2.HTTPError, httpx2.InvalidURL, OSError)):
        return HubError(f"cannot {call.doing}: {_text(error, call)}", hint=AGAIN)
    kind = (
        "did not answer in time" if isinstance(error, (httpx2.TimeoutException, TimeoutError)) else "failed"
    )
    return HubError(
        f"cannot {call.doing}: the connection to {call.endpoint} {kind}: {_text(error, call)}",
        hint="Check the network and HF_ENDPOINT, then run the same command again: it continues where it stopped.",
    )


def _xet_refused(error: BaseException, call: Call) -> MergeAdapterError:
    """hf_xet speaks HTTP by itself and tells the status in its text alone."""
    text = _text(error, call)
    if "(401 " in text:
        return HubError(
            f"cannot {call.doing}: the Hub does not accept {token_situation(call.token)} any more: {text}",
            hint=f"It may have expired. With a new one ({call.endpoint}/settings/tokens) the upload continues.",
        )
    if "(404 " in text and "/xet-" in text:
        return HubError(
            f"cannot {call.doing}: {call.endpoint} does not offer xet storage: {text}",
            hint="Set HF_HUB_DISABLE_XET=1, so that the older LFS protocol is used.",
        )
    return HubError(f"cannot {call.doing}: the storage behind {call.endpoint} refused: {text}", hint=AGAIN)


def _server_text(error: HfHubHTTPError, call: Call) -> str:
    said = " ".join((error.server_message or "").split())
    return f": {redact(said[:_SERVER_TEXT_LIMIT], token=call.token)}" if said else ""


def _text(error: BaseException, call: Call) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return redact(text[:_SERVER_TEXT_LIMIT], token=call.token)


def _scrub(error: BaseException, token: str | Literal[False] | None) -> None:
    """Remove secrets from the causes too: a traceback prints them."""
    seen: BaseException | None = error
    while seen is not None:
        cleaned = tuple(redact(arg, token=token) if isinstance(arg, str) else arg for arg in seen.args)
        if cleaned != seen.args:
            seen.args = cleaned
        seen = seen.__cause__ or seen.__context__
