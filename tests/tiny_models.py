"""Tiny random models of real families, as Hugging Face folders that `transformers` itself has written.

    from tiny_models import make_tiny_model
    folder = make_tiny_model(tmp_path / "model", "qwen3", num_key_value_heads=1, vocab_size=301)

Every parameter is random, norms and biases too: a mechanism left out shows in the logits. The folder
has a byte-level tokenizer with a ChatML template, unless ``vocab_size`` is below its 260 ids.
"""

import json
import pathlib

import tokenizers
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
TOKENIZER_SIZE = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Odd on purpose: head_dim is not hidden_size / heads, no size is a multiple of another.
ODD_SIZES = {
    "vocab_size": 301,
    "hidden_size": 40,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
}


def make_tiny_model(folder, family="llama", *, seed=0, dtype="float32", max_shard_size="5GB", **odd):
    """Writes a random model of ``family`` to ``folder`` and returns the folder.

    ``odd`` are fields of the family's Hugging Face config, laid over ODD_SIZES.
    """
    folder = pathlib.Path(folder)
    config_class, model_class = FAMILIES[family]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = config_class(**{"tie_word_embeddings": False, **ids, **ODD_SIZES, **odd})
    torch.manual_seed(seed)
    model = model_class(config)
    randomize(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if config.vocab_size >= TOKENIZER_SIZE:
        make_tiny_tokenizer(folder)
    return folder


def randomize(model):
    """Gives every parameter a random value that keeps activations near 1 and logits a few units wide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "norm" in name else 0.0
                parameter.copy_(center + 0.3 * torch.randn_like(parameter))
            else:  # of experts, [E, in, out] or [E, out, in]
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.tie_weights()


def make_tiny_tokenizer(folder):
    """Writes a byte-level tokenizer without merges to ``folder``: 256 bytes, then SPECIAL_TOKENS."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab.update({token: index + len(SPECIAL_TOKENS) for index, token in enumerate(alphabet)})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder
