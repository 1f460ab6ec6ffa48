"""What is trained under the templates of real models, written out by hand, token for token.

Every expectation is what the model would have to produce when served: it begins where the generation prompt ends
and ends with a token at which serving stops. A string instead of a list is (a part of) the reason of a refusal.
"""

import numpy as np
import pytest
from rendering_fixtures import load_bare, load_real, render_row, trained_runs, trained_texts

from postrain.data.bad_row import BadRow
from postrain.data.rendering.render import render_prompt

SYSTEM = {"role": "system", "content": "Be brief."}
ASK, MORE = {"role": "user", "content": "2+2?"}, {"role": "user", "content": "times 3?"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "mul", "description": "Multiply", "parameters": SCHEMA}}]


def say(content, reasoning=None, calls=()):
    message = {"role": "assistant", "content": content}
    message |= {"reasoning_content": reasoning} if reasoning else {}
    calls = [{"type": "function", "function": {"name": "mul", "arguments": arguments}} for arguments in calls]
    return message | ({"tool_calls": calls} if calls else {})


RESULT = {"role": "tool", "name": "mul", "content": "12"}
ROWS = {
    "plain": {"messages": [SYSTEM, ASK, say("4")]},
    "multi": {"messages": [SYSTEM, ASK, say("4"), MORE, say("12")]},
    "reason": {"messages": [SYSTEM, ASK, say("4", "add"), MORE, say("12", "mul")]},
    "inline": {
        "messages": [SYSTEM, ASK, say("<think>\nadd\n</think>\n\n4"), MORE, say("<think>\nmul\n</think>\n\n12")]
    },
    "tools": {"messages": [MORE, say(None, None, ['{"a": 4, "b": 3}']), RESULT, say("It is 12.")], "tools": TOOLS},
    "reason_tools": {
        "messages": [MORE, say("", "use mul", [{"a": 4, "b": 3}]), RESULT, say("It is 12.", "done")],
        "tools": TOOLS,
    },
    "two_calls": {"messages": [MORE, say("", None, [{"a": 4, "b": 3}, {"a": 5, "b": 3}])], "tools": TOOLS},
    "words_and_call": {"messages": [MORE, say("Let me see.", None, [{"a": 4, "b": 3}])], "tools": TOOLS},
}

DROPS_REASONING = "the chat template drops the reasoning: 'add'"
QWEN_CALL = '<tool_call>\n{"name": "mul", "arguments": {"a": 4, "b": 3}}\n</tool_call>'
QWEN_CALL_2 = '<tool_call>\n{"name": "mul", "arguments": {"a": 5, "b": 3}}\n</tool_call>'
LLAMA_CALL = '{"name": "mul", "parameters": {"a": 4, "b": 3}}<|eot_id|>'
OSS_CALL = ' to=functions.mul<|channel|>commentary json<|message|>{"a": 4, "b": 3}<|call|>'
OSS_FINAL, OSS_THINK = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
OSS_NEXT = "<|end|><|start|>assistant"
EOS = "<｜end▁of▁sentence｜>"
DEEPSEEK_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>mul\n```json\n{"a": 4, "b": 3}\n```'
    f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
)
MUST_REASON = "opens <think>, so the model must reason first, and the message has no reasoning_content"
NO_TOOLS = "the chat template drops the tools"
NO_CALL = "drops the tool call 'mul'"

