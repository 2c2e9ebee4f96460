"""The secret of a cluster and the proofs of holding it. Pure: random bytes come from outside.

    proof = HMAC-SHA256(HKDF-SHA256(secret, purpose), direction ‖ SHA-256(handshake fields, each with its length))

The secret itself is never sent and never used as a key directly; each purpose has a key of its own, so that what one
use reveals says nothing to another. Sources: RFC 5869 (HKDF), RFC 2104 (HMAC).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable

__all__ = ["DIALLER", "LISTENER", "SECRET_BYTES", "Secret", "derive_key", "is_equal", "link_key", "proof", "token_hash",
           "transcript_digest"]

SECRET_BYTES = 32
"""The length of a new secret."""

MIN_SECRET_BYTES = 16  # 128 bits: below that, who records one handshake can search for the secret
MIN_DISTINCT_BYTES = 8  # 16 random bytes have fewer once in 10^10; words, counters and zeros typed by hand often do

DIALLER = b"dialler"
LISTENER = b"listener"
"""The directions of a proof: which end of the link made it. They differ, so a proof sent back proves nothing."""

_HEX_LIKE = re.compile(r"(?:0[xX])?[0-9a-fA-F]+\Z")  # never base64, not even when a digit is missing
_REMEDY = "make one with `distexec secret new`"


class Secret:
    """The key of a cluster: at least 128 random bits. Shows itself only when asked, by `key` and `text`.

    Args:
        key: the raw bytes. Raises ValueError when there are fewer than 16, or when they are plainly not random.
    """

    __slots__ = ("key",)

    key: bytes

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_SECRET_BYTES:
            raise ValueError(f"the secret has {8 * len(key)} bits, not {8 * MIN_SECRET_BYTES} or more: {_REMEDY}")
        if len(set(key)) < MIN_DISTINCT_BYTES:
            raise ValueError(f"the secret is not random (few different bytes): {_REMEDY}")
        self.key = bytes(key)

    @classmethod
    def parse(cls, text: str) -> Secret:
        """Read the text form: hexadecimal, or base64 of either alphabet, padded or not; blanks around it do not count.

        Raises ValueError, which never quotes the text, when it is neither or too short.
        """
        text = text.strip()
        unpadded = text.rstrip("=").replace("-", "+").replace("_", "/")
        try:
            if _HEX_LIKE.match(text):
                key = bytes.fromhex(text)
            else:
                key = base64.b64decode(unpadded + "=" * (-len(unpadded) % 4), validate=True)
        except ValueError:  # base64's own error is one too
            raise ValueError(f"the secret is neither hexadecimal nor base64: {_REMEDY}") from None
        return cls(key)

    @property
    def text(self) -> str:
        """The form for files and variables: hexadecimal."""
        return self.key.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and is_equal(self.key, other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"<Secret of {8 * len(self.key)} bits>"


def derive_key(secret: Secret, purpose: bytes, size_bytes: int = 32) -> bytes:
    """Return the secret's key for one purpose: HKDF-SHA256 without salt, `purpose` as its info (RFC 5869)."""
    pseudorandom = hmac.digest(bytes(32), secret.key, "sha256")
    key = block = b""
    counter = 0
    while len(key) < size_bytes:
        counter += 1
        block = hmac.digest(pseudorandom, block + purpose + bytes([counter]), "sha256")
        key += block
    return key[:size_bytes]


def link_key(secret: Secret) -> bytes:
    """Return the key that proofs of the link handshake are made with."""
    return derive_key(secret, b"distexec link proof")


def transcript_digest(fields: Iterable[bytes]) -> bytes:
    """Return SHA-256 of the fields, each preceded by its length, so that no two lists of fields give the same bytes."""
    digest = hashlib.sha256()
    for field in fields:
        digest.update(len(field).to_bytes(4, "big"))
        digest.update(field)
    return digest.digest()


def proof(key: bytes, direction: bytes, fields: Iterable[bytes]) -> bytes:
    """Return the 32 bytes by which the end named by `direction` proves to hold the secret behind `key`."""
    return hmac.digest(key, direction + transcript_digest(fields), "sha256")


def is_equal(left: bytes, right: bytes) -> bool:
    """Compare in a time that says nothing about where the two differ."""
    return hmac.compare_digest(left, right)


def token_hash(token: bytes) -> str:
    """Return what listings show of a session's token: enough to tell sessions apart, useless to act on one."""
    return hashlib.sha256(b"distexec session token" + token).hexdigest()[:16]
