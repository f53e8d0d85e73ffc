"""A server of an FP4 checkpoint: ``python -m marlin_w4a16 serve``, over a port. Needs ``transformers[serving]``."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

from checkpoints.formats import written
from hf.loading import reference

NAME = "ct-nvfp4a16"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint with a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(written(NAME, "llama"), tmp_path / "model")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(208)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def address(folder) -> Iterator[str]:
    """Of a server that is ready."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen([sys.executable, "-m", "marlin_w4a16", "serve", str(folder), *options])
    try:
        yield _ready(f"http://localhost:{port}", server)
    finally:
        server.terminate()
        server.wait(30)


def _ready(address: str, server: subprocess.Popen) -> str:
    for _ in range(240):
        assert server.poll() is None
        try:
            urlopen(f"{address}/health", timeout=5)
            return address
        except URLError:
            time.sleep(0.5)
    raise AssertionError("no answer")


@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
def test_answers_are_those_of_the_dense_model(address):
    prompt = [5, 9, 77, 31]
    message = {"role": "user", "content": " ".join(map(str, prompt))}
    body = {"messages": [message], "max_tokens": 6, "temperature": 0}
    headers = {"content-type": "application/json"}
    answer = urlopen(Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers), timeout=60)
    text, dense = json.load(answer)["choices"][0]["message"]["content"], reference(NAME, "llama", torch.float32)
    expected = dense.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 4:]
    assert text.split() == [str(token) for token in expected.tolist()]
