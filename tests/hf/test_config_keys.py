"""config.json: published ones are read, and every key of `transformers` is used, harmless or refused by its name."""

import ast
import dataclasses
import functools
import inspect
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import transformers
from hf_compare import folder_logits, random_ids, relative_difference, torch_logits
from published_configs import PUBLISHED, in_transformers, write_published_config
from test_hf_parity import GPT_OSS, QWEN_MOE
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.config import KEY_ALIASES, parse_config, read_config, read_model_json
from postrain.hf.families import FAMILIES, HARMLESS_KEYS, NEUTRAL_VALUES, REPEATED_KEYS, USED_KEYS
from postrain.models.transformer import compute_inverse_frequencies

LLAMA = PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"]
ONE_OF_EACH = {
    architecture: next(raw for raw in PUBLISHED.values() if raw["architectures"] == [architecture])
    for architecture in FAMILIES
}


def refusal(raw):
    """The message of the UserError that a config.json must raise: one line."""
    with pytest.raises(UserError) as caught:
        parse_config(raw, "config.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- published files ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_means_what_transformers_reads(name, tmp_path, capsys):
    """Also in the words of transformers 5, and without a remark about keys that nobody reads."""
    ours = read_config(write_published_config(tmp_path, name))
    theirs = in_transformers(name)
    theirs.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == ours
    assert capsys.readouterr().err == ""
    text = theirs.get_text_config()
    windows = [0] * ours.num_layers
    if getattr(text, "sliding_window", None):
        types = getattr(text, "layer_types", ["sliding_attention"] * ours.num_layers)
        windows = [text.sliding_window if kind == "sliding_attention" else 0 for kind in types]
    assert list(ours.layer_windows or [0] * ours.num_layers) == windows
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    read = (ours.embed_size, ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim, ours.vocab_size)
    stated = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads)
    assert read == (*stated, head_dim, text.vocab_size)
    outer = PUBLISHED[name].get("tie_word_embeddings", theirs.tie_word_embeddings)
    assert (ours.norm_eps, ours.tie_embeddings) == (text.rms_norm_eps, outer)


# --- what `transformers` reads ---

SOURCE = pathlib.Path(transformers.__file__).parent
SHARED = (
    "configuration_utils masking_utils modeling_rope_utils modeling_layers modeling_utils cache_utils integrations/moe "
    "integrations/heterogeneity/configuration_utils"
).split()
# Of the objects that are named `config` there: Python's own, and what is set when a config is made.
NOT_KEYS = set(
    "__dict__ _auto_class _config _heterogeneity_spec _output_attentions _post_init_done config_class fget "
    "get_config_class init_kwargs optional".split()
)


@functools.cache
def names_read(file):
    """Attributes that a module takes from something named config, and keywords that a config's making takes out."""
    of_config = {"config", "text_config", "effective_config"} | ({"self"} if "configuration" in file.name else set())
    is_config = lambda node: (getattr(node, "id", "") or getattr(node, "attr", "")) in of_config
    found, tree = set(), ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            if is_config(node.args[0]) and isinstance(node.args[1], ast.Constant):
                found.add(node.args[1].value)
        if isinstance(node, ast.FunctionDef) and node.name in ("__post_init__", "convert_rope_params_to_dict"):
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            taken = [call for call in calls if getattr(call.func, "attr", "") in ("pop", "get")]
            of_keywords = [call for call in taken if getattr(call.func.value, "id", "") == "kwargs"]
            found.update(call.args[0].value for call in of_keywords if isinstance(call.args[0], ast.Constant))
    return found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_key_that_transformers_reads_is_known(architecture):
    """Those that its classes declare, and those that its modelling code takes from a config all the same."""
    family = FAMILIES[architecture]
    config_class = type(in_transformers(next(n for n, raw in PUBLISHED.items() if raw is ONE_OF_EACH[architecture])))
    folder = SOURCE / "models" / family.model_type.removesuffix("_text")
    files = [*(SOURCE / f"{name}.py" for name in SHARED), *folder.glob("configuration_*.py")]
    read = set().union(*map(names_read, [*files, *folder.glob("modeling_*.py")]))
    read |= {field.name for field in dataclasses.fields(config_class)}
    assert {"sliding_window", "is_causal", "rope_theta", "transformers_weights", "per_layer_config"} <= read
    methods = {name for name in read if callable(getattr(config_class, name, None))}
    properties = {name for name in read if isinstance(inspect.getattr_static(config_class, name, None), property)}
    of_families = {key for other in FAMILIES.values() for key in other.defaults}
    known = USED_KEYS | HARMLESS_KEYS | set(NEUTRAL_VALUES) | set(REPEATED_KEYS) | of_families | NOT_KEYS
    unknown = {name for name in read - methods - properties if KEY_ALIASES.get(name, name) not in known}
    assert not unknown


