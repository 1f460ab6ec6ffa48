"""Pairs a second of direct preference optimisation, side by side with TRL and Tunix on the same model and pairs.

    python tests/benchmarks/preference.py --rounds 3            # prints a JSON line a run, then the medians
    python tests/benchmarks/preference.py --rounds 3 --write    # and writes them into docs/benchmarks.md

8 pairs an update, a prompt with an answer up to 256 tokens; and the same with prompts of 192 tokens. Every parameter
trains against a frozen reference, AdamW, float32 on CPU. TRL and Tunix run the reference beside the model in every
step and pad all answers to one length; postrain computes it once, and its rate counts that pass as if each pair came
once. ``postrain_lora`` trains adapters, whose reference is the model without them.

Each run is a process of its own; the sides take turns. TUNIX_PYTHON names the interpreter of an environment with
google-tunix 0.1.7 (``python -m venv ENV && ENV/bin/pip install google-tunix==0.1.7``); without it that side is left
out.
"""

import dataclasses
import math
import os
import re
import statistics
import sys
import tempfile
import time

import workloads
from runner import Bar, describe_versions, find_versions, make_parser, run_in_turns

PAIRS, LENGTH, BETA, LEARNING_RATE = 8, 256, 0.1, 1e-4
ROWS, ROW_LENGTH = 2, 1088  # of postrain's packed batch: some 8 pairs with their prompts shared
LOSS_CHUNK = 256  # of its answer tokens projected at a time
WORKLOADS = {"prompts up to 128": False, "prompts of 192": True}
STEPS = {"postrain": 12, "postrain_lora": 12, "trl": 5, "tunix": 6}  # updates of a run, for each workload
SIDES = tuple(side for side in STEPS if side != "tunix" or os.environ.get("TUNIX_PYTHON"))
WARM_UP = 2


# --- postrain ---


def make_groups(pairs):
    """The documents of pairs, as rows of kind preference become."""
    import numpy as np

    from postrain.data.bad_row import RowRef
    from postrain.data.documents import Field, Group, Rendered, share_prompts

    groups = []
    for i, (prompt, *answers) in enumerate(pairs):
        sequences = []
        for answer, score in zip(answers, (1.0, 0.0), strict=True):
            tokens = np.concatenate([prompt, answer])
            fields = (Field("scores", np.full(len(tokens), score, np.float32), "sequence"),)
            mask = np.arange(len(tokens)) >= len(prompt)
            sequences.append(Rendered(tokens, mask, RowRef("workload", "workload", i), fields=fields))
        groups.append(share_prompts().each(Group(tuple(sequences))))
    return groups


def make_step(folder: str, lora: bool, loss: str = "sigmoid"):
    """The train step of the tiny model, its first state, and log p of the reference as a function of the parameters."""
    import jax

    from postrain.config import REFERENCE_FREE, OptimizerConfig, PreferenceSection
    from postrain.hf.load import load_pretrained
    from postrain.models.config import LoraConfig
    from postrain.models.lora import drop_adapters, init_lora
    from postrain.objectives.preference import make_preference_loss
    from postrain.training.model import Forward
    from postrain.training.optimizer import make_optimizer
    from postrain.training.step import init_train_state, make_train_step

    config, params = load_pretrained(folder)
    frozen = {}
    if lora:
        config = dataclasses.replace(config, lora=LoraConfig(16))
        params, frozen = init_lora(config, jax.random.key(0), params), params
    forward = Forward(config, chunk=LOSS_CHUNK)
    of_base = lambda params, batch: forward.logprobs(drop_adapters(params), batch)[0].logprobs
    of_cache = lambda params, batch: batch.fields["reference_logprobs"]
    reference = None if loss in REFERENCE_FREE else of_base if lora else of_cache
    loss_fn = make_preference_loss(forward.logprobs, reference, PreferenceSection(beta=BETA, loss=loss))
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"), 100)
    state = init_train_state(params, frozen, optimizer, jax.random.key(0))
    compute = jax.jit(lambda params, batch: forward.logprobs(params, batch)[0].logprobs)
    return make_train_step(loss_fn, optimizer), state, (None if lora else compute)


