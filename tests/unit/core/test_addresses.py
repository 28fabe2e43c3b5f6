"""Secrets and folders in addresses are found in every form; usual addresses and prose pass."""

from __future__ import annotations

import pytest

from dtrain.core.addresses import has_secret, without_folders, without_secret
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError

SECRETS = [
    "https://me:hunter2@host/a.jsonl",
    "HTTPS://me:hunter2@host/a.jsonl",
    "https://hunter2@host/a.jsonl",
    "https://me%3Ahunter2%40host/a.jsonl",
    "https://me:hun/ter2@host/a.jsonl",
    "https://me:hunter2/@host/a.jsonl",
    "//me:hunter2@host/a.jsonl",
    "abfs://box:hunter2@account.dfs.core.windows.net/a.jsonl",
    "https://host/a.jsonl?token=hunter2",
    "https://host/a.jsonl?hunter2",
    "https://host/a.jsonl;token=hunter2",
    "https://host;token=hunter2/a.jsonl",
    "https://host/a.jsonl#token=hunter2",
    "https://host/a.jsonl#hunter2",
    "https://host/a.jsonl%3Ftoken=hunter2",
    "s3://bucket/a.jsonl?X-Amz-Credential=a&X-Amz-Signature=hunter2",
    "s3://bucket/a.jsonl?versionId=1&X-Amz-Security-Token=hunter2",
    "gs://bucket/a.jsonl?X-Goog-Signature=hunter2",
    "az://box/a.jsonl?sv=2024&sig=hunter2",
    "zip://a.jsonl::https://me:hunter2@host/a.zip",
    "simplecache::s3://bucket/a.zip?signature=hunter2",
    "team/model?token=hunter2",
    "host/a.jsonl?access_key=hunter2",
    "Rows of https://me:hunter2@host/a.jsonl are read",
    "See https://host/page?api_key=hunter2 for more",
]

PLAIN = [
    "https://host:8080/folder/a.jsonl",
    "http://[2001:db8::1]:8000/v1",
    "http://localhost:8000/v1",
    "s3://bucket/folder/*.jsonl",
    "abfs://box@account.dfs.core.windows.net/a.jsonl",
    "hf://datasets/team/rows@main/a.jsonl",
    "memory://bucket/**/b.jsonl",
    "zip://a.jsonl::https://host/a.zip",
    "dtrain:tiny-text/domain.jsonl",
    "C#/notes;old?.jsonl",
    "runs/token=1/a.jsonl",
    "Answer as on https://host/page?topic=basics, and write to me@host.",
    r"layers\.(?:[0-9]+)\.q_proj",
]


@pytest.mark.parametrize("address", SECRETS)
def test_a_secret_is_found_and_not_shown(address: str) -> None:
    assert has_secret(address)
    assert "hunter2" not in without_secret(address)
    with pytest.raises(UserError, match="would be logged") as caught:
        user_path(address)  # an argument of any command
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", PLAIN)
def test_other_addresses_and_prose_pass(address: str) -> None:
    assert not has_secret(address)
    assert without_secret(address) == address


@pytest.mark.parametrize(
    "path",
    [
        "/home/alice/rows.jsonl",
        "~alice/rows.jsonl",
        "../alice/rows.jsonl",
        "file:///home/alice/rows.jsonl",
        "local:///home/alice/rows.jsonl",
        "zip://a.jsonl::/home/alice/rows.jsonl",
    ],
)
def test_a_published_record_names_no_folder_of_this_machine(path: str) -> None:
    record = {path: [{"source": path, "rows": 3, "template": None}]}
    shown = str(without_folders(record))
    assert "alice" not in shown and shown.count("rows.jsonl") == 2


def test_other_settings_are_published_as_they_are() -> None:
    settings = {
        "path": "data/rows.jsonl",
        "base": "team/model",
        "rank": 8,
        "modules": [".*proj", "..(a/b)", "~(a/b)"],
    }
    assert without_folders([settings, PLAIN]) == [settings, PLAIN]
