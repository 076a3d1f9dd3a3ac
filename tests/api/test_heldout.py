"""The bundled model through the API: the share of held-out questions it answers right, greedily, as evaluate.py judges them."""

import concurrent.futures
import json
import sys

from conftest import MODEL, MODEL_DIR

sys.path.insert(0, str(MODEL_DIR))
from checks import right  # noqa: E402

SHARE_MIN = 0.95
# Above this the earlier answers of a conversation stand as given, as in evaluate.py.
ROUNDS_MAX = 8


def answer(client, item):
    """The last answer of a conversation in which the model reads what it itself said before."""
    rounds = sum(message["role"] == "assistant" for message in item["messages"])
    if rounds > ROUNDS_MAX:
        return ask(client, item["messages"][:-1])
    talk = []
    for message in item["messages"]:
        said = ask(client, talk) if message["role"] == "assistant" else message["content"]
        talk.append({**message, "content": said})
    return talk[-1]["content"]


def ask(client, messages):
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=160)
    return answer.choices[0].message.content


def test_the_served_model_answers_ninety_five_percent_of_held_out_questions(client):
    items = json.loads((MODEL_DIR / "heldout.json").read_text())
    # The engine refuses `tools`; those questions are asked by evaluate.py alone.
    items = [item for item in items if "tools" not in item]
    assert len(items) >= 350
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda item: answer(client, item), items))
    wrong = [(item, said) for item, said in zip(items, answers) if not right(item["check"], said)]
    share = 1 - len(wrong) / len(items)
    assert share >= SHARE_MIN, (share, [(item["family"], item["check"], said) for item, said in wrong])
