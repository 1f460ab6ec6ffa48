"""A `tokenizers` tokenizer from the vocabulary of a GGUF file.

A GGUF has the vocabulary, the merges or scores, and the *name* of the rule that cuts text into words; the
rule itself is written here, as the publishers' tokenizer.json files have it. Two kinds: byte-level BPE
("gpt2") and SentencePiece BPE ("llama"; Llama 2 and Gemma).
"""

import dataclasses
import json
import pathlib

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from postrain.errors import UserError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's spelling of a space
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one


@dataclasses.dataclass(frozen=True)
class ByteLevelRule:
    """How a byte-level BPE cuts text before merging. ``split`` None: GPT-2's pattern."""

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False  # Unicode normal form C first
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # when the file does not say


BYTE_LEVEL_RULES = {
    "default": ByteLevelRule(),
    "gpt-2": ByteLevelRule(),
    "smollm": ByteLevelRule(single_digits=True),
    "llama-bpe": ByteLevelRule(split=LLAMA3_SPLIT, ignore_merges=True, add_bos=True),
    "llama-v3": ByteLevelRule(split=LLAMA3_SPLIT, ignore_merges=True, add_bos=True),
    "llama3": ByteLevelRule(split=LLAMA3_SPLIT, ignore_merges=True, add_bos=True),
    "qwen2": ByteLevelRule(split=QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": ByteLevelRule(split=QWEN2_SPLIT, add_bos=True),
}


@dataclasses.dataclass(frozen=True)
class SentencePieceRule:
    """How an architecture's SentencePiece BPE works, where the file does not say."""

    plain_spaces: bool = False  # the file spells tokens of several spaces with plain spaces
    merge_by_id: bool = False  # merges follow the order of the vocabulary, not the scores
    space_prefix: bool = True  # a space before the text, when the file does not say


def build_tokenizer(fields: dict, sentencepiece: SentencePieceRule, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file whose metadata are ``fields`` (``tokenizer.ggml.*`` and others).

    ``sentencepiece``: how to read the vocabulary where it is of that kind.

    Raises UserError, naming the field, when the kind or the pre-tokenizer is not known here.
    """
    kind = fields.get("tokenizer.ggml.model")
    if not fields.get("tokenizer.ggml.tokens"):
        raise UserError(f"{where}: has no tokenizer.ggml.tokens: the file carries no tokenizer, use another one")
    if kind == "gpt2":
        name = fields.get("tokenizer.ggml.pre", "default")
        if name not in BYTE_LEVEL_RULES:
            raise UserError(f"{where}: tokenizer.ggml.pre is {name!r}, supported are {', '.join(BYTE_LEVEL_RULES)}")
        rule = BYTE_LEVEL_RULES[name]
        tokenizer, add_bos = _byte_level(fields, rule, where), rule.add_bos
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(fields, sentencepiece, where), True
    else:
        raise UserError(f"{where}: tokenizer.ggml.model is {kind!r}, supported are 'gpt2' and 'llama'")

    # Tokens that text never splits: control tokens as special ones, user-defined ones as plain ones.
    types = list(zip(fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type") or (), strict=False))
    vocab, alphabet = tokenizer.get_vocab(), set(pre_tokenizers.ByteLevel.alphabet())
    # In a byte-level vocabulary a control token with a character outside the byte alphabet is a mislabelled word.
    fits = lambda token: kind != "gpt2" or set(token) <= alphabet
    control = [token for token, type_ in types if type_ == CONTROL and fits(token)]
    plain = [token for token, type_ in types if type_ == USER_DEFINED and token in vocab]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    tokenizer.post_processor = _post_processor(fields, add_bos)
    return tokenizer


def write_tokenizer(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, fields: dict, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json, the latter with the chat template where the file has one."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    settings |= {"clean_up_tokenization_spaces": False}
    tokens = fields["tokenizer.ggml.tokens"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            settings[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _byte_level(fields: dict, rule: ByteLevelRule, where: str) -> tokenizers.Tokenizer:
    if "tokenizer.ggml.merges" not in fields:
        raise UserError(f"{where}: has no tokenizer.ggml.merges, which a byte-level BPE needs")
    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = _read_merges(fields, vocab, where)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if rule.single_digits else []
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_merges(fields: dict, vocab: dict[str, int], where: str) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    for left, right in merges:
        if not (left in vocab and right in vocab and left + right in vocab):
            found = f"tokenizer.ggml.merges has {left!r} + {right!r}, which tokenizer.ggml.tokens lacks"
            raise UserError(f"{where}: {found}: download it again")
    return merges


def _sentencepiece(fields: dict, rule: SentencePieceRule, where: str) -> tokenizers.Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    if rule.plain_spaces:
        tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in fields:
        merges = _read_merges(fields, vocab, where)
    elif rule.merge_by_id or fields.get("tokenizer.ggml.scores"):
        ranks = range(0, -len(tokens), -1) if rule.merge_by_id else fields["tokenizer.ggml.scores"]
        merges = recover_merges(vocab, ranks)
    else:
        raise UserError(f"{where}: has neither tokenizer.ggml.merges nor tokenizer.ggml.scores: use another file")
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", rule.space_prefix):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence(plain)
    return tokenizer


def recover_merges(vocab: dict[str, int], ranks) -> list[tuple[str, str]]:
    """Merges from a vocabulary alone: every way to cut a token in two known ones, best ``ranks[token id]`` first.

    SentencePiece's BPE joins, at each step, the pair of neighbours whose union ranks best; a list of merges
    in that order does the same.
    """
    found = []
    for token, index in vocab.items():
        rank = ranks[index]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-rank, -cut, cut - len(token), left, right))
    found.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in found]


def _post_processor(fields: dict, add_bos: bool):
    tokens = fields["tokenizer.ggml.tokens"]
    bos, eos = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    before = bos if fields.get("tokenizer.ggml.add_bos_token", add_bos) else None
    after = eos if fields.get("tokenizer.ggml.add_eos_token", False) else None
    around = [index for index in (before, after) if index is not None]
    if not around:
        return None
    first, last = ([] if index is None else [tokens[index]] for index in (before, after))
    return processors.TemplateProcessing(
        single=[*first, "$A:0", *last],
        pair=[*first, "$A:0", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(tokens[index], index) for index in around],
    )
