"""Trained turns: for each, the prompt that the model is given and the text that it must produce.

For the assistant message k the template is run twice, as serving would: ``prompt`` is the rendering of the
messages before k with the generation prompt, ``whole`` that of the messages up to k. The model must produce
what ``whole`` has after ``prompt``, up to and including the first stop token: that is the turn's
``continuation``, and nothing else is ever trained (no header, no newline after the stop token).

Turns share one training sequence where the template lets them: turn j continues the sequence of turn k if its
prompt starts with k's prompt and continuation. Templates that render earlier turns in another way than the
last (Qwen3 drops their reasoning, gpt-oss ends them with another token) break that, and such a conversation
becomes one sequence per turn, each exactly as in serving.

Two kinds of reasoning templates need more than that:

* a template with a switch (``enable_thinking``) has two generation prompts. A turn without reasoning is
  trained after the one that asks for none (``<think>\\n\\n</think>\\n\\n`` is then a part of the prompt, not
  something to learn), a turn with reasoning after the default one.
* a template whose generation prompt opens the reasoning (``...<think>\\n``) while its rendering of an answer
  leaves reasoning out (DeepSeek): what the model must produce is the reasoning, the closing tag and the
  answer, which is put together here. A message without reasoning cannot be trained rightly, and its row is
  refused.

Everything that a trained message holds (reasoning, content, each call's name and arguments) must be found in
its continuation, and every other message and tool in its prompt. A row of which the template silently drops
a part is refused, and the message names the part.

Strings of a row that spell a token which only templates may write (``<|im_end|>`` in a user's message) are
wrapped in two noncharacters while the template runs, so that afterwards they can be told from the template's
own and encoded as ordinary text (see encode.py).
"""

import contextlib
import dataclasses
import re

from postrain.data.bad_row import BadRow
from postrain.data.messages import Conversation
from postrain.data.rendering.row_checks import (
    Refusal,
    check_nothing_dropped,
    check_reasoning,
    check_reasoning_once,
    contains,
    reasoning_of,
    shows_answer,
)
from postrain.data.rendering.template import TemplateRefusal
from postrain.data.rendering.tokenizer import Tokenizer

MARK_OPEN, MARK_CLOSE, TAG = "\ufdd0", "\ufdd1", "\ufdd2"  # bad_row.py refuses rows that hold them
DEFAULT_SYSTEM = "data.default_system (--system in `postrain generate`)"
OPENED_REASONING = re.compile(r"<(\w+)>\s*$")


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One training sequence as text, with marks.

    Attributes:
      spans: character ranges that the model must produce.
      template_switches: for each span how its prompt differs from the template's default, as "enable_thinking=False",
        else ""; empty where none does.
      weights: of each span, how much its tokens count beside those of others; empty where all are 1.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    template_switches: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


def plan_sequences(conversation: Conversation, tokenizer: Tokenizer, template_date: str, default_system: str):
    """The training sequences of a conversation, in order, each with at least one trained span.

    Raises:
      BadRow: a turn cannot be rendered faithfully; the reason says which and why.
    """
    ref = conversation.ref
    renderer = Renderer(tokenizer, conversation.messages, conversation.tools, template_date, default_system, ref)
    sequences: list[Sequence] = []
    reached = ""  # prompt and continuation of the previous turn
    for k, message in enumerate(renderer.messages):
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        try:
            check_reasoning(conversation.messages[k - renderer.added], renderer.template)
            prompt, continuation, switch = renderer.turn(k)
        except Refusal as e:
            e = renderer.explain_first_turn(k) or e
            advice = e.advice or renderer.advise_on_tools()
            raise BadRow(ref, f"messages[{k - renderer.added}] (assistant): {e}", advice) from None
        span = (len(prompt), len(prompt) + len(continuation))
        before = Sequence("", ())
        if sequences and prompt.startswith(reached):
            before = sequences.pop()
        sequences.append(
            Sequence(
                prompt + continuation,
                (*before.spans, span),
                (*before.template_switches, switch),
                (*before.weights, message.get("weight", 1.0)),
            )
        )
        reached = prompt + continuation
    return sequences