def test_a_family_takes_for_an_absent_key_what_transformers_takes():
    for architecture, family in FAMILIES.items():
        name = next(n for n, raw in PUBLISHED.items() if raw is ONE_OF_EACH[architecture])
        config = type(in_transformers(name))()
        declared = {field.name for field in dataclasses.fields(config)} - {"layer_types", "rope_parameters"}
        stated = {field: value for field, value in family.defaults.items() if field in declared}
        stated.pop("sliding_window", None)  # null in what is made where it is switched off
        assert stated == {field: getattr(config, field) for field in stated}, architecture


# --- keys ---

MET = {  # in published and fine-tuned folders
    "_attn_implementation": "flash_attention_2",
    "_commit_hash": "abc",
    "attn_implementation": None,
    "base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"},
    "cache_implementation": "hybrid",
    "classifier_dropout": 0.1,
    "embd_pdrop": 0.0,
    "gradient_checkpointing": False,
    "hidden_dropout": 0.0,
    "initializer_factor": 1.0,
    "is_causal": True,
    "is_encoder_decoder": False,
    "max_seq_len_cached": None,
    "model_max_length": 8192,
    "no_bias": False,
    "num_labels": 2,
    "num_logits_to_keep": 0,
    "output_attentions": False,
    "partial_rotary_factor": 1.0,
    "qk_layernorm": False,
    "quantization_config": None,
    "resid_pdrop": 0.0,
    "rope_interleaved": False,
    "sliding_window_size": None,
    "tokenizer_padding_side": "left",
    "transformers_weights": None,
    "unsloth_version": "2025.1",
    "use_flash_attention": None,
}
UNREAD = {"attn_pdrop": 0.1, "architecture_version": "2b", "training_tokens": 15000000000, "mechanism": [1, 2]}


def test_met_keys_pass_in_silence_and_unread_ones_with_a_line(capsys):
    before = parse_config(LLAMA, "here")
    assert parse_config(LLAMA | MET | {"layer_types": ["full_attention"] * 32}, "here") == before
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert parse_config(LLAMA | UNREAD, "test_config_keys") == before
    listed = 'architecture_version = "2b", attn_pdrop = 0.1, mechanism = [1, 2], training_tokens = 15000000000'
    line = f"test_config_keys: ignored, as transformers does not read it for llama: {listed}\n"
    assert capsys.readouterr().err == line  # once


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("LlamaForCausalLM", {"use_qk_norm": True}),
        ("LlamaForCausalLM", {"qkv_bias": True}),
        ("LlamaForCausalLM", {"is_causal": False}),
        ("LlamaForCausalLM", {"per_layer_config": {"0": {"sliding_window": 8}}}),
        ("LlamaForCausalLM", {"transformers_weights": "other.safetensors"}),
        ("LlamaForCausalLM", {"text_config": {"hidden_size": 8}}),
        ("LlamaForCausalLM", {"num_experts": 8}),
        ("LlamaForCausalLM", {"query_pre_attn_scalar": 144}),
        ("LlamaForCausalLM", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("LlamaForCausalLM", {"model_type": "mistral"}),
        ("LlamaForCausalLM", {"tie_word_embeddings": "false"}),
        ("LlamaForCausalLM", {"rms_norm_eps": None}),
        ("LlamaForCausalLM", {"head_dim": 0}),
        ("LlamaForCausalLM", {"num_key_value_heads": 0}),
        ("LlamaForCausalLM", {"layer_types": ["sliding_attention"] * 32}),
        ("MistralForCausalLM", {"sliding_window": 0}),
        ("MistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"] * 16, "sliding_window": 8}),
        ("Qwen2ForCausalLM", {"qkv_bias": False}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": None}),
        ("Qwen3ForCausalLM", {"use_qk_norm": False}),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [3]}),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}),
        ("Qwen3MoeForCausalLM", {"shared_expert_intermediate_size": 512}),
        ("Qwen3MoeForCausalLM", {"moe_intermediate_size": None}),
        ("Qwen3MoeForCausalLM", {"num_local_experts": 64}),
        ("Gemma2ForCausalLM", {"sliding_window_size": 2048}),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": 0.0}),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}),
        ("GptOssForCausalLM", {"experts_per_token": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_value_that_changes_the_maths_is_refused_by_its_key(architecture, keys):
    message = refusal(ONE_OF_EACH[architecture] | keys)
    assert next(iter(keys)) in message or list(keys)[-1] in message


def test_layers_without_experts_are_named_with_what_they_would_compute():
    message = refusal(ONE_OF_EACH["Qwen3MoeForCausalLM"] | {"mlp_only_layers": [0, 3]})
    assert "mlp_only_layers is [0, 3] (layers with a dense MLP among layers of experts), which this lib" in message
    assert "take a model without it" in message


def test_what_the_whole_says_holds_for_its_text_part(tmp_path):
    """transformers ties the projection onto the vocabulary by the outer key, and takes code from there."""
    folder = write_published_config(tmp_path, "google/gemma-3-4b-it")
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(raw))
    assert not read_config(folder).tie_embeddings
    assert read_model_json(folder / "config.json")["tie_word_embeddings"] is False
    (folder / "config.json").write_text(json.dumps(raw | {"auto_map": {"AutoModel": "modeling.Model"}}))
    with pytest.raises(UserError, match="auto_map"):
        read_config(folder)


# --- rotary positions ---

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
ROPES = {
    "betas of 0 are those of the paper": ("llama", {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0.0}}),
    "betas of null": ("llama", {"rope_parameters": YARN | {"beta_fast": None, "beta_slow": None}}),
    "betas": ("llama", {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}}),
    "truncate of null": ("llama", {"rope_scaling": YARN | {"truncate": None}}),
    "not truncated": ("qwen3", {"rope_scaling": YARN | {"truncate": False}}),
    "factor of null": ("llama", {"rope_scaling": YARN | {"factor": None}}),
    "scales": ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    "one scale of 0": ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0}}),
    "attention factor": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.25, "mscale": 2.0}}),
    "type": ("qwen2", {"rope_scaling": {"type": "linear", "factor": 3}}),
    "type beside rope_type": ("mistral", {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 3}}),
    "theta beside and inside": ("olmo2", {"rope_theta": 777.0, "rope_parameters": {"rope_theta": 55.0}}),
    "theta beside": ("olmo2", {"rope_theta": 777, "rope_parameters": {"rope_type": "default"}}),
    "lengths of the whole come first": (
        "llama",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 64},
    ),
    "empty scaling": ("llama", {"rope_scaling": {}, "rope_theta": 90.0}),
    "the family's own": ("gpt_oss", {"rope_parameters": None}),
    "flat thetas": ("gemma3", {"rope_parameters": ..., "rope_theta": 5e5, "rope_local_base_freq": 200}),
    "flat scaling": ("gemma3", {"rope_parameters": ..., "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "by layer type": ("gemma3", {"rope_parameters": BY_TYPE}),
    "scaling over layer types": (
        "gemma3",
        {"rope_parameters": BY_TYPE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 3.0},
    ),
    "one layer type": ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}),
    "neither": ("gemma3", {"rope_parameters": {}, "rope_theta": 4e4}),
}


