"""Random conversations under every chat template at hand, held to what `transformers` renders and encodes.

Of every accepted row each trained run must follow the ids of apply_chat_template's prompt, be what apply_chat_template
writes after it, and every word of the row must be found again. Every refusal gives its reason in a line.
"""

import datetime
import functools
import random
import re

import pytest
import tokenizers
from real_tokenizers import LLAMA_CPP_TEMPLATES, get_template
from rendering_fixtures import all_templates, load_bare, load_real, render_row, trained_runs
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from postrain.data.bad_row import BadRow
from postrain.data.rendering.template import ChatTemplate
from postrain.data.rendering.tokenizer import Tokenizer

TODAY = datetime.date.today().isoformat()  # which templates print
# Templates with the tokenizer of their model. The others have Llama 2's with every token that a template writes.
REAL = {
    "qwen3": "qwen3",
    "qwen3_5_think": "qwen3_5",
    "glm4moe": "glm",
    "mistral_nemo": "mistral_nemo",
    "phi3_5": "phi3",
    "smollm3": "smollm3",
    "granite3_3": "granite3_3",
    "mistral_small": "mistral_small",
    "glm4_7": "glm",
}
# Templates of models that see: they read content as a list of parts alone, and ours is a string.
READ_PARTS = {name + training for name in ("idefics3", "llava_next", "smolvlm") for training in ("", "_training")}
TOKEN = re.compile(
    r"<\|[^<>|\s]+\|?>|<\w+\|>|<｜[^<>\s]+｜>|</?(?:think|tool_call|tool_response|tools|\w+_of_\w+|sop)>|\[/?\w+\]"
)
ODD = [
    " ",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "é",
    "e\u0301",
    "你好",
    "👩‍👩‍👧",
    "\u00a0",
    "{{ x }}",
    "{% if %}",
    '"',
    "\\",
    "<b>",
    "\r\n",
]
SPELT = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|user|>", "</s>", "[INST]", "<｜User｜>", "<|end|>", "<|call|>"]
SCHEMA = {"type": "object", "properties": {"q": {"type": "string", "description": "query"}}, "required": ["q"]}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds things", "parameters": SCHEMA}}]
REASONS = ("drops", "refuses", "must reason first", "differently from how", "no stop token", "block of its own")
REASONS += ("never closes", "in the content too", "more than one </think>", "before <think>", "without <think>")


@functools.cache
def load_every_token() -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer.from_str(load_bare("phi3").fast.to_str())
    texts = [ChatTemplate(get_template(name), {}, name).literals for name in all_templates()]
    names = {name for text in texts for name in TOKEN.findall(text)}
    tags = {tag for name in names if name.startswith("</") for tag in (name, name.replace("</", "<"))}
    fast.add_tokens([AddedToken(name, special=name not in tags, normalized=False) for name in sorted(names)])
    return fast


def load(template: str) -> Tokenizer:
    if template in REAL:
        return load_real(REAL[template], template)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(load_bare("phi3").folder, load_every_token(), special, None, get_template(template), template)


def make_text(rng, word, spelt=0.0):
    """Text with ``word`` in it, which is found in no other text."""
    pieces = [rng.choice(SPELT if rng.random() < spelt else ODD) for _ in range(rng.randint(0, 3))]
    pieces.insert(rng.randint(0, len(pieces)), word)
    return "".join(pieces)


def make_row(rng, spelt=0.0, simple=False):
    """A conversation of words all different; each message says "say7", its reasoning "why7", its call "arg7"."""
    has_tools, reasons, has_system = (not simple and rng.random() < share for share in (0.4, 0.5, 0.4))
    messages = [{"role": "system", "content": "say0"}] if has_system else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": make_text(rng, f"say{len(messages)}", spelt)})
        if has_tools and rng.random() < 0.5:
            call = {"name": "find", "arguments": {"q": f"arg{len(messages)}"}}
            calls = [{"type": "function", "id": "123456789", "function": call}]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            result = {"role": "tool", "name": "find", "tool_call_id": "123456789", "content": f"say{len(messages)}"}
            messages.append(result)
        answer = {"role": "assistant", "content": make_text(rng, f"say{len(messages)}", spelt)}
        if reasons:
            answer["reasoning_content"] = make_text(rng, f"why{len(messages)}")
        if rng.random() < 0.2:
            answer = {"role": "assistant", "content": answer["content"], "train": False}
        messages.append(answer)
    messages[-1].pop("train", None)
    return {"messages": messages} | ({"tools": TOOLS} if has_tools else {})


def render_theirs(tokenizer, row, stop, prompt, switches):
    """The ids of apply_chat_template for the first ``stop`` messages."""
    template = tokenizer.template
    messages = [template._for_template(template.lift_reasoning(m)) for m in row["messages"][:stop]]
    options = {"chat_template": template.source, "add_generation_prompt": prompt} | switches
    (text,), _ = render_jinja_template([messages], row.get("tools"), **options, **tokenizer.special_tokens)
    return tokenizer.encode_text(text)


