"""Tokens for CI without secrets, and logging in to other applications."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from localhub.process import LocalHub

REDIRECT = "http://127.0.0.1:9/callback"
VERIFIER = "v" * 50


class Issuer:
    """A CI provider: a key, the endpoint that publishes it, and id tokens."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
        document = json.dumps({"keys": [{**public, "kid": "one", "use": "sig", "alg": "RS256"}]}).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(document)))
                self.end_headers()
                self.wfile.write(document)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def token(self, audience: str, *, key=None, lifetime: int = 300, **claims: str) -> str:
        now = int(time.time())
        body = {
            "iss": self.url,
            "sub": "repo:org/ci:ref:refs/heads/main",
            "aud": audience,
            "iat": now,
            "exp": now + lifetime,
            "repository": "org/ci",
            **claims,
        }
        return jwt.encode(body, key or self.key, algorithm="RS256", headers={"kid": "one"})


@pytest.fixture(scope="module")
def issuer():
    running = Issuer()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def trusting(issuer, tmp_path_factory):
    """A Hub that trusts the issuer for one model, and knows two OAuth clients."""
    publishers = [
        {
            "resource": resource,
            "issuer": issuer.url,
            "jwks_uri": f"{issuer.url}/jwks",
            "claims": {"repository": "org/*"},
            "user": "alice",
        }
        for resource in ("alice/target", "alice")
    ]
    options = [f"--trusted-publisher={json.dumps(publisher)}" for publisher in publishers]
    options += [f"--oauth-client=bot={REDIRECT}", f"--oauth-client=web:shh={REDIRECT}"]
    data = tmp_path_factory.mktemp("trusting")
    with LocalHub(data, {"alice": "hf_alice", "bob": "hf_bob"}, options=options) as running:
        api = HfApi(endpoint=running.url, token="hf_alice")
        api.create_repo("alice/target")
        api.create_repo("alice/other")
        yield running


def _exchange(hub, token, resource="alice/target"):
    body = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
        "subject_token": token,
        "resource": resource,
    }
    return httpx2.post(f"{hub.url}/oauth/token", json=body)


def test_exchanged_token_writes_to_one_repository(trusting, issuer):
    """And creates none, and opens pull requests nowhere else."""
    answer = _exchange(trusting, issuer.token(trusting.url)).json()
    assert (answer["token_type"], answer["expires_in"]) == ("bearer", 3600)
    api = HfApi(endpoint=trusting.url, token=answer["access_token"])
    api.upload_file(path_or_fileobj=b"\x00" * 3000, path_in_repo="w.bin", repo_id="alice/target")
    draft = api.create_pull_request("alice/target", "From CI")
    api.change_discussion_status("alice/target", draft.num, "open")
    for refused in (
        lambda: api.create_repo("alice/new"),
        lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="alice/other"),
        lambda: api.upload_file(
            path_or_fileobj=b"1", path_in_repo="x", repo_id="alice/other", create_pr=True
        ),
        lambda: api.delete_repo("alice/target"),
    ):
        with pytest.raises(HfHubHTTPError, match="403"):
            refused()


def test_the_client_exchanges_by_itself(trusting, issuer):
    """What a workflow uses: the library's own function."""
    from huggingface_hub._oidc import oidc_login

    done = oidc_login(
        resource="alice/target", subject_token=issuer.token(trusting.url), endpoint=trusting.url
    )
    assert HfApi(endpoint=trusting.url, token=done["access_token"]).whoami()["name"] == "alice"


def test_user_scoped_token_only_reads_gated_files(trusting, issuer, tmp_path):
    """It opens gates of public repositories, nothing else."""
    HfApi(endpoint=trusting.url, token="hf_bob").create_repo("bob/gated")
    HfApi(endpoint=trusting.url, token="hf_bob").update_repo_settings("bob/gated", gated="manual")
    HfApi(endpoint=trusting.url, token="hf_bob").grant_access("bob/gated", "alice")
    token = _exchange(trusting, issuer.token(trusting.url), "alice").json()["access_token"]
    api = HfApi(endpoint=trusting.url, token=token)
    assert api.hf_hub_download("bob/gated", ".gitattributes", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="alice/target")


@pytest.mark.parametrize(
    "change",
    ["audience", "issuer", "claim", "expired", "key", "resource", "none"],
)
def test_tokens_that_prove_nothing(trusting, issuer, change):
    """Each condition by itself is enough to refuse."""
    audience, claims, resource = trusting.url, {}, "alice/target"
    lifetime, key = 300, None
    match change:
        case "audience":
            audience = "https://elsewhere"
        case "issuer":
            claims = {"iss": "https://elsewhere"}
        case "claim":
            claims = {"repository": "evil/ci"}
        case "expired":
            lifetime = -60
        case "key":
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case "resource":
            resource = "alice/other"
    token = issuer.token(audience, key=key, lifetime=lifetime, **claims)
    if change == "none":
        claims = jwt.decode(token, options={"verify_signature": False})
        token = jwt.encode(claims, None, algorithm="none", headers={"kid": "one"})
    answer = _exchange(trusting, token, resource)
    assert answer.status_code == 400
    assert answer.json()["error"] == "invalid_grant"


# ------------------------------------------------------------------------------------------------- login


def _challenge(verifier):
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def _query(**changes):
    return {
        "client_id": "bot",
        "redirect_uri": REDIRECT,
        "response_type": "code",
        "scope": "openid profile",
        "state": "st&te",
        "nonce": "n0nce",
        "code_challenge": _challenge(VERIFIER),
        "code_challenge_method": "S256",
        **changes,
    }


def _agree(hub, **changes):
    form = {**_query(**changes), "token": "hf_alice", "decision": "allow", **changes}
    answer = httpx2.post(f"{hub.url}/oauth/authorize", data=form)
    assert answer.status_code == 303, answer.text
    return {key: value[0] for key, value in parse_qs(urlsplit(answer.headers["location"]).query).items()}


def _redeem(hub, code, **changes):
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": REDIRECT,
        "client_id": "bot",
        "code_verifier": VERIFIER,
        **changes,
    }
    return httpx2.post(f"{hub.url}/oauth/token", data=form)


def test_login_by_code_with_pkce(trusting):
    """The page, the code, the tokens, and an id token that discovery's keys verify."""
    config = httpx2.get(f"{trusting.url}/.well-known/openid-configuration").json()
    page = httpx2.get(config["authorization_endpoint"], params=_query())
    assert page.status_code == 200
    assert "bot" in page.text
    back = _agree(trusting)
    assert back["state"] == "st&te"
    tokens = _redeem(trusting, back["code"]).json()
    key = jwt.PyJWKClient(config["jwks_uri"]).get_signing_key_from_jwt(tokens["id_token"]).key
    claims = jwt.decode(
        tokens["id_token"], key, algorithms=["RS256"], audience="bot", issuer=config["issuer"]
    )
    assert (claims["nonce"], claims["preferred_username"]) == ("n0nce", "alice")
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert httpx2.get(config["userinfo_endpoint"], headers=headers).json()["sub"] == claims["sub"]
    assert HfApi(endpoint=trusting.url, token=tokens["access_token"]).whoami()["name"] == "alice"


def test_a_code_works_once_and_only_with_its_proof(trusting):
    """Replays, wrong verifiers, other redirects, wrong secrets."""
    code = _agree(trusting)["code"]
    assert _redeem(trusting, code).status_code == 200
    assert _redeem(trusting, code).json()["error"] == "invalid_grant"
    for changes in ({"code_verifier": "w" * 50}, {"redirect_uri": "http://evil"}, {"client_id": "web"}):
        assert _redeem(trusting, _agree(trusting)["code"], **changes).status_code in (400, 401)
    code = _agree(trusting, client_id="web")["code"]
    assert _redeem(trusting, code, client_id="web", client_secret="no").status_code == 401
    code = _agree(trusting, client_id="web")["code"]
    assert _redeem(trusting, code, client_id="web", client_secret="shh").status_code == 200


def test_requests_that_are_not_redirected(trusting):
    """An unknown client or redirect gets an error here, never a redirect there."""
    for changes in ({"client_id": "who"}, {"redirect_uri": "http://evil/"}):
        answer = httpx2.get(f"{trusting.url}/oauth/authorize", params=_query(**changes))
        assert answer.status_code == 400
    without = httpx2.get(f"{trusting.url}/oauth/authorize", params=_query(code_challenge=""))
    assert "error=invalid_request" in without.headers["location"]


def test_denied_and_mistyped(trusting):
    """No means no; a wrong token gets the page again; another site's form is refused."""
    assert _agree(trusting, decision="deny")["error"] == "access_denied"
    form = {**_query(), "token": "wrong", "decision": "allow"}
    assert httpx2.post(f"{trusting.url}/oauth/authorize", data=form).status_code == 401
    form["token"] = "hf_alice"
    evil = httpx2.post(f"{trusting.url}/oauth/authorize", data=form, headers={"Origin": "http://evil"})
    assert evil.status_code == 400