class Renderer:
    """Renders prefixes of one conversation, marked; ``added`` counts messages put in front (default system)."""

    def __init__(self, tokenizer, messages, tools, template_date, default_system, ref):
        self.tokenizer, self.ref, self.date = tokenizer, ref, template_date
        self.template = tokenizer.require_template()
        self._tools_shown = False
        messages = list(messages)
        self.added = int(bool(default_system) and messages[0]["role"] not in ("system", "developer"))
        if self.added:
            messages.insert(0, {"role": "system", "content": default_system})
        messages = [self.template.lift_reasoning(m) for m in messages]
        self.plain = (messages, tools)
        self.messages, self.tools = self.plain
        self.marked = _matches(self.plain, tokenizer.control_pattern)
        if self.marked:
            self.messages, self.tools = mark(self.plain, tokenizer.control_pattern)

    def render(self, stop: int, add_generation_prompt: bool, variables: dict) -> str:
        """The first ``stop`` messages as text, with marks.

        Raises:
          Refusal: the template raised, or reads special tokens inside the row's text.
        """
        options = {"template_date": self.date, "add_generation_prompt": add_generation_prompt, **variables}
        try:
            text = self.template.render(self.messages[:stop], self.tools, **options)
            if self.marked:
                messages, tools = self.plain
                if unmark(text)[0] != self.template.render(messages[:stop], tools, **options):
                    raise Refusal("the chat template treats special tokens inside the row's text in its own way")
        except TemplateRefusal as e:
            raise Refusal(f"the chat template refuses this conversation: {e}") from None
        return text

    def turn(self, k: int) -> tuple[str, str, str]:
        """Prompt and continuation of assistant message k, with marks, and the switches of its prompt (see Sequence).

        Raises:
          Refusal: no generation prompt of the template leads to a faithful continuation.
        """
        refusals: list[Refusal] = []
        # Variables to try, best first: a turn with reasoning follows the default prompt, one without it a prompt that
        # asks for none.
        switches = self.template.switches
        if reasoning_of(self.messages[k]):
            choices = [{}, *({name: True} for name in switches)]
        else:
            choices = [*({name: False} for name in switches), {}]
        for variables in choices:
            try:
                prompt, continuation = self._turn(k, variables)
            except Refusal as e:
                # The default prompt's reason is the one to show; it is among those tried.
                refusals.insert(len(refusals) if variables else 0, e)
                continue
            changed = variables and self.template.changes_prompt(**variables)
            named = ", ".join(f"{name}={value}" for name, value in variables.items()) if changed else ""
            return prompt, continuation, named
        raise refusals[0]

    def _turn(self, k: int, variables: dict) -> tuple[str, str]:
        message = self.messages[k]
        prompt = self.render(k, True, variables)
        whole = self.render(k + 1, False, variables)
        if whole.startswith(prompt):
            tail = whole[len(prompt) :]
        else:
            begun, written = self._since_last_message(k, variables, prompt, whole)
            same = written.startswith(begun)
            tail = written[len(begun) :] if same else _put_reasoning_back(begun, written, reasoning_of(message))
        end = self._find_stop(tail)
        if end is None:  # some templates end a turn with the token that opens the next one (GLM's <|user|>)
            tail += self._next_opening(k, variables)
            end = self._find_stop(tail)
        if end is None:
            names = ", ".join(sorted(self.tokenizer.stop_names)) or "none"
            raise Refusal(
                f"the chat template writes no stop token after the answer (stop tokens: {names}; it goes on "
                f"{unmark(tail)[0][-24:]!r})",
                "put the token that ends a turn into eos_token_id of generation_config.json",
            )
        continuation = tail[:end]
        opened = OPENED_REASONING.search(prompt[-64:])
        if opened and continuation.lstrip().startswith(f"</{opened[1]}>"):  # closed at once: asked to, and does not
            raise _must_reason(opened[1])
        check_nothing_dropped(message, continuation)
        check_reasoning_once(message, continuation)
        self.check_prompt(prompt, k, variables)
        return prompt, continuation

    def _find_stop(self, text: str) -> int | None:
        """The end of the first stop token that the template wrote, not one that the row spells (it is in a mark).

        Without one the model would never stop.
        """
        stops = self.tokenizer.stop_pattern.finditer(text)
        return next((m.end() for m in stops if m.start() == 0 or text[m.start() - 1] != MARK_OPEN), None)

    def _next_opening(self, k: int, variables: dict) -> str:
        """What the template writes between answer k and the content of the message after it."""
        # Between two tags, since the text before the answer may change as soon as a message follows.
        answer, follower = {"role": "assistant", "content": TAG}, {"role": "user", "content": TAG}
        if calls := self.messages[k].get("tool_calls"):
            answer["tool_calls"], last = calls, calls[-1]
            follower |= {"role": "tool", "name": last["function"]["name"], "tool_call_id": last.get("id", "")}
        options = {"template_date": self.date, "add_generation_prompt": False, **variables}
        messages = [*self.messages[:k], answer]
        try:
            end = self.template.render(messages, self.tools, **options).partition(TAG)[2]
            text, found, _ = self.template.render([*messages, follower], self.tools, **options).rpartition(TAG)
        except TemplateRefusal:
            return ""
        between = text.partition(TAG)[2]
        return between[len(end) :] if found and between.startswith(end) else ""

    def _since_last_message(self, k: int, variables: dict, prompt: str, whole: str) -> tuple[str, str]:
        """The ends of prompt and whole after the content of message k - 1.

        A template may render earlier turns in another way once there is an answer (gpt-oss drops the reasoning before
        a call): the two texts then differ early, and yet write the turn itself alike. The place is found by a tag at
        the end of that content. Where the tag is lost or changes more than itself, the whole texts are returned.
        """
        if k == 0:
            return prompt, whole
        before, messages, tools = self.messages[k - 1], self.messages, self.tools
        stripped = before["content"].rstrip()
        tagged = {**before, "content": stripped + TAG + before["content"][len(stripped) :]}
        options = {"template_date": self.date, **variables}
        texts = []
        for stop, expected in ((k, prompt), (k + 1, whole)):
            shown = [*messages[: k - 1], tagged, *messages[k:stop]]
            try:
                text = self.template.render(shown, tools, add_generation_prompt=stop == k, **options)
            except TemplateRefusal:
                return prompt, whole
            head, found, tail = text.partition(TAG)
            if not found or head + tail != expected:
                return prompt, whole
            texts.append(tail)
        return texts[0], texts[1]

    def check_prompt(self, prompt: str, k: int, variables: dict) -> None:
        """Checks that the prompt holds the tools and every message that is not the assistant's.

        An answer that is context only may be missing from later prompts, if the template's own rule leaves it out
        there (gpt-oss: words before a call), but not from the rendering that ends with it. Trained ones are checked in
        their own turn.

        Raises:
          Refusal: the template dropped one.
        """
        for i, message in enumerate(self.messages[:k]):
            content, is_answer = message["content"], message["role"] == "assistant"
            if is_answer and message.get("train") is not False:
                continue
            shown = shows_answer(prompt, content) if is_answer else contains(prompt, content)
            if not shown and not (is_answer and shows_answer(self.render(i + 1, False, variables), content)):
                which = f"messages[{i - self.added}] ({message['role']})" if i >= self.added else DEFAULT_SYSTEM
                raise Refusal(f"the chat template drops the content of {which}")
        if self.tools and not self._tools_shown:
            options = {"template_date": self.date, "add_generation_prompt": True, **variables}
            with contextlib.suppress(TemplateRefusal):  # some templates cannot do without tools
                if prompt == self.template.render(self.messages[:k], None, **options):
                    raise Refusal("the chat template drops the tools")
            missing = [t["function"]["name"] for t in self.tools if not contains(prompt, t["function"]["name"])]
            if missing:
                raise Refusal(f"the chat template drops the tool {missing[0]!r:.40}")
            self._tools_shown = True  # once is enough: every prompt of a conversation shows them alike

    def explain_first_turn(self, k: int) -> Refusal | None:
        """Why assistant message k was refused, if it would not be after a user's message, and none comes before it."""
        messages, (plain, tools) = self.messages, self.plain
        first = next((i for i, m in enumerate(messages) if m["role"] in ("user", "tool")), len(messages))
        begins = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        if begins > first:
            return None
        # The same conversation after a user's message, and with this first answer as context only.
        asked = [*plain[:begins], {"role": "user", "content": "x"}, *plain[begins : k + 1]]
        try:
            Renderer(self.tokenizer, asked, tools, self.date, "", self.ref).turn(k + 1)
        except Refusal:
            return None
        advice = "put a user message before it"
        if k < first < len(messages):
            with contextlib.suppress(Refusal):
                self.render(first + 1, True, {})
                advice = f'give it "train": false, or {advice}'
        which = "" if k == begins else f"the conversation begins with messages[{begins - self.added}] (assistant), and "
        return Refusal(f"{which}the chat template cannot render an answer without a user message before it", advice)

    def advise_on_tools(self) -> str:
        """Advice for a refusal where the conversation has tools and the template does not render them; else empty."""
        has_tools = self.tools or any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages)
        if not has_tools or self.template.renders_tools:
            return ""
        return (
            f"the chat template of {self.template.origin} does not render tools: name one that does as "
            "data.chat_template=FILE, or remove tools, tool_calls and tool messages from the rows"
        )


