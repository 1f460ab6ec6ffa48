"""docs/adding_an_objective.md, followed to the letter on a copy of the package."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import transformers
from tiny_models import make_tiny_model

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_an_objective.md").read_text(encoding="utf-8")
ANSWERS = ("a", "a longer answer of several words", "two words")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The workdir of the page's command, with the page's files."""
    folder = tmp_path_factory.mktemp("adding")
    shutil.copytree(ROOT / "postrain", folder / "postrain", ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(
        r"`(postrain/\S+\.py)`[^`]*?:\n\n```python\n(.*?)```", PAGE.replace("`make_program`", ""), re.DOTALL
    )
    assert [name for name, _ in files] == ["postrain/objectives/document_sft.py", "postrain/recipes/document_sft.py"]
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8")
    make_tiny_model(folder / "model", "llama", vocab_size=301)
    for name in ("train", "held_out"):
        rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": a}]} for a in ANSWERS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = re.search(r"```sh\npostrain (.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ").split()
    words = [word.replace("MODEL_DIR", "model").replace("configs/", f"{ROOT}/configs/") for word in command]
    few = ["--config.train.steps=1", "--config.data.sequence_length=64", "--config.data.batch_size=2"]
    few += ["--config.model.lora.rank=0", "--config.eval.generate_rows=0", "--config.optimizer.warmup_steps=0"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "postrain.cli", *words, *few]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_loss_is_the_mean_over_documents(followed):
    """Against the exported model's own likelihood of every answer, in transformers."""
    import torch

    lines = [json.loads(line) for line in (followed / "runs/documents/metrics.jsonl").read_text().splitlines()]
    export = followed / "runs/documents/export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    means, totals, lengths = [], [], []
    for answer in ANSWERS:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        render = lambda turns, **options: tokenizer.apply_chat_template(turns, tokenize=False, **options)
        prompt, whole = render(turns[:1], add_generation_prompt=True), render(turns)
        ids, start = (
            tokenizer(whole, add_special_tokens=False).input_ids,
            len(tokenizer(prompt, add_special_tokens=False).input_ids),
        )
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:end]])).logits[0, :-1].log_softmax(-1)
        own = -log_p.gather(1, torch.tensor(ids[1:end])[:, None])[start - 1 :, 0]
        means.append(own.mean().item())
        totals.append(own.sum().item())
        lengths.append(len(own))
    assert lines[-1]["eval/loss"] == pytest.approx(np.mean(means), rel=1e-4)
    assert lines[-1]["eval/nll"] == pytest.approx(sum(totals) / sum(lengths), rel=1e-4)
    assert abs(lines[-1]["eval/loss"] - lines[-1]["eval/nll"]) > 1e-4 and lines[-1]["train/weight"] == len(ANSWERS)
