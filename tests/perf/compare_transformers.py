"""CPU tokens per second on the bundled model: the engine over HTTP beside transformers, on the same cores in one run.

Enters: a model directory and the engine's binary. Leaves: a table on stdout and, with --json, the figures.
Both sides get the same token prompts, greedy sampling, a fixed number of new tokens and the same number of threads.
transformers runs the 32 requests as one padded-free batch (all prompts have equal length), its best case; the engine
gets them as 32 separate HTTP requests. Rounds alternate, so that a slow minute of the machine hits both.

    python3 tests/perf/compare_transformers.py --engine target/release/plimsoll-engine --model tests/model
"""
import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import threading
import time


def prompts(count, length, vocabulary, seed):
    rng = random.Random(seed)
    return [[rng.randrange(256, vocabulary - 64) for _ in range(length)] for _ in range(count)]


class Transformers:
    def __init__(self, model, threads):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def run(self, batch, new_tokens):
        ids = self.torch.tensor(batch)
        start = time.perf_counter()
        with self.torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), do_sample=False,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)
        seconds = time.perf_counter() - start
        assert out.shape == (len(batch), len(batch[0]) + new_tokens)
        return seconds


class Engine:
    def __init__(self, binary, model, threads, running_max):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        env = dict(os.environ, RAYON_NUM_THREADS=str(threads))
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [binary, "serve", "--model", model, "--listen", f"127.0.0.1:{self.port}", "--served-name", "m",
             "--running-max", str(running_max), "--drain-grace", "0s"],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                if self.get("/ready") == 200:
                    break
            except OSError:
                pass
            assert self.process.poll() is None, "the engine ended before it was ready"
            time.sleep(0.005)
        self.start_seconds = time.perf_counter() - start

    def get(self, path):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        c.request("GET", path)
        return c.getresponse().status

    def complete(self, prompt, new_tokens):
        body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True})
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        c.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = c.getresponse()
        data = json.loads(answer.read())
        assert answer.status == 200 and data["usage"]["completion_tokens"] == new_tokens, data

    def run(self, batch, new_tokens):
        workers = [threading.Thread(target=self.complete, args=(p, new_tokens)) for p in batch]
        start = time.perf_counter()
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        return time.perf_counter() - start

    def rss_bytes(self):
        with open(f"/proc/{self.process.pid}/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))

    def stop(self):
        self.process.terminate()
        assert self.process.wait(30) == 0, "the engine did not end cleanly"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="target/release/plimsoll-engine")
    parser.add_argument("--model", default="tests/model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()

    vocabulary = json.load(open(os.path.join(args.model, "config.json")))["vocab_size"]
    peer = Transformers(args.model, args.threads)
    engine = Engine(args.engine, args.model, args.threads, 32)
    figures = {"threads": args.threads, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens,
               "engine_start_seconds": round(engine.start_seconds, 3), "engine_rss_ready_bytes": engine.rss_bytes()}
    for count in (1, 32):
        times = {"engine": [], "transformers": []}
        for r in range(args.rounds + 1):
            for name, side in (("engine", engine), ("transformers", peer)):
                batch = prompts(count, args.prompt_tokens, vocabulary, seed=1000 * count + 10 * r + (name == "engine"))
                seconds = side.run(batch, args.new_tokens)
                if r:  # the first round warms both up
                    times[name].append(count * args.new_tokens / seconds)
        for name, rates in times.items():
            figures[f"{name}_{count}_tokens_per_second"] = round(statistics.median(rates), 1)
            figures[f"{name}_{count}_range"] = [round(min(rates), 1), round(max(rates), 1)]
    figures["engine_rss_after_load_bytes"] = engine.rss_bytes()
    engine.stop()

    print(f"| requests | engine, tokens/s | transformers, tokens/s | ratio |\n|---|---|---|---|")
    for count in (1, 32):
        ours, theirs = (figures[f"{n}_{count}_tokens_per_second"] for n in ("engine", "transformers"))
        print(f"| {count} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} |")
    print(f"start to ready {figures['engine_start_seconds']:.2f} s, RSS {figures['engine_rss_ready_bytes'] / 2**20:.0f} MiB ready, "
          f"{figures['engine_rss_after_load_bytes'] / 2**20:.0f} MiB after the load")
    if args.json:
        json.dump(figures, open(args.json, "w"), indent=1)


if __name__ == "__main__":
    main()
