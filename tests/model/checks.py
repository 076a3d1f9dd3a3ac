"""Whether an answer to a held-out question is right. Enters: a check of heldout.json and the answer's text. Needs no torch, so that
tests of the served model judge by the same rules as evaluate.py."""

import json
import re


def right(check, answer):
    expected = check["answer"]
    if check["kind"] == "contains":
        return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer) is not None
    if check["kind"] == "exact":
        return answer.strip() == expected.strip()
    if check["kind"] == "number":
        return re.findall(r"\d+", answer)[-1:] == [expected]
    inner = re.fullmatch(r"<tool_call>(.*)</tool_call>", answer.strip()) if check["kind"] == "tool" else [None, answer]
    try:
        return json.loads(inner[1]) == expected
    except (TypeError, json.JSONDecodeError):
        return False