def check_row(tokenizer, row, rendered):
    turns = [k for k, m in enumerate(row["messages"]) if m["role"] == "assistant" and m.get("train", True)]
    runs = []
    for sequence in rendered:
        switches = sequence.template_switches or ("",) * len(trained_runs(sequence))
        runs += [(sequence, *run, switch) for run, switch in zip(trained_runs(sequence), switches, strict=True)]
    assert len(runs) == len(turns)
    for sequence, start, end, switch in runs:
        ids = sequence.tokens.tolist()
        run, before = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[:start])
        (k,) = [k for k in turns if re.search(rf"(say|arg){k}(?!\d)", run)]
        message = row["messages"][k]
        switches = {name: value == "True" for name, value in [switch.split("=")]} if switch else {}
        prompt = render_theirs(tokenizer, row, k, True, switches)
        whole = render_theirs(tokenizer, row, k + 1, False, switches)
        assert ids[:start] == prompt
        assert ids[end - 1] in tokenizer.stop_ids and not tokenizer.stop_ids & set(ids[start : end - 1])
        if whole[:start] == prompt:  # no token lies over the end of the prompt, and earlier turns are as they were
            assert ids[start:end] == whole[start:end] or ids[start : end - 1] == whole[start:]  # GLM's, without its end
        words = [f"say{k}"] * bool(message["content"]) + [f"why{k}"] * ("reasoning_content" in message)
        assert all(run.count(w) == 1 for w in [*words, *[f"arg{k}"] * ("tool_calls" in message)])
        assert all(f"say{i}" in before for i, m in enumerate(row["messages"][:k]) if m["role"] != "assistant")
        assert "tools" not in row or "find" in before


def make_thinking_row(rng):
    """An answer with words and think tags in any order, and reasoning in its field too or not."""
    tags = [rng.choice(["<think>", "</think>", "\n", " "]) for _ in range(rng.randint(0, 3))]
    pieces = [*tags, "say0", "say1", "say2"]
    rng.shuffle(pieces)
    answer = {"role": "assistant", "content": rng.choice(["<think>", ""]) + "".join(pieces)}
    answer |= {"reasoning_content": "say3"} if rng.random() < 0.3 else {}
    return {"messages": [{"role": "user", "content": "ask"}, answer]}


def check_words(tokenizer, row, rendered):
    ((sequence, (start, end)),) = [(r, run) for r in rendered for run in trained_runs(r)]
    run, answer = tokenizer.decode(sequence.tokens[start:end]), row["messages"][1]
    assert all(run.count(f"say{i}") == 1 for i in range(3 + ("reasoning_content" in answer))), row


@pytest.mark.parametrize("template", [*all_templates(), "mistral_nemo", *LLAMA_CPP_TEMPLATES])
def test_random_conversations_are_those_of_transformers(template):
    tokenizer, rng, accepted = load(template), random.Random(template), 0
    rows = [(row, check_row) for row in (make_row(rng), make_row(rng), make_row(rng), make_row(rng, simple=True))]
    rows += [(make_thinking_row(rng), check_words) for _ in range(6)]
    for row, check in rows:
        try:
            rendered = render_row(row, tokenizer, template_date=TODAY)
        except BadRow as e:
            assert any(reason in e.reason for reason in REASONS) and "\n" not in str(e), e
            continue
        accepted += 1
        check(tokenizer, row, rendered)
    assert (accepted == 0) == (template in READ_PARTS)


@pytest.mark.parametrize("template", ["cohere2", "gemma4_v5", "muse_glimmer", "nemotron_3_nano", "phi3_5"])
def test_spelt_tokens_leave_the_templates_own_as_they_were(template):
    tokenizer, rng = load(template), random.Random(template)
    control, spelt = set(tokenizer.control_tokens.values()), re.compile("|".join(map(re.escape, SPELT)))
    for _ in range(4):
        row = make_row(rng, spelt=0.6, simple=True)
        messages = [m | {"content": spelt.sub("(token)", m["content"])} for m in row["messages"]]
        counts = []
        for contents in (row["messages"], messages):
            rendered = render_row({"messages": contents}, tokenizer, template_date=TODAY)
            counts.append([sum(t in control for t in sequence.tokens.tolist()) for sequence in rendered])
        assert counts[0] == counts[1]


def test_their_ids_are_those_of_apply_chat_template():
    tokenizer, row = load("phi3"), make_row(random.Random(0))
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast, **tokenizer.special_tokens)
    messages = [m for m in row["messages"] if not m.get("tool_calls") and m["role"] != "tool"]
    ids = theirs.apply_chat_template(messages, chat_template=tokenizer.chat_template)["input_ids"]
    assert ids == render_theirs(tokenizer, {"messages": messages}, len(messages), False, {})
