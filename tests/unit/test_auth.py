"""The secret's forms, and that a proof is bound to everything it is made of."""

from __future__ import annotations

import base64
import pickle

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from distexec import auth
from distexec.auth import Secret

keys = st.binary(min_size=16, max_size=64).filter(lambda key: len(set(key)) >= 8)
KEY = bytes(range(32))


@given(keys)
def test_text_form_reads_back(key: bytes) -> None:
    """What `text` writes, `parse` reads."""
    assert Secret.parse(f" {Secret(key).text}\n") == Secret(key)


@given(st.binary(min_size=24, max_size=64).filter(lambda key: len(set(key)) >= 8), st.booleans(), st.booleans())
def test_base64_reads_back(key: bytes, is_url_safe: bool, is_padded: bool) -> None:
    """Base64 of either alphabet is read, padded or not."""
    text = (base64.urlsafe_b64encode if is_url_safe else base64.b64encode)(key).decode()
    assert Secret.parse(text if is_padded else text.rstrip("=")) == Secret(key)


@pytest.mark.parametrize("size", [0, 1, 15])
def test_short_secrets_are_refused(size: int) -> None:
    """Below 128 bits there is no secret, in any form."""
    key = bytes(range(size))
    with pytest.raises(ValueError, match="128"):
        Secret(key)
    with pytest.raises(ValueError, match="distexec secret new"):
        Secret.parse(key.hex())


def test_what_is_not_random_is_refused() -> None:
    """Zeros and repeated letters are long enough and still no secret."""
    with pytest.raises(ValueError, match="not random"):
        Secret(bytes(32))
    with pytest.raises(ValueError, match="not random"):
        Secret(b"abcabc" * 10)


@pytest.mark.parametrize("text", ["", "correct horse battery staple", "ünïcödé" * 8, KEY.hex()[:-1],
                                  "0x" + KEY.hex(), "====", "*" * 40])
def test_other_text_is_refused_without_being_quoted(text: str) -> None:
    """What is neither hexadecimal nor base64 is refused, and the message does not give it away."""
    with pytest.raises(ValueError, match="distexec secret new") as caught:
        Secret.parse(text)
    assert not text or text not in str(caught.value)
    assert caught.value.__cause__ is None


def test_secret_does_not_show_itself() -> None:
    """No representation of a secret holds its key."""
    secret = Secret(KEY)
    assert KEY.hex() not in repr(secret) + str(secret) + f"{secret}"


def test_equality() -> None:
    """Secrets are equal if their keys are, and then have one hash."""
    assert Secret(KEY) == Secret(bytes(KEY))
    assert hash(Secret(KEY)) == hash(Secret(bytes(KEY)))
    assert Secret(KEY) != Secret(KEY[::-1] + b"x")
    assert Secret(KEY) != KEY
    assert pickle.loads(pickle.dumps(Secret(KEY))) == Secret(KEY)


@given(keys, st.binary(max_size=40), st.integers(1, 200))
def test_derive_key_is_hkdf(key: bytes, purpose: bytes, size_bytes: int) -> None:
    """Keys are those of RFC 5869, as another implementation computes them."""
    expected = HKDF(hashes.SHA256(), size_bytes, None, purpose).derive(key)
    assert auth.derive_key(Secret(key), purpose, size_bytes) == expected


def test_purposes_have_keys_of_their_own() -> None:
    """Two purposes share no key, and none has the secret itself."""
    derived = {auth.derive_key(Secret(KEY), purpose) for purpose in (b"a", b"b", b"distexec link proof")}
    assert len(derived | {KEY}) == 4
    assert auth.link_key(Secret(KEY)) in derived


fields = st.lists(st.binary(max_size=8), max_size=6)


@given(fields, fields)
def test_transcripts_differ_if_fields_do(one: list[bytes], other: list[bytes]) -> None:
    """Moving a byte from one field to the next gives another digest: lengths count."""
    assert (auth.transcript_digest(one) == auth.transcript_digest(other)) == (one == other)


@given(fields)
def test_proofs_have_a_direction(items: list[bytes]) -> None:
    """A proof of one end is none of the other, so reflecting it is useless."""
    assert auth.proof(KEY, auth.DIALLER, items) != auth.proof(KEY, auth.LISTENER, items)


def test_token_hash_does_not_show_the_token() -> None:
    """Listings can tell sessions apart without being able to act on them."""
    hashes_shown = {auth.token_hash(bytes([number]) * 16) for number in range(100)}
    assert len(hashes_shown) == 100
    assert all((bytes([number]) * 16).hex() not in hashes_shown for number in range(100))
