"""Personal data: what is found, what is left alone, and what a mask leaves."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data_quality.pii import find_pii, mask_pii, redact


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to mei.lin+x@mail.com.cn.", "email"),
        ("身份证11010519491231002X。", "id_number"),
        ("SSN 536-90-4399", "id_number"),
        ("IBAN GB82 WEST 1234 5698 7654 32", "id_number"),
        ("CPF 390.533.447-05", "id_number"),
        ("pay with 4539 5787 6362 1486 now", "bank_card"),
        ("电话13812345678。", "phone"),
        ("call +44 20 7946 0958 or", "phone"),
        ("call (650) 253-0000", "phone"),
        ("from 8.8.8.8:53", "ip_address"),
        ("to 2001:4860:4860::8888 by", "ip_address"),
        ("key AKIAIOSFODNN7EXAMPLE", "secret"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
        ("电话+86 10 6552 9988 12 个", "phone"),
        ("IBAN BE71 0961 2345 6769 AND MORE", "id_number"),
        ("510107196208017328", "id_number"),
        ("密钥AKIAIOSFODNN7EXAMPLE是", "secret"),
        ("地址2001:4860:4860::8888。", "ip_address"),
    ],
)
def test_personal_data_is_found_and_masked(text, kind) -> None:
    (match,) = find_pii(text)
    assert match.kind == kind
    masked = mask_pii(text)
    assert masked == f"{text[: match.start]}[{kind}]{text[match.stop :]}"
    assert not find_pii(masked)
    assert text[match.start : match.stop] not in redact(text, match)


def test_a_mask_leaves_the_surrounding_words() -> None:
    text = "请写信到lin@mail.com.cn谢谢，或+8613812345678找müller@web.de。"
    assert mask_pii(text) == "请写信到[email]谢谢，或[phone]找[email]。"


@pytest.mark.parametrize(
    "text",
    [
        "11010519491231002",
        "110105194912310021",
        "4539 5787 6362 1487",
        "192.168.1.1, 127.0.0.1, 10.1.2.3 and 999.1.1.1",
        "on 2024-01-02 03:04:05, release 4.12.0",
        "someone@example.com, user@localhost, @handle",
        "3.14159265358979 and 1234567890123456",
        "ISBN 978-3-16-148410-0",
        "12345678901",
    ],
)
def test_similar_texts_are_not_masked(text) -> None:
    assert find_pii(text) == []


@given(st.text(alphabet="0123456789 -.()+@aX:/", max_size=60))
def test_matches_never_overlap(text) -> None:
    matches = find_pii(text)
    assert all(a.stop <= b.start for a, b in pairwise(matches))
    assert all(0 <= match.start < match.stop <= len(text) for match in matches)
