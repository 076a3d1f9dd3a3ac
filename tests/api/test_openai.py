"""What OpenAI's client sees of the engine."""

import asyncio
import json
import math
import time
import urllib.request

import openai
import pytest
from conftest import MODEL, READY_SECONDS_MAX, Engine, strictly
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

QUESTION = [{"role": "user", "content": "Who is the harbour master of Plimsoll Bay?"}]
ANSWER = "Mara Tollard is the harbour master of Plimsoll Bay."


def chat(client, messages=QUESTION, **options):
    """The answer, after a strict look at its JSON."""
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages, **options)
    return strictly(json.loads(raw.content), ChatCompletion)


def complete(client, prompt, **options):
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=prompt, **options)
    value = json.loads(raw.content)
    checked = json.loads(raw.content)
    for choice in checked["choices"]:
        # OpenAI's own API has null here, which its models do not declare.
        if choice["logprobs"] and choice["logprobs"]["token_logprobs"][:1] == [None]:
            assert options.get("echo") and choice["logprobs"]["top_logprobs"][0] is None
            for name in choice["logprobs"]:
                del choice["logprobs"][name][0]
    strictly(checked, Completion)
    return Completion.construct(**value)


def events(response):
    """A stream's data lines as JSON; the last one says that it is over."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_it_is_ready_within_two_seconds(engine):
    assert engine.ready_seconds < READY_SECONDS_MAX


def test_models_are_listed_and_found(client):
    raw = client.models.with_raw_response.list()
    (only,) = json.loads(raw.content)["data"]
    assert strictly(only, Model).id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("another")
    assert error.value.code == "model_not_found"


def test_a_question_is_answered(client):
    answer = chat(client, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert choice.message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == MODEL


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_the_answer_in_pieces(client, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, **options
    ) as response:
        chunks = [strictly(event, ChatCompletionChunk) for event in events(response)]
    if usage:
        last = chunks.pop()
        whole = chat(client, temperature=0).usage
        assert last.choices == []
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 5


def test_the_clients_own_stream_reader_agrees(client):
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER
    stream = client.completions.create(model=MODEL, prompt="The harbour", max_tokens=12, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == complete(client, "The harbour", max_tokens=12, temperature=0).choices[0].text


def test_a_streamed_completion_is_strict_too(client):
    with client.completions.with_streaming_response.create(
        model=MODEL, prompt=["The harbour", "A ship"], n=2, max_tokens=8, logprobs=2, seed=5, stream=True
    ) as response:
        chunks = events(response)
    texts = [""] * 4
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            # Null until the end, as OpenAI sends it, though its model does not say so.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        strictly(chunk, Completion)
    whole = complete(client, ["The harbour", "A ship"], n=2, max_tokens=8, logprobs=2, seed=5)
    assert texts == [choice.text for choice in whole.choices]


def test_choices_differ_and_seeds_repeat_them(client):
    options = {"n": 4, "temperature": 1.5, "seed": 3, "max_tokens": 24}
    first = [choice.message.content for choice in chat(client, **options).choices]
    again = [choice.message.content for choice in chat(client, **options).choices]
    other = [choice.message.content for choice in chat(client, **{**options, "seed": 4}).choices]
    assert first == again
    assert len(set(first)) > 1
    assert first != other
    unseeded = {chat(client, temperature=2, max_tokens=16).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("options", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}])
def test_filters_that_leave_one_token_are_greedy(client, options):
    assert chat(client, temperature=1.5, **options).choices[0].message.content == ANSWER


def test_logprobs_stand_beside_their_tokens(client):
    choice = chat(client, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == ANSWER
    assert "".join(entry.token for entry in entries) == ANSWER
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert entry.logprob == tops[0] <= 0
        assert sum(math.exp(logprob) for logprob in tops) <= 1.0001
    alone = chat(client, temperature=0, logprobs=True).choices[0]
    assert [entry.top_logprobs for entry in alone.logprobs.content] == [[]] * len(entries)
    assert chat(client, temperature=0).choices[0].logprobs is None


def test_an_echoed_prompt_has_the_logprobs_of_its_generation(client):
    prompt = "The harbour master of Plimsoll Bay"
    made = complete(client, prompt, max_tokens=6, temperature=0, logprobs=2, echo=True).choices[0]
    read = complete(client, made.text, max_tokens=0, logprobs=2, echo=True)
    assert read.usage.completion_tokens == 0
    read = read.choices[0]
    assert (read.text, read.finish_reason) == (made.text, "length")
    assert read.logprobs.tokens == made.logprobs.tokens
    assert read.logprobs.text_offset == made.logprobs.text_offset
    assert read.logprobs.token_logprobs[0] is None and read.logprobs.top_logprobs[0] is None
    pairs = zip(read.logprobs.token_logprobs[1:], made.logprobs.token_logprobs[1:], strict=True)
    assert all(abs(a - b) < 1e-3 for a, b in pairs)
    # Offsets cut the text into its tokens; the first token is no text.
    offsets = [*made.logprobs.text_offset, len(made.text)]
    pieces = [made.text[a:b] for a, b in zip(offsets, offsets[1:])]
    assert pieces[1:] == made.logprobs.tokens[1:]
    assert pieces[0] == "" and made.logprobs.tokens[0] == "<|begin|>"


def test_prompts_may_be_tokens_and_many(client, engine):
    texts = ["The harbour", "A ship of the coast"]
    tokens = [tokenize(engine, prompt=text)["tokens"] for text in texts]
    options = {"max_tokens": 8, "temperature": 0}
    by_text = [choice.text for choice in complete(client, texts, **options).choices]
    assert by_text == [choice.text for choice in complete(client, tokens, **options).choices]
    assert by_text == [complete(client, ids, **options).choices[0].text for ids in tokens]
    assert detokenize(engine, tokens[0]) == "<|begin|>The harbour"


def tokenize(engine, **body):
    return post(engine, "/tokenize", body)


def detokenize(engine, tokens):
    return post(engine, "/detokenize", {"tokens": tokens})["prompt"]


def post(engine, path, body):
    request = urllib.request.Request(engine.url + path, json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request, timeout=10))


def test_messages_are_tokenized_as_the_chat_sees_them(client, engine):
    assert tokenize(engine, messages=QUESTION)["count"] == chat(client, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["ter of Pl", [" master", "zzz"], "l", ["lard is the", "is t"], "."])
def test_stop_strings_end_the_text_before_them(client, stop, stream):
    first = min(ANSWER.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in ANSWER)
    expected = ANSWER[:first]
    if stop == ["lard is the", "is t"]:
        # The one that is complete first wins.
        expected = ANSWER[: ANSWER.find("is t")]
    if stream:
        chunks = list(client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        choice = chat(client, temperature=0, stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == (expected, "stop")


def test_max_tokens_in_both_spellings(client):
    for name in ["max_tokens", "max_completion_tokens"]:
        answer = chat(client, temperature=0, **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3
    assert complete(client, "The harbour", temperature=0).usage.completion_tokens <= 16


def test_eos_can_be_ignored_and_stop_tokens_added(client, engine):
    longer = chat(client, temperature=0, max_tokens=40, extra_body={"ignore_eos": True})
    assert longer.usage.completion_tokens == 40
    assert longer.choices[0].message.content.startswith(ANSWER)
    (verb,) = tokenize(engine, prompt=" is", add_special_tokens=False)["tokens"]
    cut = chat(client, temperature=0, extra_body={"stop_token_ids": [verb]}).choices[0]
    assert (cut.message.content, cut.finish_reason) == (ANSWER[: ANSWER.find(" is")], "stop")


def test_logit_bias_bans_and_forces(client, engine):
    first = tokenize(engine, prompt="The", add_special_tokens=False)["tokens"][0]
    usual = tokenize(engine, prompt=ANSWER, add_special_tokens=False)["tokens"][0]
    banned = chat(client, temperature=0, logit_bias={str(usual): -100}).choices[0]
    assert banned.message.content[:2] != ANSWER[:2]
    forced = chat(client, temperature=0, logit_bias={str(first): 100}, max_tokens=3).choices[0]
    assert forced.message.content == "TheTheThe"


def test_penalties_stop_a_repetition(client, engine):
    token = tokenize(engine, prompt="The", add_special_tokens=False)["tokens"][0]
    options = {"temperature": 0, "logit_bias": {str(token): 30}, "max_tokens": 12}

    def count(**penalty):
        return chat(client, **options, **penalty).choices[0].message.content.count("The")

    assert count() == 12
    assert count(frequency_penalty=2, presence_penalty=2) < 12
    # Below 1 it rewards what the prompt holds, more than the bias does.
    assert count(extra_body={"repetition_penalty": 0.02}) == 0


def test_a_conversation_reuses_its_past(client):
    messages = [{"role": "system", "content": "Answer in one sentence. " + "Be brief and true. " * 30}]
    cached = []
    for question in ["What is 3 + 4?", "Who is the harbour master of Plimsoll Bay?", "What is 5 + 6?"]:
        messages.append({"role": "user", "content": question})
        answer = chat(client, messages, temperature=0, max_tokens=40)
        details = answer.usage.prompt_tokens_details
        assert details.cached_tokens < answer.usage.prompt_tokens
        cached.append(details.cached_tokens)
        # What came back is sent back as it came.
        messages.append(answer.choices[0].message.model_dump(exclude_unset=True))
    assert cached[0] == 0 and 64 <= cached[1] <= cached[2]
    other = chat(client, messages[:-1], max_tokens=1, extra_body={"cache_salt": "someone else"})
    assert other.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias.99999", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"max_tokens": 5000}, None, "context_length_exceeded"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "unsupported_parameter"),
        ({"extra_body": {"invented": 1}}, "invented", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
    ],
)
def test_a_wrong_parameter_is_named(client, options, param, code):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **options})
    assert (error.value.param, error.value.code) == (param, code)
    assert error.value.type == "invalid_request_error"


def test_a_template_that_refuses_is_quoted(client):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, [*QUESTION, {"role": "system", "content": "late"}])
    assert "only the first message may be a system message" in str(error.value)


def test_text_parts_are_read(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert chat(client, parts, temperature=0).choices[0].message.content == ANSWER


def test_a_wrong_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert error.value.code == "model_not_found"


def test_unusual_text_survives_the_way_there_and_back(client, engine):
    text = "Grüße 世界 🌍 é\u0301 \t\"quoted\" \\ \u2028"
    tokens = tokenize(engine, prompt=text, add_special_tokens=False)["tokens"]
    assert detokenize(engine, tokens) == text
    echoed = complete(client, text, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert echoed.text == text
    assert len(echoed.logprobs.tokens) == len(tokens) + 1


def test_keys_are_asked_for_where_there_are_some(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sesame\nsimsim\n")
    engine = Engine("--api-key-file", str(keys))
    try:
        assert chat(engine.client(api_key="simsim"), temperature=0).choices[0].message.content == ANSWER
        with pytest.raises(openai.AuthenticationError) as error:
            chat(engine.client(api_key="wrong"))
        assert error.value.code == "invalid_api_key"
        assert engine.status("/health") == engine.status("/metrics") == 200
        keys.write_text("another\n")
        with pytest.raises(openai.AuthenticationError):
            chat(engine.client(api_key="simsim"))
        chat(engine.client(api_key="another"), max_tokens=1)
    finally:
        engine.stop()


def test_many_streams_at_once_and_some_that_leave(engine):
    async def one(client, index):
        stream = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, stream=True,
            extra_body={"ignore_eos": index % 2 == 1}, max_tokens=400 if index % 2 else 40,
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if index % 2 and len(text) > 20:
                await stream.close()
                return None
        return text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client, index) for index in range(48)))

    texts = asyncio.run(all_of_them())
    assert texts[::2] == [ANSWER] * 24
    deadline = time.monotonic() + 10
    gauges = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    while any(engine.gauge(name) for name in gauges):
        assert time.monotonic() < deadline, {name: engine.gauge(name) for name in gauges}
        time.sleep(0.05)
