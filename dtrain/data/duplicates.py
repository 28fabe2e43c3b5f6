"""Exact and near duplicates among many texts, from shingle hashes and MinHash signatures.

A shingle is a run of n characters. Characters need no word boundaries, so the same code serves
English and Chinese. A batch of texts is hashed in numpy: a polynomial hash per shingle (Karp and
Rabin, 1987), mixed by splitmix64's finalizer.

Rows are identified by their indices. Matches come in blocks and keys are sorted one partition at a
time, so these functions need little memory beyond the columns they get, however many rows there
are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash

from dtrain.data.permutation import mix64

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

SHINGLE_CHARACTERS = 5
PERMUTATIONS = 120
SEED = 17
NEAR_SIMILARITY = 0.8  # least Jaccard similarity of near duplicates
BAND_BYTES = 6  # bytes of a sketch that two rows must share to be compared
PAIRS_PER_BLOCK = 1 << 14
ROWS_PER_PARTITION, MAX_PARTITIONS = 1 << 16, 16
ROWS_PER_READ = 1 << 16
_HASH_BASE = 0x100000001B3
_WHITESPACE = re.compile(r"\s+")
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


def normalize_text(text: str) -> str:
    """Lowercase the text and collapse its whitespace."""
    return _WHITESPACE.sub(" ", text.casefold()).strip()


def letters_and_digits(text: str) -> str:
    """The text's letters and digits in lower case; reformatting a text does not change them."""
    return _NOT_ALPHANUMERIC.sub("", text.casefold())


def text_key(text: str) -> int:
    """A 64-bit hash of a text."""
    return xxhash.xxh3_64_intdigest(text.encode())


def shingle_hashes(texts: Sequence[str], width: int) -> tuple[UInt64s, Int64s]:
    """Hash every run of `width` characters of each text.

    Returns:
        Hashes uint64 [shingles], and offsets [texts + 1] into them. A text shorter than `width`
        has one shingle.
    """
    texts = [text if len(text) >= width or not text else text.ljust(width, "\0") for text in texts]
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    hashes = np.zeros(max(codes.size - width + 1, 0), dtype=np.uint64)
    for start in range(width):
        hashes *= np.uint64(_HASH_BASE)
        hashes += codes[start : start + hashes.size] + np.uint64(1)
    counts = np.where(sizes, sizes - width + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    within_texts = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
    return mix64(hashes[within_texts]), offsets


def minhash_signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures (Broder, 1997), uint32 [texts, PERMUTATIONS]."""
    hashes, offsets = shingle_hashes(texts, SHINGLE_CHARACTERS)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, PERMUTATIONS)


def exact_duplicates(keys: UInt64s) -> Iterator[tuple[Int64s, Int64s]]:
    """Yield rows that repeat an earlier key, and the first row with the same key."""
    for later, first, _ in _equal_keys(lambda block: keys[block], len(keys)):
        yield later, first


def count_distinct(keys: UInt64s) -> int:
    """The number of different keys."""
    return len(keys) - sum(later.size for later, _ in exact_duplicates(keys))


def conflicting_answers(
    questions: UInt64s, answers: UInt64s, asked: NDArray[np.bool_]
) -> Iterator[tuple[Int64s, Int64s]]:
    """Yield rows whose answer differs from that of the first row with the same question.

    Args:
        questions, answers: keys of the texts, [rows].
        asked: whether the row has a question, [rows].
    """
    for later, first in exact_duplicates(questions):
        differs = asked[later] & (answers[later] != answers[first])
        yield later[differs], first[differs]


def near_duplicates(
    sketches: NDArray[np.uint8],
    similarity: float,
    done: NDArray[np.bool_],
    groups: UInt64s | None = None,
) -> Iterator[tuple[Int64s, Int64s, NDArray[np.float32]]]:
    """Yield rows that nearly equal an earlier row, that earlier row, and their similarity.

    Rows that share a band are candidates (locality-sensitive hashing, Indyk and Motwani, 1998).
    Each is compared with the first row of its band and with the row before it, by the lowest byte
    of each MinHash value (b-bit minwise hashing, Li and König, arXiv:0910.3349). The six bytes of a
    band agree by chance as rarely as 48 random bits.

    Args:
        sketches: lowest byte of each value of the signature, [rows, values].
        similarity: least estimated Jaccard similarity.
        done: rows to skip, [rows]; rows that were yielded are added to it.
        groups: rows of different groups are never compared, [rows].
    """
    for first_byte in range(0, sketches.shape[1], BAND_BYTES):

        def band_keys(block: slice, first_byte: int = first_byte) -> UInt64s:
            padded = np.zeros((len(sketches[block]), 8), np.uint8)
            padded[:, :BAND_BYTES] = sketches[block, first_byte : first_byte + BAND_BYTES]
            mixed = mix64(padded.view(np.uint64)[:, 0])
            return mixed if groups is None else mixed ^ groups[block]

        for later, first, previous in _equal_keys(band_keys, len(sketches)):
            for earlier in (first, previous):
                pending = ~done[later]
                rows, candidates = later[pending], earlier[pending]
                estimates = _estimate_similarity(sketches, rows, candidates)
                similar = estimates >= similarity
                done[rows[similar]] = True
                yield rows[similar], candidates[similar], estimates[similar]


def _equal_keys(
    keys: Callable[[slice], UInt64s], rows: int
) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
    """Yield rows with the key of an earlier row, the first such row, and the one just before."""
    partitions = min(rows // ROWS_PER_PARTITION + 1, MAX_PARTITIONS)
    for partition in range(partitions):
        indices, values = _read_partition(keys, rows, partition, partitions)
        order = np.argsort(values, kind="stable")
        values, indices = values[order], indices[order]
        repeats = np.flatnonzero(values[1:] == values[:-1]) + 1
        heads = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        for start in range(0, repeats.size, PAIRS_PER_BLOCK):
            block = repeats[start : start + PAIRS_PER_BLOCK]
            head = heads[heads.searchsorted(block, side="right") - 1]
            yield indices[block], indices[head], indices[block - 1]


def _read_partition(
    keys: Callable[[slice], UInt64s], rows: int, partition: int, partitions: int
) -> tuple[Int64s, UInt64s]:
    """The rows whose key falls into a partition, in ascending order, and their keys."""
    indices, values = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for start in range(0, rows, ROWS_PER_READ):
        block = keys(slice(start, min(start + ROWS_PER_READ, rows)))
        matches = np.flatnonzero(block % np.uint64(partitions) == partition)
        indices.append(matches + start)
        values.append(block[matches])
    return np.concatenate(indices), np.concatenate(values)


def _estimate_similarity(
    sketches: NDArray[np.uint8], left: Int64s, right: Int64s
) -> NDArray[np.float32]:
    """Estimated Jaccard similarity of pairs of rows; bytes agree by chance once in 256."""
    agreement = (sketches[left] == sketches[right]).mean(axis=1, dtype=np.float32)
    return np.maximum((agreement - 1 / 256) / (1 - 1 / 256), 0).astype(np.float32)
