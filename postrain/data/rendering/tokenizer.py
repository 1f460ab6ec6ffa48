"""Tokenizers: a Hugging Face folder's tokenizer.json, run as written.

The folder's files are read once: the ids that begin and end a sequence, the chat template, and the tokens
at which serving stops. ``transformers`` itself is loaded only by ``.hf``.

New tokens are read from the config, checked, and added to the vocabulary. Their ids are the tokenizer's next free ones:
the format of tokenizer.json has no gaps. Many models have more rows than their tokenizer has ids (Qwen: 151,936 for
151,669), so the first new tokens may take rows that the model has and never uses; some have fewer (Gemma 3 270M:
262,144 for 262,145).
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers

from postrain.config import Config, NewTokensSection, is_hub_name
from postrain.data.files.hub import fetch_small_files
from postrain.data.rendering.template import ChatTemplate, TemplateRefusal
from postrain.errors import UserError, shorten

# Bump when a code change would give other tokens or another mask for the same row and tokenizer.
RENDERING_VERSION = 3
PROBE, PROBE_DATE = "PROBEANSWER", "2024-07-26"
_SHOWN = 8  # wrong new tokens in one message
_TOKEN_LISTS = (  # of the files beside tokenizer.json
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"
)  # fmt: skip
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class NewToken(NamedTuple):
    """A new token, from the config or its file."""

    text: str
    start: str  # its rows start as the mean of the rows of this text's tokens; "": of all old rows
    where: str  # file:line or config key, for messages


class NewTokens(NamedTuple):
    """The new tokens of a vocabulary, at its end: token i has id ``first + i``."""

    first: int
    texts: tuple[str, ...]
    start_ids: tuple[tuple[int, ...], ...]  # old ids whose rows' mean a new row starts as; (): all old ones
    special: bool

    @property
    def stop(self) -> int:
        """One more than the last new id."""
        return self.first + len(self.texts)


class Tokenizer:
    """A tokenizer, its chat template and its stop set.

    Attributes:
      folder: where it was loaded from.
      fast: the `tokenizers.Tokenizer`.
      template: ChatTemplate or None; ``chat_template`` is its Jinja text or "".
      bos_id, eos_id, pad_id: ids or None. ``pad_id`` is the end token's where none is named; nothing depends
        on its value, masks are by position.
      prefix_ids: ids before plain text: the BOS where tokenizer.json adds one, else none.
      stop_ids: the tokens at which serving stops, see ``_stop_ids``.
      control_tokens: text -> id of the tokens that only a template may write, see ``_control_tokens``.
      vocab_size: one more than the largest id.
      new_tokens: those of the vocabulary that the folder's own files do not have, or None.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        fast,
        config: dict,
        generation: dict | None,
        template_source: str,
        origin,
        new_tokens: NewTokens | None = None,
    ):
        self.folder, self.fast, self.new_tokens = folder, fast, new_tokens
        named = {key: value for key, value in config.items() if key.endswith("_token")}
        named = {key: token.get("content") if isinstance(token, dict) else token for key, token in named.items()}
        self.special_tokens = {k: v for k, v in named.items() if isinstance(v, str)}  # not add_bos_token
        ids: list[int | None] = []
        for key in NAMED_TOKENS[:3]:
            text = self.special_tokens.get(key)
            ids.append(None if text is None else fast.token_to_id(text))
            if text is not None and ids[-1] is None:
                raise UserError(
                    f"{folder}/tokenizer_config.json: {key} is {text!r}, which tokenizer.json does not have"
                )
        self.bos_id, self.eos_id, self.pad_id = ids
        self.pad_id = self.eos_id if self.pad_id is None else self.pad_id
        self.chat_template = template_source or ""
        self.template = ChatTemplate(template_source, self.special_tokens, str(origin)) if template_source else None
        self.added = {token.content: i for i, token in fast.get_added_tokens_decoder().items()}
        self.vocab_size = 1 + max(fast.get_vocab(with_added_tokens=True).values())
        self.prefix_ids = self._prefix_ids()
        self.stop_ids = self._stop_ids(generation)
        self.control_tokens = self._control_tokens()
        self.control_pattern = any_of(self.control_tokens)
        self.stop_names = tuple(t for t, i in self.added.items() if i in self.stop_ids)
        self.stop_pattern = any_of(self.stop_names)

    def require_template(self) -> ChatTemplate:
        """The chat template.

        Raises:
          UserError: there is none, or it writes no generation prompt, so that the beginning of an answer is unknown.
        """
        if self.template is None:
            raise UserError(
                f"{self.folder} has no chat template, which conversations need; give a Jinja file as data.chat_template"
            )
        if self._header_would_be_trained:
            raise UserError(
                f"{self.template.origin}: the chat template ignores add_generation_prompt, so that its header "
                "cannot be told from the answer; give one that writes a generation prompt as data.chat_template"
            )
        return self.template

    @functools.cached_property
    def _header_would_be_trained(self) -> bool:
        """Whether the template writes special tokens before an answer that are not in its generation prompt.

        An empty generation prompt alone may be right: "[/INST]" has ended the user's turn already.
        """
        if self.template is None:
            return False
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
        render = functools.partial(self.template.render, template_date=PROBE_DATE)
        try:
            prompt = render(messages[:1], add_generation_prompt=True)
            whole = render(messages, add_generation_prompt=False)
            ignored = prompt == render(messages[:1], add_generation_prompt=False)
        except TemplateRefusal:
            return False
        head = whole[len(prompt) :].partition(PROBE)[0]
        return ignored and whole.startswith(prompt) and self.control_pattern.search(head) is not None

    @functools.cached_property
    def hf(self):
        """The same tokenizer as a `transformers.PreTrainedTokenizerFast`."""
        from transformers import PreTrainedTokenizerFast

        extra = {"chat_template": self.chat_template} if self.template else {}
        named = {k: v for k, v in self.special_tokens.items() if k in NAMED_TOKENS}
        return PreTrainedTokenizerFast(tokenizer_object=self.fast, **named, **extra)

    @functools.cached_property
    def ids(self) -> frozenset[int]:
        """Every id that stands for a token: there may be gaps below ``vocab_size``."""
        return frozenset(self.fast.get_vocab(with_added_tokens=True).values())

    def decode(self, ids) -> str:
        """The text of token ids, special tokens included."""
        return self.fast.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Ids of text as the tokenizer splits it, special tokens recognised, nothing added."""
        return self.fast.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def merges(self) -> list:
        """Of a vocabulary that is built by merging, those in their order; of others []."""
        return json.loads(self.fast.to_str())["model"].get("merges") or []

    def digest_vocabulary(self) -> str:
        """Hash of what decides which text an id stands for, and how text is split: tokens with their ids, and merges.

        The same wherever the folder is, and whatever its template and its named tokens are.
        """
        vocabulary = sorted(self.fast.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps([vocabulary, self.merges]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash of everything that decides a row's tokens and mask: tokenizer, template, named and stop tokens, code."""
        parts = [self.fast.to_str(), self.chat_template, self.special_tokens, sorted(self.stop_ids), self.prefix_ids]
        return hashlib.sha256(json.dumps([*parts, RENDERING_VERSION]).encode()).hexdigest()

    def _prefix_ids(self) -> list[int]:
        """The ids that the post-processor of tokenizer.json puts before text.

        It alone decides, as in `transformers` 5, which reads ``add_bos_token`` and ``add_eos_token`` of
        tokenizer_config.json only where there is no tokenizer.json.
        """
        plain = self.fast.encode("a", add_special_tokens=False).ids
        whole = self.fast.encode("a", add_special_tokens=True).ids
        starts = range(len(whole) - len(plain) + 1)
        return next((whole[:i] for i in starts if plain and whole[i : i + len(plain)] == plain), [])

    def _stop_ids(self, generation: dict | None) -> frozenset[int]:
        """The tokenizer's eos and the ``eos_token_id`` (one or a list) of generation_config.json.

        A folder without generation_config.json (a bare tokenizer) does not say how its turns end. Then the
        template is probed: the last added token, neither whitespace nor a tag, that it writes after the answer of a
        two-message conversation, and after a tool call, ends a turn (``<|eot_id|>``, ``<end_of_turn>``, ``<|call|>``).
        """
        stops = set() if self.eos_id is None else {self.eos_id}
        if generation is not None and generation.get("eos_token_id") is not None:
            ids = generation["eos_token_id"]
            ids = ids if isinstance(ids, list) else [ids]
            if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]:
                raise UserError(
                    f"{self.folder}/generation_config.json: eos_token_id holds {wrong[0]!r}: expected "
                    "a token id, or a list of them"
                )
            return frozenset(stops | set(ids))
        if self.template is None or not self.added:
            return frozenset(stops)
        call = {"type": "function", "id": "call00000", "function": {"name": "probe", "arguments": {"a": PROBE}}}
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        tool = {"type": "function", "function": {"name": "probe", "description": "", "parameters": schema}}
        candidates = any_of(t for t in self.added if t.strip() and not self._is_markup(t))
        for reply, tools in (({"content": PROBE}, None), ({"content": "", "tool_calls": [call]}, [tool])):
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", **reply}]
            try:
                text = self.template.render(messages, tools, template_date=PROBE_DATE, add_generation_prompt=False)
            except TemplateRefusal:
                continue
            _, found, tail = text.rpartition(PROBE)
            if found and (written := candidates.findall(tail)):
                stops.add(self.added[written[-1]])
        return frozenset(stops)

    def _is_markup(self, token: str) -> bool:
        """Whether the vocabulary has both tags, as <think> and </think>: markup inside a turn."""
        if token.startswith("</"):
            return "<" + token[2:] in self.added
        return token.startswith("<") and "</" + token[1:] in self.added

    def _control_tokens(self) -> dict[str, int]:
        """Tokens that text from a row must never become: all that the tokenizer calls special, and the other
        added tokens that the template itself writes (DeepSeek's ``<｜User｜>`` is not called special).

        Left out are whitespace (Gemma has added tokens for runs of newlines) and tags with both ends in the
        vocabulary, such as ``<think>`` or ``<tool_call>`` of Qwen: in a message these are text with structure,
        and engines encode them, and the model emits them, as their one token.
        """
        literals = self.template.literals if self.template else ""
        special = {i for i, token in self.fast.get_added_tokens_decoder().items() if token.special}
        return {
            text: i
            for text, i in self.added.items()
            if text.strip() and (i in special or i in self.stop_ids or (text in literals and not self._is_markup(text)))
        }


