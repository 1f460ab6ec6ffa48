"""Host memory while a Hugging Face folder is loaded, over what the host's devices then hold.

    python tests/benchmarks/load.py --rounds 1 [--write]

On a CPU the devices' memory is the host's, so both count: the growth of the process's peak, the file's pages included.
"""

import os
import re

import workloads
from runner import Bar, describe_versions, find_versions, make_parser, run_in_turns

SIDES = {  # dtype on the devices, CPU devices, mesh
    "one device, float32": ("float32", 1, {}),
    "one device, bfloat16": ("bfloat16", 1, {}),
    "fsdp=4, tensor=2, float32": ("float32", 8, {"fsdp": 4, "tensor": 2}),
    "data=2, fsdp=4, bfloat16": ("bfloat16", 8, {"data": 2, "fsdp": 4}),
}
LAYERS, EXPERTS = 6, 8
HEADER = "| layout | devices hold | peak of the host over that | seconds | GB/s of the file |\n|---|---|---|---|---|"


def write_model(folder) -> None:
    """Qwen3-MoE in bfloat16, 0.9 G parameters, nearly all in three stacked tensors: the hardest for a loader."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=16384,
        hidden_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=5632,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    model.tie_weights()
    model.save_pretrained(folder)


def read_status(name: str) -> int:
    """A field of this process's memory in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) * 1024


def run_side(arguments) -> None:
    dtype, num_devices, sizes = SIDES[arguments.side]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
    import pathlib
    import time

    import jax

    from postrain.config import MeshConfig
    from postrain.hf.load import load_pretrained
    from postrain.sharding import make_mesh

    mesh = make_mesh(MeshConfig(**sizes)) if sizes else None
    jax.numpy.zeros(8).block_until_ready()
    before = read_status("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts from here
    load, start = workloads.Load(), time.perf_counter()
    _, params = load_pretrained(arguments.model, mesh=mesh, dtype=dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    held = sum(part.data.nbytes for leaf in jax.tree.leaves(params) for part in leaf.addressable_shards)
    size = sum(file.stat().st_size for file in pathlib.Path(arguments.model).glob("*.safetensors"))
    workloads.emit(
        held=held,
        ratio=(read_status("VmHWM") - before) / held,
        seconds=seconds,
        file=size,
        others_cpu_share=load.share(),
        versions=find_versions("jax"),
    )


def summarize(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    rows = []
    for side, runs in lines.items():
        best = min(runs, key=lambda run: run["seconds"])
        ratio = max(run["ratio"] for run in runs)
        rate = best["file"] / best["seconds"] / 1e9
        rows.append(f"| {side} | {best['held'] / 2**30:.2f} GiB | {ratio:.2f}x | {best['seconds']:.1f} | {rate:.2f} |")
    worst = max(run["ratio"] for runs in lines.values() for run in runs)
    text = "\n".join([workloads.describe_machine(), "", HEADER, *rows, "", describe_versions(lines)])
    return text, [Bar("peak of the host while loading, over what its devices hold", worst, "<=", 1.2, "{:.2f}x")]


if __name__ == "__main__":
    run_in_turns(make_parser(__doc__), "load", SIDES, run_side, summarize, prepare=write_model)
