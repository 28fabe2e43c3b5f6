"""A merged model behind a server of OpenAI's protocol, asked by OpenAI's own client."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
import torch

from dtrain.config.schema import Model
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input
from dtrain.samples.make import ensure
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import ServedModel
from tests.ports import free_port

TALK = [{"role": "user", "content": "What is a number?"}]
START_SECONDS = 180


def is_up(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture
def merged(tmp_path: Path, make_adapter: Callable[..., Path]) -> Path:
    """The model tiny-llama with an adapter merged into it."""
    base, out = ensure("tiny-llama"), tmp_path / "merged"
    layers = {"model.layers.0.self_attn.q_proj": (64, 64), "lm_head": (512, 64)}
    settings = {"lora_alpha": 0.1, "target_modules": [*layers]}
    adapter = make_adapter(tmp_path / "adapter", layers, 4, **settings)
    job = MergeJob(base, out, source="a test")
    job.merge_adapters([adapter_input(MergeableAdapter.open(adapter, job.tensors))])
    return out


@pytest.fixture
def address(merged: Path, environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The address of `transformers serve` with the merged model."""
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", merged, "--device", "cpu"]
    log = open(tmp_path / "log", "wb")  # noqa: SIM115 - closed below
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    try:
        while not is_up(f"http://127.0.0.1:{port}"):
            assert server.poll() is None and time.monotonic() < deadline, (
                tmp_path / "log"
            ).read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        log.close()


def test_server_answers_equal_the_model(merged: Path, address: str) -> None:
    speaker = TextGenerator(ServedModel(str(merged)), Model(base="tiny"), torch.device("cpu"))
    (expected,) = speaker.answers([speaker.prompt(TALK)], 12)  # type: ignore[arg-type]
    http = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", http_client=http)
    asked = {"model": str(merged), "messages": TALK, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert expected and str(whole.choices[0].message.content).strip() == expected
    chunks = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts).strip() == expected and len(texts) > 1
