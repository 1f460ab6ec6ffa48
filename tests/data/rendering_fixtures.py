"""Real tokenizers under real templates, and how a rendered row is read back."""

import functools
import json

import tokenizers
from real_tokenizers import get_template_path, get_tokenizer_folder
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from postrain.data.bad_row import RowRef
from postrain.data.messages import parse_row
from postrain.data.rendering.render import Rendered, render
from postrain.data.rendering.tokenizer import Tokenizer, load_tokenizer

REF = RowRef("train", "rows.jsonl", 7)

# Written after SmolLM2-Instruct's: ChatML with a default system message.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def all_templates() -> list[str]:
    """The names of TRL's templates."""
    return sorted(path.stem for path in get_template_path("qwen3").parent.glob("*.jinja"))


@functools.cache
def load_bare(name: str) -> Tokenizer:
    """A real tokenizer without a template. "glm" is Llama 3's with the tokens of GLM 4.5, which no package has."""
    if name != "glm":
        return load_tokenizer(get_tokenizer_folder(name))
    folder = get_tokenizer_folder("llama3")
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in GLM_SPECIAL])
    fast.add_tokens([AddedToken(t, normalized=False) for t in GLM_PLAIN])
    return Tokenizer(folder, fast, {"eos_token": "<|endoftext|>"}, None, "", "none")


@functools.cache
def load_real(name: str, template: str) -> Tokenizer:
    """The real tokenizer ``name`` with TRL's template, or with a template given as text."""
    bare = load_bare(name)
    config = json.loads((bare.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = template if "{" in template else get_template_path(template).read_text(encoding="utf-8")
    stops = [bare.fast.token_to_id(token) for token in PUBLISHED_STOPS.get(name, ())]
    generation = {"eos_token_id": stops} if stops else None
    return Tokenizer(bare.folder, bare.fast, config, generation, source, "template.jinja")


# The eos_token_id of generation_config.json, where it is not what the template shows.
PUBLISHED_STOPS = {
    "phi3": ["<|endoftext|>", "<|assistant|>", "<|end|>"],
    "glm": ["<|endoftext|>", "<|user|>", "<|observation|>"],
}
GLM_SPECIAL = "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>".split()
GLM_PLAIN = "<think> </think> <tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>".split()


def render_row(row: dict, tokenizer: Tokenizer, **options) -> list[Rendered]:
    return render(parse_row(row, "sft", REF), tokenizer, **options)


def trained_texts(tokenizer: Tokenizer, rendered: Rendered) -> list[str]:
    """The text of every run of trained tokens."""
    return [tokenizer.decode(rendered.tokens[start:end]) for start, end in trained_runs(rendered)]


def trained_runs(rendered: Rendered) -> list[tuple[int, int]]:
    runs, begin = [], None
    for t, trained in enumerate([*rendered.loss_mask.tolist(), False]):
        if trained and begin is None:
            begin = t
        elif not trained and begin is not None:
            runs.append((begin, t))
            begin = None
    return runs


def save_small_tokenizer(folder, kind="byte_level", template=CHATML, **config):
    """A small tokenizer of another make than the real ones at hand, trained on a few words, as a folder.

    kind: "byte_level" (offsets without leading spaces, as GPT-2's), "metaspace" (Llama 2's: a space is put before
    text), "swallow" (its control tokens take the whitespace after them, as Phi-3's).
    """
    fast = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "metaspace":
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        fast.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({chr(c) for c in range(32, 127)} | {"\n", "▁"})
    else:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        fast.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=control, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    fast.train_from_iterator(["user assistant system answer: the quick brown fox  \n\n says hello there"] * 3, trainer)
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=kind == "swallow") for t in control])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