@pytest.fixture(scope="module")
def tiny_configs():
    """config.json of a tiny model of each kind, as transformers writes it."""
    odd = {"qwen3_moe": QWEN_MOE, "gpt_oss": GPT_OSS, "gemma3": {"num_hidden_layers": 7}}
    families = tiny_models.FAMILIES
    made = {name: classes[0](**tiny_models.ODD_SIZES | odd.get(name, {})) for name, classes in families.items()}
    return {
        name: json.loads(config.to_json_string(use_diff=False)) | {"architectures": [families[name][1].__name__]}
        for name, config in made.items()
    }


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name, tiny_configs):
    family, keys = ROPES[name]
    raw = {key: value for key, value in (tiny_configs[family] | keys).items() if value is not ...}
    if "rope_scaling" in keys and family != "gemma3":
        raw.pop("rope_parameters", None)
    ours = parse_config(raw, "config.json")
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    module = inspect.getmodule(getattr(transformers, raw["architectures"][0]))
    rotary_class = next(c for n, c in vars(module).items() if n.endswith("RotaryEmbedding") and "Vision" not in n)
    rotary = rotary_class(theirs)
    prefixes = {"": ours.rope}
    if ours.local_rope is not None:
        prefixes = {"full_attention_": ours.rope, "sliding_attention_": ours.local_rope}
    for prefix, rope in prefixes.items():
        found = compute_inverse_frequencies(rope, ours.head_dim, np.float32)
        expected = getattr(rotary, f"{prefix}inv_freq").numpy()
        assert np.allclose(found, expected, rtol=1e-6, atol=0), prefix
        assert rope.attention_factor == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"), rel=1e-12)


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("llama", {"rope_theta": 0, "rope_parameters": None}, "rope_theta"),
        ("llama", {"rope_theta": "1e4", "rope_parameters": None}, "rope_theta"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor"),
        ("llama", {"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "original_max_position"),
        ("llama", {"rope_scaling": YARN | {"truncate": "false"}}, "truncate"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
        ("llama", {"rope_parameters": BY_TYPE}, "full_attention"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_type, factor"),
        ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta"),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type"),
        ("gemma3", {"rope_scaling": BY_TYPE}, "full_attention"),
        # What a user adds by hand to a file of transformers 5: theta would fall back to 10,000 without a word.
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "delete rope_scaling",
        ),
    ],
)
def test_rope_that_cannot_be_computed_is_refused(family, keys, named, tiny_configs):
    assert named in refusal(tiny_configs[family] | keys)


def test_a_rope_that_is_stated_twice_in_the_same_way(tiny_configs):
    both = {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 1e5}}
    both |= {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "rope_theta": 1e5}
    rope = parse_config(tiny_configs["llama"] | both, "config.json").rope
    assert (rope.theta, rope.kind, rope.original_max_positions) == (1e5, "llama3", 64)


