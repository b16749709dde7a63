"""OpenID Connect, both sides of it.

As a relying party the Hub trusts the id tokens of CI providers (Trusted Publishers); as a provider it
signs users in to other applications and proves it with id tokens of its own.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from localhub.accounts import Account
from localhub.database import Database
from localhub.errors import RefusedError

CODE_SECONDS = 300.0
ID_TOKEN_SECONDS = 3600


class OAuthError(RefusedError):
    """An error in the form of RFC 6749."""

    def __init__(self, error: str, description: str, *, status: int = 400) -> None:
        super().__init__(status, description, body={"error": error, "error_description": description})


# -------------------------------------------------------------------------------------------- publishers


@dataclass(frozen=True)
class TrustedPublisher:
    """A CI workflow that may get tokens for one resource."""

    resource: str
    """`owner/name` of a model, `datasets/owner/name`, or a bare user name for a token that only reads
    gated repositories."""
    issuer: str
    jwks_uri: str
    """Where the issuer publishes its keys."""
    claims: Mapping[str, str]
    """Claim -> pattern (`*` and `?`) that its value must match."""
    user: str
    """Whom commits made with the token belong to."""


def parse_publisher(text: str) -> TrustedPublisher:
    """A publisher from a JSON object with the fields of TrustedPublisher.

    Raises:
        ValueError: something is missing or of the wrong type.
    """
    try:
        given = json.loads(text)
        publisher = TrustedPublisher(
            resource=given["resource"],
            issuer=given["issuer"],
            jwks_uri=given["jwks_uri"],
            claims=dict(given["claims"]),
            user=given["user"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--trusted-publisher: expected a JSON object: {error!r}") from error
    if not publisher.claims or not all(isinstance(value, str) for value in publisher.claims.values()):
        raise ValueError("--trusted-publisher: claims must name at least one claim and its pattern")
    return publisher


class Publishers:
    """The table of trusted publishers, and the check of their tokens."""

    def __init__(self, publishers: tuple[TrustedPublisher, ...]) -> None:
        self._publishers = publishers
        self._keys: dict[str, jwt.PyJWKClient] = {}

    def match(self, token: str, resource: str, audience: str) -> TrustedPublisher:
        """The publisher that a CI's id token proves to be, for a resource.

        Raises:
            OAuthError: `invalid_grant`; says which condition failed.
        """
        candidates = [one for one in self._publishers if one.resource == resource]
        if not candidates:
            raise OAuthError("invalid_grant", f"No trusted publisher is configured for {resource}")
        reasons = []
        for publisher in candidates:
            try:
                claims = self._verify(token, publisher, audience)
            except jwt.PyJWTError as error:
                reasons.append(str(error))
                continue
            wrong = [
                f"{name} is {str(claims.get(name))!r}"
                for name, pattern in publisher.claims.items()
                if not fnmatch.fnmatchcase(str(claims.get(name)), pattern)
            ]
            if not wrong:
                return publisher
            reasons.append("claims do not match: " + ", ".join(wrong))
        raise OAuthError("invalid_grant", f"The id token is not of a trusted publisher: {'; '.join(reasons)}")

    def _verify(self, token: str, publisher: TrustedPublisher, audience: str) -> dict[str, Any]:
        keys = self._keys.setdefault(publisher.jwks_uri, jwt.PyJWKClient(publisher.jwks_uri, timeout=30))
        claims: dict[str, Any] = jwt.decode(
            token,
            keys.get_signing_key_from_jwt(token).key,
            algorithms=["RS256"],
            audience=audience,
            issuer=publisher.issuer,
            options={"require": ["exp", "iat", "aud", "iss", "sub"]},
            leeway=5,
        )
        return claims


# ---------------------------------------------------------------------------------------------- provider


@dataclass(frozen=True)
class Client:
    """An application that signs users in here."""

    id: str
    redirect_uris: tuple[str, ...]
    secret: str | None = None
    """None for a public client, which must use PKCE."""


def parse_client(text: str) -> Client:
    """`ID[:SECRET]=REDIRECT_URI[,REDIRECT_URI]`.

    Raises:
        ValueError: not of that form.
    """
    name, _, uris = text.partition("=")
    id, _, secret = name.partition(":")
    if not id or not uris:
        raise ValueError("--oauth-client: expected ID[:SECRET]=REDIRECT_URI[,REDIRECT_URI]")
    return Client(id, tuple(uris.split(",")), secret or None)


@dataclass(frozen=True)
class Grant:
    """What a user agreed to; an authorization code stands for it once."""

    client_id: str
    user: str
    redirect_uri: str
    scope: str
    nonce: str | None
    challenge: str | None
    expires: float


@dataclass
class Provider:
    """Clients, codes and the signing key."""

    database: Database
    clients: tuple[Client, ...]
    _codes: dict[str, Grant] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _loaded: rsa.RSAPrivateKey | None = None

    def client(self, id: str) -> Client:
        for client in self.clients:
            if hmac.compare_digest(client.id.encode(), id.encode()):
                return client
        raise OAuthError("invalid_client", f"Unknown client_id {id!r}")

    def issue_code(self, grant: Grant) -> str:
        code = secrets.token_urlsafe(32)
        with self._lock:
            now = time.time()
            self._codes = {key: one for key, one in self._codes.items() if one.expires > now}
            self._codes[code] = grant
        return code

    def redeem(
        self, code: str, *, client_id: str, secret: str | None, redirect_uri: str, verifier: str | None
    ) -> Grant:
        """The grant behind a code, which is used up by the attempt.

        Raises:
            OAuthError: unknown, expired, of another client or redirect, or without proof of possession.
        """
        with self._lock:
            grant = self._codes.pop(code, None)
        if grant is None or grant.expires <= time.time():
            raise OAuthError("invalid_grant", "The authorization code is unknown, used or expired")
        client = self.client(client_id)
        if grant.client_id != client.id or grant.redirect_uri != redirect_uri:
            raise OAuthError(
                "invalid_grant", "The authorization code was made for another client or redirect"
            )
        if client.secret is not None and not hmac.compare_digest(
            client.secret.encode(), (secret or "").encode()
        ):
            raise OAuthError("invalid_client", "Wrong client secret", status=401)
        if grant.challenge is None:
            if client.secret is None:
                raise OAuthError("invalid_grant", "A public client must use PKCE")
        elif not hmac.compare_digest(_challenge(verifier or ""), grant.challenge):
            raise OAuthError("invalid_grant", "code_verifier does not match the code_challenge")
        return grant

    def id_token(self, grant: Grant, user: Account, issuer: str) -> str:
        """Who logged in, signed with RS256."""
        now = int(time.time())
        claims: dict[str, Any] = {
            **user_claims(user, issuer),
            "iss": issuer,
            "aud": grant.client_id,
            "iat": now,
            "exp": now + ID_TOKEN_SECONDS,
        }
        if grant.nonce is not None:
            claims["nonce"] = grant.nonce
        return jwt.encode(claims, self._key(), algorithm="RS256", headers={"kid": self._key_id()})

    def jwks(self) -> dict[str, Any]:
        """The public key, as relying parties fetch it."""
        public: dict[str, Any] = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self._key().public_key()))
        return {"keys": [{**public, "kid": self._key_id(), "use": "sig", "alg": "RS256"}]}

    def _key(self) -> rsa.RSAPrivateKey:
        """Made at the first use and kept."""
        with self._lock:
            if self._loaded is None:
                row = self.database.one("SELECT value FROM secrets WHERE name = 'oidc'")
                if row is None:
                    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
                    pem = made.private_bytes(
                        serialization.Encoding.PEM,
                        serialization.PrivateFormat.PKCS8,
                        serialization.NoEncryption(),
                    )
                    self.database.write("INSERT INTO secrets VALUES ('oidc', ?)", pem.decode())
                    self._loaded = made
                else:
                    loaded = serialization.load_pem_private_key(row["value"].encode(), password=None)
                    assert isinstance(loaded, rsa.RSAPrivateKey)
                    self._loaded = loaded
            return self._loaded

    def _key_id(self) -> str:
        number = self._key().public_key().public_numbers().n
        return hashlib.sha256(str(number).encode()).hexdigest()[:16]


def user_claims(user: Account, base_url: str) -> dict[str, Any]:
    """A user as OpenID Connect describes one, with the Hub's additions."""
    return {
        "sub": user.id,
        "name": user.fullname,
        "preferred_username": user.name,
        "profile": f"{base_url}/{user.name}",
        "picture": "",
        "website": "",
        "email": f"{user.name}@localhub.invalid",
        "email_verified": True,
        "isPro": False,
        "canPay": False,
    }


def _challenge(verifier: str) -> str:
    """The S256 code challenge of a verifier (RFC 7636)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