QWEN25 = {
    "plain": [["4<|im_end|>"]],
    "multi": [["4<|im_end|>", "12<|im_end|>"]],
    "reason": DROPS_REASONING,
    "inline": [["<think>\nadd\n</think>\n\n4<|im_end|>", "<think>\nmul\n</think>\n\n12<|im_end|>"]],
    "tools": [[QWEN_CALL + "<|im_end|>", "It is 12.<|im_end|>"]],
    "reason_tools": "drops the reasoning: 'use mul'",
    "two_calls": [[QWEN_CALL + "\n" + QWEN_CALL_2 + "<|im_end|>"]],
    "words_and_call": [["Let me see.\n" + QWEN_CALL + "<|im_end|>"]],
}
LLAMA3 = {
    "plain": [["4<|eot_id|>"]],
    "multi": [["4<|eot_id|>", "12<|eot_id|>"]],
    "reason": DROPS_REASONING,
    "inline": [["<think>\nadd\n</think>\n\n4<|eot_id|>", "<think>\nmul\n</think>\n\n12<|eot_id|>"]],
    "tools": NO_CALL,
    "reason_tools": "drops the reasoning: 'use mul'",
    "two_calls": NO_CALL,
    "words_and_call": NO_CALL,
}
LLAMA31 = LLAMA3 | {
    "tools": [[LLAMA_CALL, "It is 12.<|eot_id|>"]],
    "two_calls": "refuses this conversation: This model only supports single tool-calls at once!",
    "words_and_call": "drops the content: 'Let me see.'",
}
QWEN3 = {
    # Without reasoning the generation prompt is the one of enable_thinking=False, which holds the empty block.
    "plain": [["4<|im_end|>"]],
    "multi": [["4<|im_end|>"], ["12<|im_end|>"]],
    "reason": [["<think>\nadd\n</think>\n\n4<|im_end|>"], ["<think>\nmul\n</think>\n\n12<|im_end|>"]],
    "inline": [["<think>\nadd\n</think>\n\n4<|im_end|>"], ["<think>\nmul\n</think>\n\n12<|im_end|>"]],
    "tools": [[QWEN_CALL + "<|im_end|>"], ["It is 12.<|im_end|>"]],
    # Reasoning between a question and its answer stays, so the steps share one sequence.
    "reason_tools": [
        [
            "<think>\nuse mul\n</think>\n\n" + QWEN_CALL + "<|im_end|>",
            "<think>\ndone\n</think>\n\nIt is 12.<|im_end|>",
        ]
    ],
    "two_calls": [[QWEN_CALL + "\n" + QWEN_CALL_2 + "<|im_end|>"]],
    "words_and_call": [["Let me see.\n" + QWEN_CALL + "<|im_end|>"]],
}
QWEN35_CALL = "<tool_call>\n<function=mul>\n<parameter=a>\n4\n</parameter>\n<parameter=b>\n3\n</parameter>\n"
QWEN35_CALL += "</function>\n</tool_call>"
QWEN35_CALL_2 = QWEN35_CALL.replace("\n4\n", "\n5\n")
# The prompt opens <think>, or holds an empty block: what is trained begins after it.
QWEN35 = {
    "plain": [["4<|im_end|>"]],
    "multi": [["4<|im_end|>"], ["12<|im_end|>"]],
    "reason": [["add\n</think>\n\n4<|im_end|>"], ["mul\n</think>\n\n12<|im_end|>"]],
    "inline": [["add\n</think>\n\n4<|im_end|>"], ["mul\n</think>\n\n12<|im_end|>"]],
    "tools": [[QWEN35_CALL + "<|im_end|>", "It is 12.<|im_end|>"]],
    "reason_tools": [
        ["use mul\n</think>\n\n" + QWEN35_CALL + "<|im_end|>", "done\n</think>\n\nIt is 12.<|im_end|>"],
    ],
    "two_calls": [[QWEN35_CALL + "\n" + QWEN35_CALL_2 + "<|im_end|>"]],
    "words_and_call": [["Let me see.\n\n" + QWEN35_CALL + "<|im_end|>"]],
}
GLM_CALL = (
    "\n<tool_call>mul\n<arg_key>a</arg_key>\n<arg_value>4</arg_value>\n<arg_key>b</arg_key>\n<arg_value>3</arg_value>\n"
)
GLM_CALL += "</tool_call>"
NEMO_CALL = '[TOOL_CALLS][{"name": "mul", "arguments": {"a": 4, "b": 3}, "id": "123456789"}'
GLM47_CALL = "<tool_call>mul<arg_key>a</arg_key><arg_value>4</arg_value><arg_key>b</arg_key><arg_value>3</arg_value>"
GLM47_CALL += "</tool_call>"
TEKKEN_CALL = '[TOOL_CALLS]mul[CALL_ID]123456789[ARGS]{"a": 4, "b": 3}'
MATRIX = {
    # It writes neither reasoning_content nor tools and calls; reasoning in the content stays as it is.
    ("smollm3", "smollm3"): {
        "plain": [["4<|im_end|>"]],
        "multi": [["4<|im_end|>", "12<|im_end|>"]],
        "reason": DROPS_REASONING,
        "inline": [["<think>\nadd\n</think>\n\n4<|im_end|>", "<think>\nmul\n</think>\n\n12<|im_end|>"]],
        "tools": NO_CALL,
        "reason_tools": "drops the reasoning: 'use mul'",
        "two_calls": NO_CALL,
        "words_and_call": NO_CALL,
    },
    # It writes the tools, and drops the calls.
    ("granite3_3", "granite3_3"): {
        "plain": [["4<|end_of_text|>"]],
        "multi": [["4<|end_of_text|>", "12<|end_of_text|>"]],
        "reason": DROPS_REASONING,
        "inline": [["<think>\nadd\n</think>\n\n4<|end_of_text|>", "<think>\nmul\n</think>\n\n12<|end_of_text|>"]],
        "tools": NO_CALL,
        "reason_tools": "drops the reasoning: 'use mul'",
        "two_calls": NO_CALL,
        "words_and_call": NO_CALL,
    },
    ("mistral_small", "mistral_small"): {
        "plain": [["4</s>"]],
        "multi": [["4</s>", "12</s>"]],
        "reason": DROPS_REASONING,
        "inline": [["<think>\nadd\n</think>\n\n4</s>", "<think>\nmul\n</think>\n\n12</s>"]],
        "tools": [[TEKKEN_CALL + "</s>", "It is 12.</s>"]],
        "reason_tools": "drops the reasoning: 'use mul'",
        "two_calls": [[TEKKEN_CALL + TEKKEN_CALL.replace("4,", "5,") + "</s>"]],
        "words_and_call": "drops the content: 'Let me see.'",
    },
    # The prompt opens <think>, or closes it at once; earlier reasoning goes when the next question comes.
    ("glm", "glm4_7"): {
        "plain": [["4<|user|>"]],
        "multi": [["4<|user|>", "12<|user|>"]],
        "reason": [["add</think>4<|user|>"], ["mul</think>12<|user|>"]],
        "inline": [["add</think>4<|user|>"], ["mul</think>12<|user|>"]],
        "tools": [[GLM47_CALL + "<|observation|>", "It is 12.<|user|>"]],
        "reason_tools": [["use mul</think>" + GLM47_CALL + "<|observation|>", "done</think>It is 12.<|user|>"]],
        "two_calls": [[GLM47_CALL + GLM47_CALL.replace("4", "5") + "<|observation|>"]],
        "words_and_call": [["Let me see." + GLM47_CALL + "<|observation|>"]],
    },
    ("qwen3_5", "qwen3_5_think"): QWEN35,
    ("qwen3_5", "qwen3_5_nothink"): QWEN35,
    # The system message and the tools stand before the last question alone: every turn has a sequence of its own.
    ("mistral_nemo", "mistral_nemo"): {
        "plain": [["4</s>"]],
        "multi": [["4</s>"], ["12</s>"]],
        "reason": DROPS_REASONING,
        "inline": [["<think>\nadd\n</think>\n\n4</s>"], ["<think>\nmul\n</think>\n\n12</s>"]],
        "tools": [[NEMO_CALL + "]</s>", "It is 12.</s>"]],
        "reason_tools": "drops the reasoning: 'use mul'",
        "two_calls": [[NEMO_CALL + ", " + NEMO_CALL[13:].replace("4", "5", 1) + "]</s>"]],
        "words_and_call": "drops the content: 'Let me see.'",
    },
    ("phi3", "phi3_5"): {
        "plain": [["4<|end|>"]],
        "multi": [["4<|end|>", "12<|end|>"]],
        "reason": DROPS_REASONING,
        "inline": [["<think>\nadd\n</think>\n\n4<|end|>", "<think>\nmul\n</think>\n\n12<|end|>"]],
        "tools": NO_CALL,
        "reason_tools": "drops the reasoning: 'use mul'",
        "two_calls": NO_CALL,
        "words_and_call": NO_CALL,
    },
    # The token that opens the next turn ends an answer.
    ("glm", "glm4moe"): {
        "plain": [["\n4<|user|>"]],
        "multi": [["\n4<|user|>", "\n12<|user|>"]],
        "reason": [["\n<think>add</think>\n4<|user|>"], ["\n<think>mul</think>\n12<|user|>"]],
        "inline": [["\n<think>add</think>\n4<|user|>"], ["\n<think>mul</think>\n12<|user|>"]],
        "tools": [[GLM_CALL + "<|observation|>", "\nIt is 12.<|user|>"]],
        "reason_tools": [
            [
                "\n<think>use mul</think>" + GLM_CALL + "<|observation|>",
                "\n<think>done</think>\nIt is 12.<|user|>",
            ]
        ],
        "two_calls": [[GLM_CALL + GLM_CALL.replace("4", "5", 1) + "<|observation|>"]],
        "words_and_call": [["\nLet me see." + GLM_CALL + "<|observation|>"]],
    },
    ("qwen3", "qwen2_5"): QWEN25,
    ("qwen3", "qwen3"): QWEN3,
    ("qwen3", "qwen3_instruct_2507"): QWEN25,
    ("llama3", "llama3"): LLAMA3,
    ("llama3", "llama3_1"): LLAMA31,
    ("llama3", "llama3_2"): LLAMA31,
    ("gemma3", "gemma3"): {
        "plain": [["4<end_of_turn>"]],
        "multi": [["4<end_of_turn>", "12<end_of_turn>"]],
        "reason": DROPS_REASONING,
        "inline": [["<think>\nadd\n</think>\n\n4<end_of_turn>", "<think>\nmul\n</think>\n\n12<end_of_turn>"]],
        "tools": NO_CALL,
        "reason_tools": "drops the reasoning: 'use mul'",
        "two_calls": NO_CALL,
        "words_and_call": NO_CALL,
    },
    ("gptoss", "gptoss"): {
        "plain": [[OSS_FINAL + "4<|return|>"]],
        "multi": [[OSS_FINAL + "4<|return|>"], [OSS_FINAL + "12<|return|>"]],
        "reason": [
            [OSS_THINK + "add" + OSS_NEXT + OSS_FINAL + "4<|return|>"],
            [OSS_THINK + "mul" + OSS_NEXT + OSS_FINAL + "12<|return|>"],
        ],
        # The template knows reasoning only as a field of its own: a <think> block becomes that field.
        "inline": [
            [OSS_THINK + "add" + OSS_NEXT + OSS_FINAL + "4<|return|>"],
            [OSS_THINK + "mul" + OSS_NEXT + OSS_FINAL + "12<|return|>"],
        ],
        "tools": [[OSS_CALL, OSS_FINAL + "It is 12.<|return|>"]],
        "reason_tools": [
            [
                OSS_THINK + "use mul" + OSS_NEXT + OSS_CALL,
                OSS_THINK + "done" + OSS_NEXT + OSS_FINAL + "It is 12.<|return|>",
            ]
        ],
        "two_calls": NO_CALL,
        "words_and_call": [[OSS_THINK + "Let me see." + OSS_NEXT + OSS_CALL]],
    },
    ("deepseek_v3", "deepseekv3"): {
        "plain": MUST_REASON,
        "multi": MUST_REASON,
        "reason": [["add\n</think>\n\n4" + EOS], ["mul\n</think>\n\n12" + EOS]],
        "inline": [["add\n</think>\n\n4" + EOS], ["mul\n</think>\n\n12" + EOS]],
        "tools": MUST_REASON,
        "reason_tools": NO_TOOLS,
        "two_calls": MUST_REASON,
        "words_and_call": MUST_REASON,
    },
}
CELLS = [(*key, row, expected) for key, rows in MATRIX.items() for row, expected in rows.items()]


