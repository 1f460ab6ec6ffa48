"""adapter_config.json: what is accepted computes what `peft` computes, all else is refused by name."""

import dataclasses
import json
import random

import peft
import pytest
import torch
import transformers
from hf_compare import our_logits, random_ids, relative_difference, torch_logits
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import load_adapter
from postrain.hf.peft.keys import HARMLESS_KEYS, NEUTRAL_VALUES, USED_KEYS
from postrain.models.params import merge_params

IDS = random_ids(301, (1, 16))
FILE = "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture(scope="module")
def loaded(base):
    return load_pretrained(base)


def load_in_torch(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter of three modules, one with a rank of its own, as `peft` writes it."""
    folder = tmp_path_factory.mktemp("adapter")
    modules = ["q_proj", "v_proj", "down_proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, rank_pattern={"v_proj": 2})
    torch.manual_seed(0)
    model = peft.get_peft_model(load_in_torch(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def edit(adapter):
    """Lays keys over adapter_config.json for the test; ``...`` leaves one out."""
    before = (adapter / FILE).read_text()

    def lay(keys):
        raw = {key: value for key, value in (json.loads(before) | keys).items() if value is not ...}
        (adapter / FILE).write_text(json.dumps(raw))
        return adapter

    yield lay
    (adapter / FILE).write_text(before)


def refusal(folder, config):
    with pytest.raises(UserError) as caught:
        load_adapter(folder, config)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_every_field_of_peft_is_known():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= USED_KEYS | HARMLESS_KEYS | set(NEUTRAL_VALUES)
    assert not USED_KEYS - fields
    default = peft.LoraConfig().to_dict()
    assert all(default[key] in NEUTRAL_VALUES[key] for key in fields & set(NEUTRAL_VALUES))


HARMLESS = {  # values that tell one of them from nothing
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "inference_mode": False,
    "loftq_config": {},
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "qalora_group_size": 8,
    "task_type": None,
    "revision": "main",
    "peft_version": "0.99.0",
    "exclude_modules": ["lm_head", "k_proj"],
}
PATTERN = r"(?:.*?(?:language|text).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|v_proj|down_proj))"


@pytest.mark.parametrize(
    "keys",
    [
        HARMLESS | {"fan_in_fan_out": True, "use_dora": None, "modules_to_save": None, "target_parameters": None},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers", "use_rslora": True},
        {"target_modules": PATTERN, "alpha_pattern": {"layers.*.v_proj": 2, "q_proj": 7.5}},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(k|o|gate|up)_proj", "init_lora_weights": "gaussian"},
    ],
    ids=lambda keys: "-".join(keys)[:40],
)
def test_accepted_keys_compute_what_peft_computes(keys, base, loaded, edit):
    config, tree = load_adapter(edit(keys), loaded[0])
    theirs = torch_logits(peft.PeftModel.from_pretrained(load_in_torch(base), edit(keys)), IDS)
    ours = our_logits(merge_params(tree, loaded[1]), config, IDS)
    assert relative_difference(ours, theirs) <= 1e-4
    assert relative_difference(ours, torch_logits(base, IDS)) > 0.05


def test_peft_leaves_out_what_is_not_targeted(base, loaded, edit):
    """It drops the tensors without a word, so that applying them would be another model."""
    whole = torch_logits(peft.PeftModel.from_pretrained(load_in_torch(base), edit({})), IDS)
    for keys in ({"target_modules": ["q_proj", "v_proj"]}, {"exclude_modules": ["mlp.down_proj"]}):
        folder = edit(keys)
        part = torch_logits(peft.PeftModel.from_pretrained(load_in_torch(base), folder), IDS)
        assert relative_difference(part, whole) > 0.05
        message = refusal(folder, loaded[0])
        assert "down_proj" in message and "target_modules and exclude_modules" in message


@pytest.mark.parametrize(
    "keys",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": 1},
        {"layer_replication": [[0, 3], [1, 3]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"alora_invocation_tokens": [1, 2]},
        {"kasa_config": {"beta": 1.0}},
        {"a_key_of_the_future": 0.5},
        {"enable_lora": [True, False, True]},
        {"use_dora": "false"},
        {"use_rslora": "no"},
        {"lora_alpha": 0},
        {"lora_alpha": float("inf")},
        {"lora_alpha": ...},
        {"r": True},
        {"rank_pattern": {"v_proj": 2.5}},
        {"rank_pattern": {"v_proj": 0}},
        {"rank_pattern": ["v_proj"]},
        {"rank_pattern": {"(v_proj": 2}},
        {"alpha_pattern": {"v_proj": "4"}},
        {"target_modules": "(q_proj"},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": [1]},
        {"target_parameters": "mlp.experts.down_proj"},
        {"target_parameters": ["mlp.experts.down_proj"]},
    ],
    ids=str,
)
def test_what_changes_the_maths_or_cannot_be_read_is_refused_by_name(keys, loaded, edit):
    assert next(iter(keys)) in refusal(edit(keys), loaded[0])


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_keys_is_accepted_or_refused_by_name(seed, loaded, edit):
    draw = random.Random(seed)
    values = (None, False, True, 0, 3, 0.5, "x", [], ["x"], {}, {"x": 1}, "none")
    config, _ = load_adapter(edit({}), loaded[0])
    for _ in range(25):
        harmless = {key: draw.choice(values) for key in draw.sample(sorted(HARMLESS_KEYS), 5)}
        harmless |= {key: draw.choice(NEUTRAL_VALUES[key]) for key in draw.sample(sorted(NEUTRAL_VALUES), 4)}
        harmless[f"unknown_{draw.randrange(99)}"] = draw.choice([None, False, 0, [], {}])
        assert load_adapter(edit(harmless), loaded[0])[0] == config
        key = draw.choice(sorted(NEUTRAL_VALUES))
        bad = draw.choice([value for value in values if value not in NEUTRAL_VALUES[key]])
        assert key in refusal(edit(harmless | {key: bad}), loaded[0])
        key = draw.choice(sorted(USED_KEYS))
        try:
            load_adapter(edit(harmless | {key: draw.choice(values)}), loaded[0])
        except UserError as error:
            assert "\n" not in str(error)
