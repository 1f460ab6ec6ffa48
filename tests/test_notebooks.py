"""The notebooks run, from the first cell to the last, on a reduced size."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """``run_notebook(name)`` -> what its cells print, as one text, and the notebook with its outputs."""
    monkeypatch.setenv("POSTRAIN_VARIANT", ":small")
    monkeypatch.setenv("POSTRAIN_WORKDIR", str(tmp_path / "run"))
    monkeypatch.delenv("MPLBACKEND", raising=False)

    def run(name):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks without their outputs"
        kernel = {"path": str(ROOT / "notebooks")}
        nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": kernel}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        return "\n".join(output.get("text", "") for output in outputs), outputs

    return run


def test_quickstart(run_notebook, tmp_path):
    text, _ = run_notebook("quickstart")
    assert "step 2/2" in text
    assert text.count("something light and funny") == 2
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_own_data(run_notebook, tmp_path):
    text, outputs = run_notebook("own_data")
    assert "step 2/2" in text and "trained tokens: " in text
    assert text.count("  before: ") == text.count("  after:  ") == 4
    pages = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(pages) == 2 and "trained token" in pages[0]  # the preview and the report
    assert (tmp_path / "run" / "run" / "export" / "model.safetensors").exists()


def test_models_and_adapters(run_notebook, tmp_path):
    text, _ = run_notebook("models_and_adapters")
    assert "134,515,008 parameters" in text and "float64" in text
    assert text.count("step 2/2") == 2
    assert "adapter_model.safetensors" in text
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()


def test_after_quickstart(run_notebook, tmp_path):
    text, outputs = run_notebook("after_quickstart")
    assert text.count("step 2/2") == 4 and "scores: " in text
    shown = [output["data"]["text/plain"] for output in outputs if "text/plain" in output.get("data", {})]
    assert any("rewards/margins" in line for line in shown) and any("agreement" in line for line in shown)
    for run in ("preference", "reward", "distill", "advantage"):
        assert (tmp_path / "run" / run / "export" / "model.safetensors").exists()
