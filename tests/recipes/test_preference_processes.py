"""KTO in two processes: the reference that they cache and the shift of an update are those of one process."""

from sft_runs import make_values, read_folder, read_lines, without_perf, write_config
from test_preference_unpaired import write_answers
from test_sft_processes import one_of_one, run


def test_two_processes_cache_one_reference_and_train_as_one_does(inputs, tmp_path):
    data = {"train": str(write_answers(tmp_path / "train.jsonl", 37)), "eval": [], "batch_size": 8, "packing": "none"}
    values = make_values(inputs, data=data, model={"lora": {"rank": 0}}, train={"steps": 5}, checkpoint={"every": 0})
    values |= {"recipe": "preference", "preference": {"loss": "kto", "reference": "cached"}}
    values |= {"optimizer": {"learning_rate": 1e-3}, "export": {"format": "none"}}
    config, folders = write_config(tmp_path / "c.py", values), {}
    for count, words in ((2, ["launch", "--target=local:2"]), (1, ["train", *one_of_one()])):
        folders[count] = tmp_path / f"run{count}"
        result = run(*words, f"--config={config}", f"--workdir={folders[count]}", devices=4 // count)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("log p of 37 documents under the starting model, once") == 1
    two, one = (read_folder(folder / "reference") for folder in folders.values())
    assert len(one) == 1 and two == one
    lines = [without_perf(read_lines(folder / "metrics.jsonl")) for folder in folders.values()]
    assert lines[0] == lines[1] and {line["train/weight"] for line in lines[0]} == {8.0}
