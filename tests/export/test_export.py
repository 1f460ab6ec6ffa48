"""The folder that users take away: weights as trained, the tokenizer of the run, both checked before they are left."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from tiny_models import CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer

from postrain import export as export_module
from postrain.config import MeshConfig, resolve
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.export import check_output, compute_probe_logits, export_workdir, write_export
from postrain.hf.load import load_pretrained
from postrain.models.lora import merge_lora
from postrain.models.params import merge_params
from postrain.sharding import make_mesh
from postrain.training.model import load_model
from postrain.types import TrainState

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("source") / "model", "llama")


def make_run(source, *, rank=3, compute_dtype="bfloat16", **sections):
    """(config, mesh, model, state) as at the end of a run; adapters that do something."""
    section = {"path": str(source), "lora": {"rank": rank}, "compute_dtype": compute_dtype}
    values = {"data": {"train": "rows.jsonl"}, "model": section}
    for name, keys in sections.items():
        values[name] = values.get(name, {}) | keys
    config, mesh = resolve(values), make_mesh(MeshConfig(fsdp=-1))
    model = load_model(config, source, mesh)
    noise = lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)
    params = jax.tree.map(noise, model.params)
    state = TrainState(step=1, params=params, frozen=model.frozen, opt_state=(), rng=jax.random.key(0), ema=None)
    return config, mesh, model, state


def export(folder, run, source, *, format=None, tokenizer=None):
    config, mesh, model, state = run
    tokenizer = tokenizer or load_tokenizer(config.model.tokenizer or source, config.data.chat_template)
    write_export(folder, state, model, config, mesh=mesh, source_folder=source, tokenizer=tokenizer, format=format)
    return folder


def largest_difference(one, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other)))


def test_a_merge_is_made_in_float32_whatever_the_run_computed_in(source, tmp_path):
    config, mesh, model, state = run = make_run(source)
    assert state.frozen["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"
    _, base = load_pretrained(source)
    expected = merge_lora(merge_params(state.params, base), model.config)
    _, found = load_pretrained(export(tmp_path / "out", run, source))
    assert largest_difference(found, expected) <= 1e-6
    assert largest_difference(found, base) > 1e-3  # the adapters are in it
    rounded = merge_lora(merge_params(state.params, state.frozen), model.config, "float32")
    assert largest_difference(found, rounded) > 1e-3
    jax.block_until_ready(state)  # and the state has not been used up


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_a_merge_is_rounded_once(source, tmp_path, dtype, bound):
    _, _, model, state = run = make_run(source, export={"dtype": dtype})
    export(tmp_path / "out", run, source)
    expected = merge_lora(merge_params(state.params, load_pretrained(source)[1]), model.config)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    found = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32).T
    kernel = np.asarray(expected["layers"]["mlp"]["up"]["kernel"][1])
    np.testing.assert_allclose(found, kernel, rtol=bound, atol=1e-6)
    assert tensors["model.norm.weight"].dtype == dtype


def test_the_tokenizer_of_the_run_travels(source, tmp_path):
    """Another tokenizer folder, another template, no generation_config.json: serving must do as the run did."""
    bare = shutil.copytree(source, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    other = make_tiny_tokenizer(tmp_path / "other")
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "template.jinja").write_text(OTHER_TEMPLATE)
    run = make_run(bare, model={"path": str(bare), "tokenizer": str(other), "lora": {"rank": 2}})
    used = load_tokenizer(other, str(tmp_path / "template.jinja"))
    assert used.stop_ids == {0, 2} and used.special_tokens["eos_token"] == "<|im_end|>"
    expected = load_tokenizer(other, str(tmp_path / "template.jinja"))
    expected.special_tokens["eos_token"] = "<|endoftext|>"  # as the template ends answers; the rest as it was
    for format in ("merged", "adapter"):
        out = export(tmp_path / format, run, bare, format=format, tokenizer=used)
        found = load_tokenizer(out)
        assert found.fingerprint() == expected.fingerprint()
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs.chat_template == OTHER_TEMPLATE and theirs.model_max_length == 77
        assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
        assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [0, 2]}
        assert theirs.eos_token == "<|endoftext|>"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0, 2]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0, 2]


def test_what_the_run_did_not_change_is_copied(source, tmp_path):
    model = shutil.copytree(source, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    out = export(tmp_path / "out", make_run(model), model)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    (model / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    out = export(tmp_path / "again", make_run(model), model)  # the run stopped at the tokenizer's end token too
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 7], "temperature": 0.6}


def test_an_adapter_names_its_base_as_the_user_did(source, tmp_path):
    run = make_run(source)
    config = dataclasses.replace(run[0], model=dataclasses.replace(run[0].model, path="pypi:some-model==1.0"))
    tokenizer = load_tokenizer(source)
    out = export(tmp_path / "out", (config, *run[1:]), source, format="adapter", tokenizer=tokenizer)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "pypi:some-model==1.0"


def drop_merge(base, adapters, config):
    return base


def swap_layers(tree):
    return tree | {"layers": jax.tree.map(lambda x: x[::-1], tree["layers"])}


@pytest.mark.parametrize("fault", ["merge without effect", "layers in another order", "another adapter"])
def test_an_export_that_computes_something_else_is_not_left(source, tmp_path, monkeypatch, fault):
    run = make_run(source)
    format = "adapter" if fault == "another adapter" else "merged"
    out = export(tmp_path / "out", run, source, format=format)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if fault == "merge without effect":
        monkeypatch.setattr(export_module, "_merge", drop_merge)
    name = "save_adapter" if format == "adapter" else "save_pretrained"
    save = getattr(export_module, name)
    if fault != "merge without effect":
        wrong = lambda folder, params, *args, **kwargs: save(folder, swap_layers(params), *args, **kwargs)
        monkeypatch.setattr(export_module, name, wrong)
    with pytest.raises(UserError, match="logits differ") as caught:
        export(tmp_path / "new", run, source, format=format)
    assert "\n" not in str(caught.value) and str(tmp_path / "new") in str(caught.value)
    with pytest.raises(UserError, match="logits differ"):
        export(out, run, source, format=format)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def scale_adapters(run, size):
    """The run with a second adapter matrix of this spread: its effect on the logits is about in proportion."""
    config, mesh, model, state = run
    is_b = lambda path: path[-1].key == "lora_b"
    small = lambda path, x: size * jax.random.normal(jax.random.key(x.size), x.shape) if is_b(path) else x
    return config, mesh, model, state.replace(params=jax.tree_util.tree_map_with_path(small, state.params))


def test_a_merge_without_effect_is_seen_in_files_that_round_more_than_it_does(tmp_path, monkeypatch):
    """bfloat16 changes the logits by about as much as this adapter: only before the rounding can they be told apart."""
    source = make_tiny_model(tmp_path / "source", "llama", dtype="bfloat16")
    config, mesh, model, state = run = scale_adapters(make_run(source), 3e-4)
    base = load_pretrained(source)[1]
    whole = compute_probe_logits(merge_params(state.params, base), model.config, mesh)
    effect = np.sqrt(np.mean((whole - compute_probe_logits(base, model.config, mesh)) ** 2)) / whole.std()
    assert 0.01 < effect < 0.05
    out = export(tmp_path / "out", run, source)
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == "bfloat16"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(export_module, "_merge", drop_merge)
    with pytest.raises(UserError, match="the merged weights' logits differ from those of the base with its adapters"):
        export(out, run, source)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_files_of_the_base_are_seen_in_bfloat16(tmp_path, monkeypatch):
    """The merge is right, what is written is not: by no more than a full fine-tune that rounding changes as much."""
    source = make_tiny_model(tmp_path / "source", "llama", dtype="bfloat16")
    run = scale_adapters(make_run(source), 3e-4)
    save, base = export_module.save_pretrained, load_pretrained(source)[1]
    wrong = lambda folder, params, *args, **kwargs: save(folder, base, *args, **kwargs)
    monkeypatch.setattr(export_module, "save_pretrained", wrong)
    with pytest.raises(UserError, match="the files' logits differ from those of the trained weights"):
        export(tmp_path / "out", run, source)
    assert not (tmp_path / "out").exists()


def test_layers_of_several_dtypes_are_compared_in_their_own(tmp_path):
    source = make_tiny_model(tmp_path / "source", "llama", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run = make_run(source, rank=0)
    out = export(tmp_path / "out", run, source)
    found = load_file(out / "model.safetensors")
    assert {name: array.dtype for name, array in found.items()} == {n: a.dtype for n, a in tensors.items()}


@pytest.mark.parametrize(("size", "advised"), [(1e-5, True), (2e-2, False)])
def test_how_much_of_an_update_the_rounding_keeps_is_told(tmp_path, size, advised):
    source = make_tiny_model(tmp_path / "source", "llama", dtype="bfloat16")
    config, mesh, model, state = make_run(source, rank=0)
    before = load_pretrained(source)[1]
    noise = lambda x: (x + size * jax.random.normal(jax.random.key(x.size), x.shape)) * (x != 0)
    state = state.replace(params=jax.tree.map(noise, before))
    tokenizer, options = load_tokenizer(source), {"mesh": mesh, "source_folder": source}
    note = write_export(tmp_path / "out", state, model, config, tokenizer=tokenizer, **options)
    after = load_pretrained(tmp_path / "out")[1]
    count = lambda other: sum(jax.tree.leaves(jax.tree.map(lambda a, b: int(np.sum(a != b)), before, other)))
    changed, kept = count(state.params), count(after)
    assert 0 < kept < changed and (kept < changed / 2) == advised
    advice = ": export.dtype=float32 would keep it in all" if advised else ""
    assert note == f"export      bfloat16 keeps the update in {kept / changed:.1%} of the changed weights{advice}"
    wide = dataclasses.replace(config, export=dataclasses.replace(config.export, dtype="float32"))
    assert write_export(tmp_path / "wide", state, model, wide, tokenizer=tokenizer, **options) == ""


def test_full_training_is_checked_in_every_dtype(source, tmp_path, monkeypatch):
    for dtype in ("float32", "bfloat16", "float16"):
        run = make_run(source, rank=0, export={"dtype": dtype})
        export(tmp_path / "out", run, source)  # replaces the one before
    save = export_module.save_pretrained
    wrong = lambda folder, params, *args, **kwargs: save(folder, swap_layers(params), *args, **kwargs)
    monkeypatch.setattr(export_module, "save_pretrained", wrong)
    with pytest.raises(UserError, match="logits differ"):
        export(tmp_path / "out", run, source)


def test_a_run_is_never_replaced_by_its_export(source, tmp_path):
    workdir = tmp_path / "runs" / "mine"
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    (workdir / "config.json").write_text("{}")
    for place in (workdir, workdir.parent, workdir / "checkpoints", workdir / "checkpoints" / "5" / "x", tmp_path):
        with pytest.raises(UserError, match=str(place)) as caught:
            check_output(workdir, place)
        assert "\n" not in str(caught.value)
    check_output(workdir, workdir / "export")
    check_output(workdir, tmp_path / "runs" / "other")
    link = tmp_path / "link"
    link.symlink_to(workdir)
    with pytest.raises(UserError, match="contains the run"):
        check_output(workdir, link)


def test_the_command_refuses_before_anything_is_loaded(tmp_path):
    workdir = tmp_path / "mine"
    workdir.mkdir()
    values = {"data": {"train": ["rows.jsonl"]}, "model": {"path": "nowhere"}, "optimizer": {}}
    (workdir / "config.json").write_text(json.dumps(values))
    (workdir / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="contains the run"):
        export_workdir(workdir, workdir)
    assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "metrics.jsonl"]


def test_the_source_is_not_replaced(source):
    before = sorted(path.name for path in source.iterdir())
    for format in ("merged", "adapter"):
        with pytest.raises(UserError, match="choose another|export to another"):
            export(source, make_run(source), source, format=format)
    assert sorted(path.name for path in source.iterdir()) == before