def any_of(tokens) -> re.Pattern:
    """A pattern for any of the strings, the longest first, as in the tokenizer; without strings it never matches."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def compare_vocabularies(one: Tokenizer, other: Tokenizer) -> str:
    """The first thing in which two tokenizers differ so that ids of one are not ids of the other, in words; else ""."""
    found, expected = (
        {i: token for token, i in tokenizer.fast.get_vocab(with_added_tokens=True).items()}
        for tokenizer in (one, other)
    )
    name = lambda token: "no token" if token is None else repr(token)
    for i in sorted(found.keys() | expected.keys()):
        if found.get(i) != expected.get(i):
            return f"id {i} is {name(found.get(i))} in {one.folder} and {name(expected.get(i))} in {other.folder}"
    if one.merges != other.merges:
        return f"the tokens of {one.folder} and {other.folder} are the same, but are merged in another order"
    return ""


def load_run_tokenizer(config: Config, folder) -> Tokenizer:
    """The tokenizer of a run on the model in ``folder``: with the chat template and the new tokens of ``config``.

    Raises UserError as load_tokenizer does.
    """
    return load_tokenizer(config.model.tokenizer or folder, config.data.chat_template, config.model.new_tokens)


def load_tokenizer(folder, chat_template: str = "", new_tokens: NewTokensSection | None = None) -> Tokenizer:
    """Loads tokenizer.json, tokenizer_config.json, generation_config.json and the chat template of a folder.

    Args:
      folder: a Hugging Face model or tokenizer folder, or the name of one on the Hugging Face hub.
      chat_template: path of a Jinja file to use in place of the folder's own template.
      new_tokens: tokens to add to those of the folder.

    Raises:
      UserError: no folder, a repository that cannot be fetched, no tokenizer.json, a file that cannot be read, an
        invalid template, new tokens that are empty, given twice, or there already.
    """
    folder = fetch_small_files(str(folder)) if is_hub_name(str(folder)) else pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist; give a Hugging Face folder with a tokenizer.json")
    path = folder / "tokenizer.json"
    if not path.is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has neither config.json nor tokenizer.json: give the folder of a model")
        raise UserError(
            f"{folder} has no tokenizer.json; save the tokenizer there with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or name another folder as model.tokenizer"
        )
    try:
        fast = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the Rust library raises bare Exception for every malformed file
        raise UserError(f"{path}: cannot be read as a tokenizer: {e}") from None
    fast.no_padding()
    fast.no_truncation()
    config = _read_json(folder / "tokenizer_config.json") or {}
    named = _read_json(folder / "special_tokens_map.json") or {}
    config = {**{k: named[k] for k in NAMED_TOKENS if k in named}, **{k: v for k, v in config.items() if v is not None}}
    _check_named_tokens(folder, fast, config, named)
    source, origin = _template_source(folder, config, chat_template)
    added = read_new_tokens(new_tokens) if new_tokens is not None else ()
    grown = add_new_tokens(fast, added, new_tokens.special) if new_tokens is not None and added else None
    return Tokenizer(folder, fast, config, _read_json(folder / "generation_config.json"), source, origin, grown)


def _check_named_tokens(folder: pathlib.Path, fast: tokenizers.Tokenizer, config: dict, special: dict) -> None:
    """Raises UserError for a token that the files beside tokenizer.json name, and that it does not have.

    `transformers`, and servers that use it, add such a token, so that text is split in another way than here.
    """
    named: list[tuple[str, str, Any]] = []  # file, what it says of the token, token
    for file, facts in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        for key, value in facts.items():
            if key in _TOKEN_LISTS:
                tokens = list(value.values()) if isinstance(value, dict) else value
                named += [(file, f"{key} names", token) for token in tokens] if isinstance(tokens, list) else []
            elif key.endswith("_token"):
                named.append((file, f"{key} is", value))
    named += [("added_tokens.json", "it names", text) for text in _read_json(folder / "added_tokens.json") or {}]
    for file, says, token in named:
        text = token.get("content") if isinstance(token, dict) else token
        if text and isinstance(text, str) and fast.token_to_id(text) is None:
            raise UserError(
                f"{folder}/{file}: {says} {text!r}, which tokenizer.json does not have: transformers would add it, "
                "and split text in another way than training: save the tokenizer there again with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )


def _template_source(folder: pathlib.Path, config: dict, override: str) -> tuple[str, pathlib.Path]:
    """The override, else chat_template.jinja, else tokenizer_config.json's (of several: the one named default)."""
    # Without a byte order mark, which some editors write: it would begin every prompt.
    if override:
        return _read_text(pathlib.Path(override), "data.chat_template", "utf-8-sig"), pathlib.Path(override)
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path, "chat template", "utf-8-sig"), path
    path = folder / "tokenizer_config.json"
    source = config.get("chat_template") or ""
    if isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
        source = {str(entry.get("name")): entry.get("template") for entry in source}
    if isinstance(source, dict):
        source = source.get("default", "")
    if not isinstance(source, str):
        raise UserError(f"{path}: expected chat_template to be a template, or a list of {{'name', 'template'}}")
    return source, path