def measure_memory(folder: str, lora: bool, batch) -> dict[str, float]:
    """MiB of the compiled step: its largest array, what its reference adds, and the sizes of logits and of a model."""
    from postrain.models.params import num_params

    temporary, texts = [], []
    for loss in ("sigmoid", "simpo"):  # the latter without a reference
        step, state, _ = make_step(folder, lora, loss)
        compiled = step.lower(state, batch).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        texts.append(compiled.as_text())
    largest = max(math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\bf32\[([\d,]+)\]", texts[0]))
    sizes = {
        "largest": 4 * largest,
        "of_reference": temporary[0] - temporary[1],
        "logits": 4 * batch.tokens.size * workloads.TINY["vocab"],
        "model": 4 * num_params(state.frozen or state.params),
    }
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


def run_postrain(folder: str, long_prompts: bool, lora: bool, steps: int) -> dict:
    import numpy as np

    from postrain.config import DataConfig
    from postrain.data.batches.in_memory import ExampleSet, MemoryBatches
    from postrain.data.batches.row_filter import DataReport
    from postrain.types import Batch

    groups = make_groups(workloads.preference_pairs(PAIRS * 64, LENGTH, long_prompts))
    config = DataConfig(sequence_length=ROW_LENGTH, batch_size=ROWS)
    batches = MemoryBatches(ExampleSet(groups, DataReport([]), {}), config)
    step, state, reference = make_step(folder, lora)
    start_params = state.params
    prepared = []
    for _ in range(steps):  # the reference of each batch, before the weights move
        arrays, seconds = next(batches), 0.0
        pairs = int((arrays.pop("row_ids") >= 0).sum())
        if reference is not None:
            start = time.perf_counter()
            arrays["reference_logprobs"] = np.asarray(reference(start_params, Batch.from_arrays(arrays)))
            seconds = time.perf_counter() - start
        prepared.append((arrays, pairs, seconds))
    memory = measure_memory(folder, lora, Batch.from_arrays(prepared[0][0]))
    seconds, losses = [], []
    for arrays, _, _ in prepared:
        start = time.perf_counter()
        state, metrics = step(state, Batch.from_arrays(arrays))
        losses.append(float(metrics["train/loss"]))
        seconds.append(time.perf_counter() - start)
    counted = slice(WARM_UP, None)
    updates, of_reference = sum(seconds[counted]), sum(taken for _, _, taken in prepared[counted])
    pairs = sum(pairs for _, pairs, _ in prepared[counted])
    return {
        "pairs_per_second": pairs / (updates + of_reference),
        "without_reference": pairs / updates,
        "losses": losses,
        "memory": memory,
        "versions": find_versions("jax", "optax", "grain"),
    }


# --- the others ---


def run_trl(folder: str, long_prompts: bool, steps: int) -> dict:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(os.cpu_count())
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    words = lambda ids: " ".join(f"t{i}" if i > workloads.EOS_ID else "" for i in ids.tolist()).strip()
    rows = [  # TRL writes the end token itself
        {"prompt": words(prompt) + " ", "chosen": words(chosen) + " ", "rejected": words(rejected) + " "}
        for prompt, chosen, rejected in workloads.preference_pairs(PAIRS * steps, LENGTH, long_prompts)
    ]
    begins, ends = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begins.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        arguments = DPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=PAIRS,
            max_steps=steps,
            max_length=LENGTH,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            logging_steps=1,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        )
        tokenizer, dataset = AutoTokenizer.from_pretrained(folder), datasets.Dataset.from_list(rows)
        options = {"args": arguments, "train_dataset": dataset, "processing_class": tokenizer, "callbacks": [Clock()]}
        trainer = DPOTrainer(model=load(), ref_model=load(), **options)
        trainer.train()
    seconds = [end - begin for begin, end in zip(begins, ends, strict=True)][WARM_UP:]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    used = find_versions("trl", "transformers", "torch")
    return {"pairs_per_second": PAIRS * len(seconds) / sum(seconds), "losses": losses, "versions": used}


def pad_pairs(pairs):
    """Arrays of 8 pairs each, all of one shape: prompts end and answers begin at the same place."""
    import numpy as np

    def pad(rows, width, left=False):
        out = np.zeros((len(rows), width), np.int32)
        for line, row in zip(out, rows, strict=True):
            line[width - len(row) if left else 0 :][: len(row)] = row
        return out

    widths = max(len(prompt) for prompt, *_ in pairs), max(len(answer) for _, *answers in pairs for answer in answers)
    for start in range(0, len(pairs), PAIRS):
        prompts, chosen, rejected = zip(*pairs[start : start + PAIRS], strict=True)
        ids = {"prompt": pad(prompts, widths[0], left=True), "chosen": pad(chosen, widths[1])}
        ids["rejected"] = pad(rejected, widths[1])
        masks = {f"{name}_mask": (array != workloads.PAD_ID).astype(np.int32) for name, array in ids.items()}
        yield {f"{name}_ids": array for name, array in ids.items()} | masks