@pytest.mark.parametrize("name, template, row, expected", CELLS, ids=[f"{c[1]}-{c[2]}" for c in CELLS])
def test_mask_matrix(name, template, row, expected):
    tokenizer, row = load_real(name, template), with_ids(ROWS[row]) if "mistral" in name else ROWS[row]
    if isinstance(expected, str):
        with pytest.raises(BadRow, match="rows.jsonl:7: messages") as error:
            render_row(row, tokenizer)
        assert expected in str(error.value) and "\n" not in str(error.value)
        return
    rendered = render_row(row, tokenizer)
    assert [trained_texts(tokenizer, r) for r in rendered] == expected
    for sequence in rendered:
        check_served(row, tokenizer, sequence)


def with_ids(row):
    """The row with the ids of calls that Mistral's template demands."""
    messages = [dict(m) for m in row["messages"]]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [call | {"id": "123456789"} for call in message["tool_calls"]]
        if message["role"] == "tool":
            message["tool_call_id"] = "123456789"
    return row | {"messages": messages}


def check_served(row, tokenizer, rendered):
    """Before every run stand exactly the ids that serving feeds, and the run ends where serving stops."""
    turns = [k for k, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    prompts = [
        render_prompt(row["messages"][:k], tokenizer, tools=row.get("tools"), thinking=thinking).tolist()
        for k in turns
        for thinking in (None, False, True)
    ]
    for start, end in trained_runs(rendered):
        assert rendered.tokens[:start].tolist() in prompts
        assert rendered.tokens[end - 1] in tokenizer.stop_ids
        assert not set(rendered.tokens[start : end - 1].tolist()) & tokenizer.stop_ids
    assert rendered.loss_mask[-1]  # nothing stands after the last stop token


WITHOUT_TOOLS = ("llama3", "gemma3", "deepseekv3", "phi3_5", "smollm3")


@pytest.mark.parametrize("name, template", MATRIX)
def test_a_template_without_tools_is_said_to_have_none(name, template):
    tokenizer = load_real(name, template)
    assert tokenizer.template.renders_tools == (template not in WITHOUT_TOOLS)
    for row, expected in MATRIX[(name, template)].items():
        if expected in (NO_TOOLS, NO_CALL):
            with pytest.raises(BadRow) as error:
                render_row(ROWS[row], tokenizer)
            said = "of template.jinja does not render tools: name one that does as data.chat_template=FILE, or remove"
            assert (said in str(error.value)) != tokenizer.template.renders_tools, row


def test_deepseek_trains_a_call_after_its_reasoning():
    row = {"messages": ROWS["reason_tools"]["messages"][:2]}
    tokenizer = load_real("deepseek_v3", "deepseekv3")
    (rendered,) = render_row(row, tokenizer)
    assert trained_texts(tokenizer, rendered) == ["use mul\n</think>\n\n" + DEEPSEEK_CALL]
    check_served(row, tokenizer, rendered)


def test_deepseek_answer_to_a_tool_cannot_hold_reasoning():
    # After a tool's output the template's prompt opens no reasoning, and its rendering drops it.
    with pytest.raises(BadRow, match=r"messages\[3\].*drops the reasoning: 'done'"):
        render_row({"messages": ROWS["reason_tools"]["messages"]}, load_real("deepseek_v3", "deepseekv3"))


def test_gemma_refuses_the_tool_role():
    row = {"messages": [ASK, RESULT, say("4")]}
    with pytest.raises(BadRow, match="refuses this conversation: Conversation roles must alternate.*render tools"):
        render_row(row, load_real("gemma3", "gemma3"))


@pytest.mark.parametrize(
    "name, template, head",
    [
        (
            "llama3",
            "llama3_1",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: ",
        ),
        ("llama3", "llama3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
        ("gemma3", "gemma3", "<bos><start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n4"),
        ("qwen3", "qwen3", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>"),
    ],
)
def test_one_bos_and_the_text_before_the_answer(name, template, head):
    tokenizer = load_real(name, template)
    (rendered,) = render_row(ROWS["plain"], tokenizer)
    assert tokenizer.decode(rendered.tokens).startswith(head)
    assert tokenizer.bos_id is None or (rendered.tokens == tokenizer.bos_id).sum() == 1


@pytest.mark.parametrize("name, template", [("llama3", "llama3_2"), ("gptoss", "gptoss")])
def test_the_date_is_the_one_given(name, template):
    tokenizer = load_real(name, template)
    row = ROWS["plain"]
    texts = [
        tokenizer.decode(render_row(row, tokenizer, template_date=d)[0].tokens) for d in ("2024-07-26", "2031-02-03")
    ]
    dates = ["26 Jul 2024", "03 Feb 2031"] if name == "llama3" else ["2024-07-26", "2031-02-03"]
    assert dates[0] in texts[0] and dates[1] in texts[1]
    assert texts[0].replace(dates[0], dates[1]) == texts[1]


# TRL's variants for training mark spans with {% generation %}; their traps are named in the ids.
TRAPS = {
    "qwen3": ("trains <think> of answers without reasoning, and the newline after <|im_end|>", "qwen3"),
    "qwen2_5": ("trains the newline after assistant, a part of the prompt", "qwen3"),
    "llama3": ("drops tool calls and trains a bare <|eot_id|>", "llama3"),
    "gemma3": ("trains the newline after <end_of_turn>", "gemma3"),
    "gptoss": ("trains <|start|>assistant", "gptoss"),
}


@pytest.mark.parametrize("template", TRAPS, ids=[f"{k}: {v[0]}" for k, v in TRAPS.items()])
def test_generation_markers_do_not_decide(template):
    """Under the marked variants exactly the same tokens are trained as under the plain templates."""
    name = TRAPS[template][1]
    plain, marked = load_real(name, template), load_real(name, template + "_training")
    for row, expected in MATRIX[(name, template)].items():
        if isinstance(expected, str):
            with pytest.raises(BadRow) as error:
                render_row(ROWS[row], marked)
            assert expected in str(error.value)
            continue
        # The variant of qwen3 keeps earlier reasoning, so there the turns share a sequence: compare the turns.
        a = [text for r in render_row(ROWS[row], plain) for text in trained_texts(plain, r)]
        b = [text for r in render_row(ROWS[row], marked) for text in trained_texts(marked, r)]
        assert a == b, row
    # The trap is there: the markers do differ from what we train.
    messages = ROWS["tools" if template == "llama3" else "plain"]["messages"]
    messages = [{k: v or "" for k, v in m.items()} for m in messages]
    if template == "llama3":
        messages = [m if "tool_calls" not in m else {"role": "assistant", "content": ""} for m in messages]
    by_markers = load_bare(name).hf.apply_chat_template(
        messages, chat_template=marked.chat_template, return_assistant_tokens_mask=True, return_dict=True
    )
    ids = np.asarray(by_markers["input_ids"])[np.asarray(by_markers["assistant_masks"], bool)]
    assert marked.decode(ids) not in ("4<|im_end|>", "4<|eot_id|>", "4<end_of_turn>", OSS_FINAL + "4<|return|>")


def test_deepseek_training_variant_trains_the_marker_and_we_do_not():
    tokenizer = load_real("deepseek_v3", "deepseekv3_training")
    rows = render_row(ROWS["reason"], tokenizer)
    assert [trained_texts(tokenizer, r) for r in rows] == MATRIX[("deepseek_v3", "deepseekv3")]["reason"]
    row = {"messages": ROWS["reason_tools"]["messages"][:2]}
    assert trained_texts(tokenizer, render_row(row, tokenizer)[0]) == ["use mul\n</think>\n\n" + DEEPSEEK_CALL]
