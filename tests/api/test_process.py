"""The engine as a process: how it starts, how it refuses to, and how it ends."""

import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from conftest import MODEL, MODEL_DIR, Engine

QUESTION = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": "What is 3 + 4?"}]}


def ask(connection, **options):
    connection.request("POST", "/v1/chat/completions", json.dumps({**QUESTION, **options}))
    response = connection.getresponse()
    return response, response.read()


def run(tmp_path, *arguments):
    """A process that is expected to end by itself: its exit code and its termination message."""
    message = tmp_path / "termination-message"
    command = [os.environ["PLIMSOLL_ENGINE"], *arguments, "--termination-message-file", str(message)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    text = message.read_text() if message.exists() else "null"
    assert len(text) <= 4096
    return done.returncode, json.loads(text), done


def checkpoint(tmp_path):
    """A copy of the bundled model that a test may spoil."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for name in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(MODEL_DIR / name, copy / name)
    return copy


def test_a_drain_serves_what_still_arrives_and_tells_clients_to_leave():
    engine = Engine("--drain-grace", "1s")
    pooled = http.client.HTTPConnection(engine.address)
    response, _ = ask(pooled)
    assert response.status == 200 and response.getheader("connection") != "close"
    engine.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 0.8
    while engine.status("/ready") != 503:
        assert time.monotonic() < deadline
    response, body = ask(pooled)
    assert response.status == 200 and json.loads(body)["choices"]
    assert response.getheader("connection") == "close"
    assert engine.process.wait(timeout=10) == 0
    with pytest.raises(OSError):
        socket.create_connection(engine.address.split(":"), timeout=1)


def test_a_running_stream_outlives_the_signal():
    engine = Engine()
    connection = http.client.HTTPConnection(engine.address)
    body = {**QUESTION, "stream": True, "ignore_eos": True, "max_tokens": 300}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    first = response.readline()
    engine.process.send_signal(signal.SIGTERM)
    rest = response.read().decode()
    assert first.startswith(b"data: ") and rest.endswith("data: [DONE]\n\n")
    assert engine.process.wait(timeout=10) == 0


def test_a_second_signal_ends_at_once():
    engine = Engine("--drain-grace", "60s")
    engine.process.send_signal(signal.SIGTERM)
    while engine.status("/ready") != 503:
        time.sleep(0.01)
    engine.process.send_signal(signal.SIGINT)
    engine.process.wait(timeout=5)


@pytest.mark.parametrize("flags", [["--steps-in-flight", "2"], ["--dtype", "f16"], ["--no-prefix-reuse"]])
def test_every_mode_gives_the_same_answer(flags):
    engine = Engine(*flags)
    try:
        for _ in range(2):
            _, body = ask(http.client.HTTPConnection(engine.address))
            assert json.loads(body)["choices"][0]["message"]["content"] == "3 + 4 = 7"
        cached = json.loads(ask(http.client.HTTPConnection(engine.address))[1])
        assert cached["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "shorter than a page"
    finally:
        engine.stop()


def test_a_model_that_is_not_there_is_named(tmp_path):
    code, report, _ = run(tmp_path, "serve", "--model", str(tmp_path / "nothing"), "--listen", "127.0.0.1:0")
    assert (code, report["reason"]) == (12, "ModelNotFound")
    assert "nothing" in report["message"]


def test_a_model_that_does_not_fit_is_refused_with_the_sum(tmp_path):
    code, report, _ = run(
        tmp_path, "serve", "--model", str(MODEL_DIR), "--listen", "127.0.0.1:0", "--memory-bytes", "50000000")
    assert (code, report["reason"]) == (10, "DoesNotFit")
    assert "weights" in report["message"] and "GiB" in report["message"]


@pytest.mark.parametrize(
    ("name", "spoil", "code", "reason"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100_000]), 15, "CorruptWeights"),
        ("tokenizer.json", lambda path: path.write_text("{"), 15, "CorruptWeights"),
        ("tokenizer.json", lambda path: path.unlink(), 14, "UnsupportedModel"),
        ("config.json", lambda path: path.write_text(path.read_text().replace("llama", "mamba").replace("Llama", "Mamba")), 14, "UnsupportedModel"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_by_name(tmp_path, name, spoil, code, reason):
    copy = checkpoint(tmp_path)
    spoil(copy / name)
    found, report, _ = run(tmp_path, "serve", "--model", str(copy), "--listen", "127.0.0.1:0")
    assert (found, report["reason"]) == (code, reason)
    assert name in report["message"]


def test_an_address_in_use_is_said_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, report, _ = run(tmp_path, "serve", "--model", str(MODEL_DIR), "--listen", address)
    assert (code, report["reason"]) == (70, "Internal")
    assert address in report["message"]


def test_a_checkpoint_without_a_template_serves_prompts_alone(tmp_path):
    copy = checkpoint(tmp_path)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    engine = Engine("--model", str(copy))
    try:
        response, body = ask(http.client.HTTPConnection(engine.address))
        assert (response.status, json.loads(body)["error"]["code"]) == (400, "no_chat_template")
    finally:
        engine.stop()


def test_inspect_prints_facts_and_leaves_them_for_the_operator(tmp_path):
    code, facts, done = run(tmp_path, "inspect", str(MODEL_DIR), "--json")
    assert code == 0 and json.loads(done.stdout) == facts
    assert facts["family"] == "llama" and facts["contextTokens"] == 2048
    code, report, _ = run(tmp_path, "inspect", "file:///nothing/here")
    assert (code, report["reason"]) == (12, "ModelNotFound")


def half_a_billion_zeros(folder):
    """A checkpoint that takes a while to load and no room on the disk: its weights are a hole in a file."""
    hidden, intermediate, layers, vocabulary = 1024, 4096, 32, 4096
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": 16,
               "num_key_value_heads": 16, "head_dim": 64, "vocab_size": vocabulary, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        p = f"model.layers.{layer}."
        shapes |= {p + f"self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {p + f"mlp.{name}_proj.weight": [intermediate, hidden] for name in ("gate", "up")}
        shapes |= {p + "mlp.down_proj.weight": [hidden, intermediate]}
        shapes |= {p + f"{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def test_probes_answer_while_the_model_loads(tmp_path):
    copy = checkpoint(tmp_path)
    half_a_billion_zeros(copy)
    command = [os.environ["PLIMSOLL_ENGINE"], "serve", "--model", str(copy), "--listen", "127.0.0.1:0", "--kv-tokens", "64"]
    options = ["--device", "cpu", "--context-tokens", "64", "--log-format", "json", "--drain-grace", "0s"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        address = json.loads(process.stderr.readline())["address"]

        def get(path):
            connection = http.client.HTTPConnection(address)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

        assert get("/health")[0] == 200
        status, body = get("/ready")
        assert status == 503 and json.loads(body)["status"] == "loading"
        response, body = ask(http.client.HTTPConnection(address))
        assert response.status == 503 and int(response.getheader("retry-after")) > 0
        assert json.loads(body)["error"]["code"] == "loading"
        deadline = time.monotonic() + 60
        while get("/ready")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
