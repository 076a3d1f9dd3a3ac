"""LMDeploy's TurboMind on the workloads of `plimsoll-engine bench`, on the same card.

Enters: the folder that holds `model` (for its tokenizer), a shape's name, a folder with room for its files, the path of the
report. Leaves: one report as JSON with the keys of the engine's own. Needs lmdeploy 0.18, torch and safetensors.

The same terms for both: the engine's library is driven without HTTP or text, each request asks for its whole answer at once,
greedy, fresh random prompts in each repetition, no prefix cache, at most 256 running rows; timed from the first submission to
the last token, the middle one of three repetitions.
Run: python3 peer_lmdeploy.py data llama-3.2-1b /tmp out/lmdeploy_1b.json
"""

import asyncio
import csv
import json
import os
import random
import sys
import time
from pathlib import Path

from checkpoint import make

DATA, NAME, ROOM, REPORT = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
MIXED = Path(__file__).resolve().parent / "mixed600.csv"
BATCHES, PROMPTS, LONG = (8, 32, 64, 128, 256), (512, 2048, 8192), 8192


class TurboMind:
    """Takes requests as (prompt tokens, answer tokens) and gives the seconds until all are answered."""

    def __init__(self, folder):
        from lmdeploy import TurbomindEngineConfig, __version__
        from lmdeploy.messages import GenerationConfig
        from lmdeploy.turbomind import TurboMind as Engine
        from lmdeploy.utils import get_logger

        get_logger("lmdeploy").setLevel("WARNING")
        limits = TurbomindEngineConfig(
            dtype="bfloat16", model_format="hf", session_len=9216, max_batch_size=256, cache_max_entry_count=0.6,
            enable_prefix_caching=False, enable_metrics=False)
        self.version = __version__
        self.engine, self.config = Engine.from_pretrained(str(folder), engine_config=limits), GenerationConfig
        self.seats, self.session, self.chance, self.loop = [], 0, random.Random(1), asyncio.new_event_loop()

    async def answer(self, seat, session, prompt, tokens):
        config = self.config(max_new_tokens=tokens, ignore_eos=True, top_k=1, temperature=1.0)
        came = 0
        async for part in seat.async_stream_infer(session, prompt, gen_config=config, stream_output=False):
            came += len(part.token_ids)
        if came != tokens:
            raise RuntimeError(f"{came} of {tokens} tokens came back")

    def seconds(self, requests):
        while len(self.seats) < len(requests):
            self.seats.append(self.engine.create_instance())
        prompts = [[self.chance.randrange(1000, 120_000) for _ in range(length)] for length, _ in requests]
        first, self.session = self.session + 1, self.session + len(requests)

        async def together():
            await asyncio.gather(*(
                self.answer(seat, first + index, prompt, tokens)
                for index, (seat, prompt, (_, tokens)) in enumerate(zip(self.seats, prompts, requests))))

        begun = time.perf_counter()
        self.loop.run_until_complete(together())
        return time.perf_counter() - begun

    def usual(self, requests):
        return sorted(self.seconds(requests) for _ in range(3))[1]


def figures(engine):
    """Decoding is the difference of a long answer and one token, so that reading the prompt does not count."""
    yield "decode_bs1_ms_per_token", (engine.usual([(128, 257)]) - engine.usual([(128, 1)])) / 256 * 1e3
    yield "decode_bs1_ctx8k_ms_per_token", (engine.usual([(LONG, 129)]) - engine.usual([(LONG, 1)])) / 128 * 1e3
    for rows in BATCHES:
        seconds = engine.usual([(128, 129)] * rows) - engine.usual([(128, 1)] * rows)
        yield f"decode_bs{rows}_tok_s", rows * 128 / seconds
    for length in PROMPTS:
        yield f"prefill_{length}_ms", engine.usual([(length, 1)]) * 1e3
    mixed = [tuple(map(int, row)) for row in csv.reader(MIXED.open())]
    yield "mixed600_out_tok_s", sum(tokens for _, tokens in mixed) / engine.usual(mixed)


def main():
    import torch

    folder = ROOM / NAME
    if not (folder / "config.json").exists():
        make(folder, DATA, NAME, whole_tokenizer=False)
        torch.cuda.empty_cache()
    engine = TurboMind(folder)
    report = {"model": NAME, "quant": "bf16", "engine": f"lmdeploy {engine.version} turbomind", "device": torch.cuda.get_device_name()}
    engine.seconds([(128, 32)] * 4)
    for key, value in figures(engine):
        report[key] = value
        print(key, round(value, 3), flush=True)
        REPORT.write_text(json.dumps(report, indent=1) + "\n")


main()
sys.stdout.flush()
os._exit(0)  # its threads would keep the process
