"""Starts the engine with the bundled model, and reads every answer twice: as raw JSON and through the client's models."""

import json
import os
import pathlib
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

MODEL_DIR = pathlib.Path(__file__).parent.parent / "model"
MODEL = "plim"
# From the start of the process to the first answer of /ready.
READY_SECONDS_MAX = 2.0


class Engine:
    """A process that serves on a free port."""

    def __init__(self, *flags):
        command = [os.environ["PLIMSOLL_ENGINE"], "serve", "--served-name", MODEL, "--listen", "127.0.0.1:0"]
        command += ["--log-format", "json", *flags]
        for flag, value in [("--model", str(MODEL_DIR)), ("--drain-grace", "0s")]:
            command += [] if flag in flags else [flag, value]
        began = time.monotonic()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        lines = iter(self.process.stderr.readline, "")
        self.address = next(e["address"] for e in map(json.loads, lines) if e["message"].startswith("listening"))
        self.log = []
        # A pipe that nobody reads would stop the engine when it is full.
        threading.Thread(target=self.log.extend, args=[lines], daemon=True).start()
        while self.status("/ready") != 200:
            assert self.process.poll() is None, self.log
            assert time.monotonic() - began < 30
            time.sleep(0.01)
        self.ready_seconds = time.monotonic() - began

    @property
    def url(self):
        return f"http://{self.address}"

    def status(self, path):
        try:
            return urllib.request.urlopen(self.url + path, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    def client(self, **options):
        return openai.OpenAI(base_url=self.url + "/v1", max_retries=0, **{"api_key": "none", **options})

    def gauge(self, name):
        text = urllib.request.urlopen(self.url + "/metrics", timeout=10).read().decode()
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=30) == 0, self.log


@pytest.fixture(scope="session")
def engine():
    engine = Engine()
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def client(engine):
    return engine.client()


def strictly(raw, model):
    """Raw JSON must be exactly what the client's model declares: right types, nothing lost, nothing added."""
    answer = model.model_validate(raw, strict=True)
    assert answer.model_dump(mode="json", exclude_unset=True) == raw
    no_extras(answer)
    return answer


def no_extras(value):
    if isinstance(value, openai.BaseModel):
        assert not value.model_extra, f"{type(value).__name__} has undeclared fields {value.model_extra}"
        for name in type(value).model_fields:
            no_extras(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            no_extras(item)
