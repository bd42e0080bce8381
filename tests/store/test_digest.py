import hashlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.digest import ThreadedSha256
from tests.store.examples import SEARCH


@SEARCH
@given(parts=st.lists(st.binary(max_size=50)))
def test_any_blocks_have_the_digest_of_their_bytes(parts: list[bytes]) -> None:
    with ThreadedSha256() as digest:
        for part in parts:
            with digest.beside(np.frombuffer(part, np.uint8)):
                pass
    assert digest.hexdigest() == hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (0, 3)])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i8", "u1"])
def test_a_block_may_have_any_type_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    block = np.ones(shape, dtype)
    with ThreadedSha256() as digest, digest.beside(block):
        pass
    assert digest.hexdigest() == hashlib.sha256(block.tobytes()).hexdigest()


def test_hashing_is_done_when_the_body_has_ended() -> None:
    block = np.ones(5_000_000, np.uint8)
    with ThreadedSha256() as digest:
        with digest.beside(block):
            pass
        block[:] = 0  # the buffer may be used again
        with digest.beside(block):
            pass
    assert digest.hexdigest() == hashlib.sha256(bytes([1]) * 5_000_000 + bytes(5_000_000)).hexdigest()


def test_the_body_runs_beside_the_hashing() -> None:
    with ThreadedSha256() as digest, digest.beside(np.ones(1, np.uint8)):
        names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert "sha256" in names


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    with ThreadedSha256() as digest, digest.beside(np.ones(1, np.uint8)):
        pass
    assert threading.active_count() == before
    with pytest.raises(KeyError, match="in the body"), ThreadedSha256() as digest, digest.beside(np.ones(1, np.uint8)):
        raise KeyError("in the body")
    assert threading.active_count() == before


def test_a_block_that_is_not_contiguous_is_an_error() -> None:
    with (
        ThreadedSha256() as digest,
        pytest.raises((BufferError, ValueError)),  # numpy's or hashlib's, by version
        digest.beside(np.ones((4, 4), np.uint8)[:, ::2]),
    ):
        pass
