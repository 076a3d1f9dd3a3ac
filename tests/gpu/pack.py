"""Collects what a GPU machine needs to test and measure the engine, from what cargo has just built.

Enters: cargo's JSON messages on standard input, the folder to fill as the argument.
Leaves: that folder with stripped programs, goldens, the trained model and run.sh; nothing else is needed there but a driver.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Test binaries by (package, target); the engine's own come along because the goldens do.
TESTS = {
    ("plimsoll-kernels", "attention"), ("plimsoll-kernels", "gemm_portable"), ("plimsoll-kernels", "gemm_stream"),
    ("plimsoll-kernels", "gemm_tile"), ("plimsoll-kernels", "sampling"), ("plimsoll-kernels", "step"),
    ("plimsoll-engine", "cuda"),
}
PROGRAMS = {"plimsoll-engine"}
LIMIT = 60 << 20


def main():
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tests").mkdir(parents=True)
    (folder / "bin").mkdir()
    found = set()
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("reason") != "compiler-artifact" or not message.get("executable"):
            continue
        package = message["package_id"].split("#")[0].rsplit("/", 1)[-1]
        package = {"kernels": "plimsoll-kernels", "engine": "plimsoll-engine"}.get(package, package)
        name, is_test = message["target"]["name"], message["profile"]["test"]
        if is_test and (package, name) in TESTS:
            place = folder / "tests" / f"{package.removeprefix('plimsoll-')}-{name}"
        elif not is_test and name in PROGRAMS:
            place = folder / "bin" / name
        else:
            continue
        shutil.copy(message["executable"], place)
        subprocess.run(["strip", place], check=True)
        found.add(name)
    missing = {name for _, name in TESTS} | PROGRAMS
    missing -= found
    if missing:
        sys.exit(f"pack: cargo built no {', '.join(sorted(missing))}")
    for part in ("goldens", "model"):
        shutil.copytree(ROOT / "tests" / part, folder / "data" / part, ignore=shutil.ignore_patterns("__pycache__", "corpus*", "loss*"))
    for part in ("run.sh", "ceilings.py", "bf16.py", "heldout.py", "checkpoint.py", "startup.py", "serve.py", "peer_lmdeploy.py"):
        shutil.copy(ROOT / "tests" / "gpu" / part, folder / part)
    shutil.copy(ROOT / "engine" / "src" / "bench" / "mixed600.csv", folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB; on the GPU machine: bash run.sh")
    if size > LIMIT:
        sys.exit(f"pack: {size} bytes are more than {LIMIT}")


main()