def _must_reason(tag: str) -> Refusal:
    return Refusal(
        f"the generation prompt of the chat template opens <{tag}>, so the model must reason first, and the message "
        "has no reasoning_content",
        "give it, or use a template without that (data.chat_template=FILE)",
    )


def _put_reasoning_back(prompt: str, whole: str, reasoning: str) -> str:
    """The text to produce after a prompt that opens the reasoning, where ``whole`` leaves the reasoning out."""
    opened = OPENED_REASONING.search(prompt)
    base = prompt[: opened.start()] if opened else ""
    if opened is None or not whole.startswith(base):
        pairs = enumerate(zip(prompt, whole, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
        raise Refusal(
            "the chat template renders the answer differently from how its generation prompt begins it: the prompt "
            f"goes on {prompt[common : common + 24]!r}, the rendering {whole[common : common + 24]!r}"
        )
    if not reasoning:
        raise _must_reason(opened[1])
    return f"{reasoning}\n</{opened[1]}>\n\n" + whole[len(base) :].lstrip("\n")


def unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the character ranges in it that stood between marks."""
    if MARK_OPEN not in text:
        return text, []
    out, ranges, length = [], [], 0
    for i, piece in enumerate(re.split(f"{MARK_OPEN}(.*?){MARK_CLOSE}", text, flags=re.DOTALL)):
        if i % 2:
            ranges.append((length, length + len(piece)))
        out.append(piece)
        length += len(piece)
    return "".join(out), ranges


def mark(value, pattern: re.Pattern):
    """The value with every match of ``pattern`` in its strings, keys included, between marks."""
    if isinstance(value, str):
        return pattern.sub(f"{MARK_OPEN}\\g<0>{MARK_CLOSE}", value)
    if isinstance(value, dict):
        return {mark(k, pattern): mark(v, pattern) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark(v, pattern) for v in value]
    return value


def _matches(value, pattern: re.Pattern) -> bool:
    """Whether the pattern is found in a string, or in the keys and values, however deep, of lists and objects."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(_matches(k, pattern) or _matches(v, pattern) for k, v in value.items())
    return isinstance(value, (list, tuple)) and any(_matches(v, pattern) for v in value)
