"""Held-out questions of the bundled model, answered by the engine on the GPU and on the CPU: the score of each.

Enters: the engine's path and the folder that holds `model`. Leaves: one line per device, and exit status 1 where the scores
differ by more than one question, or fall below 95 %. Needs nothing but Python.
"""

import concurrent.futures
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ENGINE, DATA = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, str(DATA / "model"))
from checks import right  # noqa: E402

ROUNDS_MAX = 8


def ask(port, messages):
    body = json.dumps({"model": "plim", "messages": messages, "temperature": 0, "max_tokens": 160}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def answer(port, item):
    rounds = sum(message["role"] == "assistant" for message in item["messages"])
    if rounds > ROUNDS_MAX:
        return ask(port, item["messages"][:-1])
    talk = []
    for message in item["messages"]:
        said = ask(port, talk) if message["role"] == "assistant" else message["content"]
        talk.append({**message, "content": said})
    return talk[-1]["content"]


def score(device, port):
    command = [ENGINE, "serve", "--model", DATA / "model", "--served-name", "plim", "--device", device,
               "--listen", f"127.0.0.1:{port}", "--drain-grace", "0s", "--kv-tokens", "262144"]
    begun = time.time()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1)
                break
            except OSError:
                if process.poll() is not None or time.time() - begun > 60:
                    sys.exit(f"heldout: the engine did not become ready on {device}")
                time.sleep(0.02)
        ready = time.time() - begun
        items = [item for item in json.loads((DATA / "model" / "heldout.json").read_text()) if "tools" not in item]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda item: answer(port, item), items))
        good = sum(right(item["check"], said) for item, said in zip(items, answers))
        print(f"heldout on {device}: {good} of {len(items)} right; ready after {ready:.2f} s", flush=True)
        return good, len(items)
    finally:
        process.terminate()
        process.wait(30)


(gpu, count), (cpu, _) = score("cuda", 18401), score("cpu", 18402)
sys.exit(0 if abs(gpu - cpu) <= 1 and gpu >= 0.95 * count else 1)