def _read_text(path: pathlib.Path, what: str, encoding: str = "utf-8") -> str:
    try:
        return path.read_text(encoding=encoding)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{what}: {path} cannot be read: {e}") from None


def _read_json(path: pathlib.Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(_read_text(path, "tokenizer"))
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell halves of surrogate pairs, which no text holds
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


# New tokens


def read_new_tokens(section: NewTokensSection) -> tuple[NewToken, ...]:
    """The tokens of a config, in order, () for none. Raises UserError naming those that are empty or repeated."""
    if section.file:
        path = pathlib.Path(section.file)
        try:
            text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.new_tokens.file: {path} cannot be read: {error}") from None
        # Not `splitlines`, which also cuts at Unicode's other separators.
        lines = text.removesuffix("\n").split("\n") if text else []
        places = [(line.removesuffix("\r"), f"{path}:{number}") for number, line in enumerate(lines, 1)]
        if not places:
            raise UserError(f"model.new_tokens.file: {path} is empty: expected one token on each line")
    else:
        places = [(token, f"model.new_tokens.tokens[{i}]") for i, token in enumerate(section.tokens)]
    tokens, wrong, seen = [], [], {}
    for line, where in places:
        text, tab, start = line.partition("\t")
        tokens.append(NewToken(text, start, where))
        if not text.strip():
            wrong.append(f"{where} is empty")
        elif text != text.strip():
            wrong.append(f"{where}: {text!r} starts or ends with a space: it would rarely be found in text")
        elif text in seen:
            wrong.append(f"{where}: {text!r} comes twice, first in {seen[text]}")
        elif tab and not start.strip():
            wrong.append(f"{where}: {text!r} has a tab and no text after it")
        seen.setdefault(text, where)
    _check_no_errors(wrong)
    return tuple(tokens)


def add_new_tokens(fast: tokenizers.Tokenizer, tokens: Sequence[NewToken], special: bool) -> NewTokens:
    """Adds ``tokens`` to ``fast``. Raises UserError naming those that it has, or cannot use as one token."""
    unknown = getattr(fast.model, "unk_token", None)
    unknown_id = None if unknown is None else fast.token_to_id(unknown)
    wrong, start_ids = [], []
    for token in tokens:
        ids = fast.encode(token.text, add_special_tokens=False).ids
        found = ids[0] if len(ids) == 1 and ids[0] != unknown_id else fast.token_to_id(token.text)
        if found is not None:
            wrong.append(f"{token.where}: {token.text!r} is one token of the tokenizer already, id {found}")
        start_ids.append(tuple(fast.encode(token.start, add_special_tokens=False).ids if token.start else ()))
        if token.start and not start_ids[-1]:
            wrong.append(f"{token.where}: the text {token.start!r} has no tokens")
    _check_no_errors(wrong)
    first = 1 + max(fast.get_vocab(with_added_tokens=True).values())
    options = {"normalized": False, "special": special}
    fast.add_tokens([tokenizers.AddedToken(token.text, **options) for token in tokens])
    for i, token in enumerate(tokens):
        ids = fast.encode(token.text, add_special_tokens=False).ids
        if ids != [first + i]:
            wrong.append(f"{token.where}: {token.text!r} comes out as ids {ids}, expected {first + i} alone")
        # Decoders of byte-level vocabularies take an added token's characters for bytes, where they can be some.
        back = fast.decode([first + i], skip_special_tokens=False)
        if back.strip() != token.text.strip():
            wrong.append(f"{token.where}: {token.text!r} is decoded as {back!r}: write it in ASCII")
    _check_no_errors(wrong)
    return NewTokens(first, tuple(token.text for token in tokens), tuple(start_ids), special)


def _check_no_errors(wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"new tokens: {shorten(wrong, _SHOWN, '; ')}: leave these out or write them differently")
