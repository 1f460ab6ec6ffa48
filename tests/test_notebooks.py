"""The notebooks run, from the first cell to the last, on a reduced size."""

import pathlib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTRAIN_VARIANT", ":small")
    monkeypatch.setenv("POSTRAIN_WORKDIR", str(tmp_path / "run"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks without their outputs"
    kernel = {"path": str(ROOT / "notebooks")}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": kernel}).execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("step 2/2" in text for text in texts)
    assert sum("something light and funny" in text for text in texts) == 2
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
