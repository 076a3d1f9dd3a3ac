"""A model served over HTTP and driven by `bench serve`: the mixed requests in a closed loop, then at rising rates.

Enters: the engine's path, the folder that holds `model` (for its tokenizer), a shape's name, a folder with room for it, and the
folder for results. Leaves: one report as JSON for each load, and their tables on standard output. Needs torch and safetensors,
which make the files (random weights).
"""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from checkpoint import make

ENGINE, DATA, NAME = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
FOLDER, RESULTS = Path(sys.argv[4]) / NAME, Path(sys.argv[5])
PORT = 18404
LOADS = {
    "warm_up": ["--concurrency=256", "--requests=300", "--seed=9"],
    "closed_256": ["--concurrency=256"],
    "closed_64": ["--concurrency=64"],
    "closed_8": ["--concurrency=8", "--requests=100"],
    "closed_1": ["--concurrency=1", "--requests=20"],
    "seed": ["--workload=seed", "--concurrency=1"],
}
# Requests a second, as shares of what the closed loop took.
RATES = (0.5, 0.8)


def wait_until_ready(process):
    begun = time.time()
    while time.time() - begun < 120:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=2) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        if process.poll() is not None:
            sys.exit(f"serve: the engine ended with {process.poll()}")
        time.sleep(0.05)
    sys.exit("serve: the engine was not ready within 120 s")


def load(name, flags):
    """A load's requests in a second."""
    report = RESULTS / f"serve_{NAME}_{name}.json"
    command = [ENGINE, "bench", "serve", f"--url=http://127.0.0.1:{PORT}", f"--json={report}", *flags]
    print(f"\n-- {name}: {' '.join(flags)}", flush=True)
    done = subprocess.run(command, timeout=120)
    if done.returncode:
        sys.exit(f"serve: {name} ended with {done.returncode}")
    return json.loads(report.read_text())["requests_per_s"]


def main():
    make(FOLDER, DATA, NAME, whole_tokenizer=True)
    command = [ENGINE, "serve", "--model", FOLDER, "--served-name", NAME, "--listen", f"127.0.0.1:{PORT}", "--drain-grace", "0s",
               "--device", "cuda", "--context-tokens", "8192", "--waiting-max", "1024", "--no-prefix-reuse"]
    process = subprocess.Popen(command, stderr=open(RESULTS / f"serve_{NAME}.log", "w"))
    try:
        wait_until_ready(process)
        taken = {name: load(name, flags) for name, flags in LOADS.items()}
        for share in RATES:
            load(f"open_{share}", [f"--rate={taken['closed_256'] * share:.2f}"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


main()
