"""From process start to the first token of an 8B model whose files lie in the page cache, and the memory of the process.

Enters: the engine's path, the folder that holds `model` (for its tokenizer), a folder with 17 GB of room.
Leaves: one line of JSON. Needs torch and safetensors, which make the files (random weights of Llama-3.1-8B's shape).
"""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from checkpoint import make

ENGINE, DATA, FOLDER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) / "llama-3.1-8b"
PORT = 18403


def first_token():
    body = json.dumps({"model": "m", "prompt": list(range(10, 42)), "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as response:
        json.load(response)


def run():
    begun = time.time()
    command = [ENGINE, "serve", "--model", FOLDER, "--served-name", "m", "--listen", f"127.0.0.1:{PORT}", "--drain-grace", "0s",
               "--device", "cuda", "--context-tokens", "8192", "--kv-tokens", "131072"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                first_token()
                break
            except OSError:
                if process.poll() is not None or time.time() - begun > 90:
                    sys.exit(f"startup: the engine ended with {process.poll()}")
                time.sleep(0.01)
        seconds = time.time() - begun
        status = Path(f"/proc/{process.pid}/status").read_text()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith(("VmRSS", "RssAnon", "VmHWM"))}
        return seconds, kib
    finally:
        process.terminate()
        process.wait(60)


make(FOLDER, DATA, "llama-3.1-8b", whole_tokenizer=False)
runs = [run() for _ in range(3)]
seconds = sorted(run[0] for run in runs)
print(json.dumps({"first_token_s": [round(s, 2) for s in seconds], "median_s": round(seconds[1], 2), **runs[-1][1]}))