# --- logits, and many keys at once ---


def test_windows_of_experts_are_in_every_layer(tmp_path):
    odd = QWEN_MOE | {"use_sliding_window": True, "sliding_window": 5}
    folder = make_tiny_model(tmp_path / "model", "qwen3_moe", **odd)
    assert read_config(folder).layer_windows == (5, 5, 5)
    ids = random_ids(301)
    assert relative_difference(folder_logits(folder, ids), torch_logits(folder, ids)) < 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "qwen3_moe"])
def test_accepted_keys_leave_the_logits_alone(family, tmp_path):
    """Half of all keys at a time, those that nobody reads among them."""
    odd = (QWEN_MOE if family == "qwen3_moe" else {}) | ({"sliding_window": 6} if family != "llama" else {})
    folder = make_tiny_model(tmp_path / "model", family, **odd)
    raw, draw = json.loads((folder / "config.json").read_text()), random.Random(family)
    extra = {key: value for key, value in (MET | UNREAD).items() if key not in raw and draw.random() < 0.5}
    extra.pop("_attn_implementation", None)  # one that this machine may not have
    (folder / "config.json").write_text(json.dumps(raw | extra))
    ids = random_ids(301, (1, 24))
    assert relative_difference(folder_logits(folder, ids), torch_logits(folder, ids)) < 1e-4


def test_causality_is_a_key_that_transformers_reads_undeclared(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    ids = random_ids(301, (1, 24))
    before = torch_logits(folder, ids)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"is_causal": False}))
    assert relative_difference(torch_logits(folder, ids), before) > 0.01
    assert "is_causal" in refusal(raw | {"is_causal": False})


@pytest.mark.parametrize("seed", range(5))
def test_any_mixture_of_keys_is_accepted_or_refused_by_name(seed):
    """Harmless keys of any value never change what is read; one key that does is named among all of them."""
    draw, values = random.Random(seed), (None, False, True, 0, 1, 0.5, -3, "eager", "", [], [1], {}, {"a": 1})
    word = lambda: "".join(draw.choice("abcdefghij") for _ in range(8))
    foreign = {key: set() for family in FAMILIES.values() for key in family.defaults}
    for _ in range(60):
        architecture = draw.choice(list(FAMILIES))
        family, raw = FAMILIES[architecture], ONE_OF_EACH[architecture]
        free = sorted(HARMLESS_KEYS - set(family.defaults) - set(raw))
        keys = [*draw.sample(free, 6), *(f"{word()}_{word()}" for _ in range(3))]
        harmless = {key: draw.choice(values) for key in keys}
        others = sorted(set(NEUTRAL_VALUES) - set(family.defaults) - set(family.fixed))
        harmless |= {key: draw.choice(NEUTRAL_VALUES[key]) for key in draw.sample(others, 3)}
        assert parse_config(harmless | raw, "x") == parse_config(raw, "x")
        key = draw.choice([*others, *sorted(set(foreign) - set(family.defaults) - USED_KEYS - HARMLESS_KEYS)])
        neutral = NEUTRAL_VALUES.get(key, (None, False, 0, "", [], {}))
        bad = draw.choice([value for value in (*values, 4096, 7.5) if value not in neutral])
        assert key in refusal(harmless | raw | {key: bad})


@pytest.mark.parametrize("seed", range(3))
def test_any_value_of_a_key_that_is_used_is_read_or_refused_in_one_line(seed):
    """Never a traceback, and never the value of another key in its place."""
    draw = random.Random(seed)
    values = (None, False, True, 0, 1, 2, 0.5, -3, "x", "", [], [1], {}, {"a": 1}, 1e400)
    for _ in range(150):
        architecture = draw.choice(list(FAMILIES))
        family, raw = FAMILIES[architecture], ONE_OF_EACH[architecture]
        key = draw.choice(sorted((USED_KEYS | set(family.defaults)) - {"architectures"}))
        try:
            parse_config(raw | {key: draw.choice(values)}, "config.json")
        except UserError as error:
            assert "\n" not in str(error)


def test_torch_is_not_needed_to_read_a_folder():
    """postrain installs without it."""
    code = "import sys, postrain.hf.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