def run_tunix(folder: str, long_prompts: bool, steps: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params as qwen3_params
    from tunix.sft import hooks
    from tunix.sft.dpo import dpo_trainer

    class Clock(hooks.TrainingHooks):
        """The reference is computed before ``on_train_step_start``: the time from one to the next is a whole step."""

        def __init__(self):
            self.times, self.losses = [], []

        def on_train_step_start(self, context):
            self.times.append(time.perf_counter())

        def on_train_step_end(self, context, *values):
            self.losses.append(float(values[-1]))

        on_train_start = on_train_end = on_eval_step_start = on_eval_step_end = lambda self, *values: None

    batches = list(pad_pairs(workloads.preference_pairs(PAIRS * steps, LENGTH, long_prompts)))
    sizes = {"embed_dim": "hidden", "hidden_dim": "mlp", "num_layers": "layers", "vocab_size": "vocab"}
    sizes |= {"num_heads": "heads", "num_kv_heads": "kv_heads", "head_dim": "head_dim"}
    config = qwen3.ModelConfig(
        **{name: workloads.TINY[of] for name, of in sizes.items()},
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        remat_config=qwen3.RematConfig.NONE,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    mesh, clock = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp")), Clock()
    with mesh:
        load = lambda: qwen3_params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)
        arguments = dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=10**9, max_steps=steps, beta=BETA, max_inflight_computations=1
        )
        trainer = dpo_trainer.DPOTrainer(load(), load(), optax.adamw(LEARNING_RATE, weight_decay=0.0), arguments)
        trainer.with_training_hooks(clock)
        trainer.train(iter([dpo_trainer.TrainingInput(**arrays) for arrays in batches]))
    seconds = np.diff(clock.times)[WARM_UP:]
    used = find_versions("google-tunix", "flax")
    return {"pairs_per_second": PAIRS * len(seconds) / seconds.sum(), "losses": clock.losses, "versions": used}


# --- all sides ---


def run_side(arguments) -> None:
    side, tunix_python = arguments.side, os.environ.get("TUNIX_PYTHON")
    if side == "tunix" and tunix_python and os.path.abspath(sys.executable) != os.path.abspath(tunix_python):
        os.execv(tunix_python, [tunix_python, *sys.argv])
    load, steps, found = workloads.Load(), STEPS[side], {}
    for name, long_prompts in WORKLOADS.items():
        if side == "trl":
            result = run_trl(arguments.model, long_prompts, steps)
        elif side == "tunix":
            result = run_tunix(arguments.model, long_prompts, steps)
        else:
            result = run_postrain(arguments.model, long_prompts, side == "postrain_lora", steps)
        found[name] = result
    workloads.emit(
        side=side,
        steps_per_second={name: round(result["pairs_per_second"] / PAIRS, 4) for name, result in found.items()},
        without_reference={
            name: round(result["without_reference"] / PAIRS, 4)
            for name, result in found.items()
            if "without_reference" in result
        },
        losses={name: [round(float(loss), 4) for loss in result["losses"][:4]] for name, result in found.items()},
        memory=next(iter(found.values())).get("memory", {}),
        peak_rss_gib=workloads.peak_rss_gib(),
        others_cpu_share=load.share(),
        versions=result["versions"],
    )


def summarize(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    rate = lambda side, name: statistics.median(run["steps_per_second"][name] for run in lines[side])
    heads = ["", *(f"updates of 8 pairs/s, {name} (lowest - highest)" for name in WORKLOADS)]
    heads += ["peak memory, GiB", "CPU taken by others"]
    table = [workloads.describe_machine(), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for side, runs in lines.items():
        cells = [side]
        for name in WORKLOADS:
            rates = [run["steps_per_second"][name] for run in runs]
            cells.append(f"{rate(side, name):.3f} ({min(rates):.3f} - {max(rates):.3f})")
        cells += [f"{max(run['peak_rss_gib'] for run in runs):.2f}"]
        cells += [f"{max(run['others_cpu_share'] for run in runs):.1%}"]
        table.append(f"| {' | '.join(cells)} |")
    later = {name: statistics.median(run["without_reference"][name] for run in lines["postrain"]) for name in WORKLOADS}
    short, long = WORKLOADS
    memory = {side: lines[side][0]["memory"] for side in ("postrain", "postrain_lora")}
    table += [
        "",
        f"postrain counts the pass of its reference as if every pair came once; in later epochs it makes "
        f"{later[short]:.3f} and {later[long]:.3f} updates/s. The largest array of its compiled step takes "
        f"{memory['postrain']['largest']:.0f} MiB, where [B, T, V] logits would take "
        f"{memory['postrain']['logits']:.0f}; with adapters the reference adds "
        f"{memory['postrain_lora']['of_reference']:.0f} MiB to a step, where a second model would add "
        f"{memory['postrain_lora']['model']:.0f}. {len(lines['postrain'])} interleaved rounds. "
        + describe_versions(lines),
    ]
    ratio = lambda side, name: rate("postrain", name) / rate(side, name)
    bars = [
        Bar("updates/s over TRL", ratio("trl", short), ">=", 4, "{:.2f}x"),
        Bar("with long prompts", ratio("trl", long), ">=", 6, "{:.2f}x"),
    ]
    if "tunix" in lines:
        bars.append(Bar("over Tunix", ratio("tunix", short), ">=", 3, "{:.2f}x"))
    full, lora, mebi = memory["postrain"], memory["postrain_lora"], "{:.0f} MiB"
    bars += [
        Bar("largest array beside [B, T, V] logits", full["largest"], "<", full["logits"] / 4, mebi),
        Bar("memory of the reference beside a second model", lora["of_reference"], "<", lora["model"] / 2, mebi),
    ]
    return "\n".join(table), bars


if __name__ == "__main__":
    run_in_turns(make_parser(__doc__), "preference", SIDES, run_side, summarize)
