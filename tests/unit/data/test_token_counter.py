"""A scan that counts tokens agrees with the prepared data of a stage."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.config.data import Source
from dtrain.data.records import open_source
from dtrain.data_quality.scan import TokenCounter, scan


@pytest.fixture
def scan_rows(tmp_path, write_rows, monkeypatch):
    """scan_rows(rows, …) → the result of a scan."""
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "scan-cache"))

    def run(rows, **options):
        return scan([open_source(Source(path=write_rows("a.jsonl", rows)))], **options)

    return run


def test_tokens_are_counted_as_in_training(scan_rows, tokenizer, prepared, tmp_path) -> None:
    rows = [{"instruction": "Who?", "output": "Me. " * n} for n in range(1, 20)]
    counter = TokenCounter(tokenizer, "auto")
    result = scan_rows(rows, token_counter=counter, sequence_length=80)
    source = {"path": str(tmp_path / "a.jsonl")}
    dataset = prepared("sft", [source], packing=False, sequence_length=512)
    indices = np.arange(dataset.sequences_per_epoch)
    assert sorted(result.column("tokens")) == sorted(dataset.tokens(indices))
    overlong = int((dataset.tokens(indices) > 80).sum())
    assert 0 < overlong == int(result.has_finding("overlong").sum())


def test_rows_that_the_template_rejects_are_findings(scan_rows, make_tokenizer) -> None:
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    strict += "{% endif %}{{ m.content }}{% endfor %}"
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "system": "s"}]
    result = scan_rows(rows, token_counter=TokenCounter(make_tokenizer(strict), "auto"))
    assert result.has_finding("template").tolist() == [False, True]
