"""toy_appendix.ipynb as a reader gets it: it runs, and its saved outputs are whole, clean and the README's."""

import re

import nbformat
import pytest
from toy.run_notebook import FIGURE, METADATA, NOTEBOOK, execute, readme_figure

PNG = b"\x89PNG\r\n\x1a\n"


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "stream")


@pytest.mark.slow
def test_all_cells_and_their_assertions_run_without_a_browser():
    """Twenty seconds: it trains 2 diffusion and 3 autoregressive models, and fine-tunes each several times."""
    executed = execute(read_notebook(), "fast", timeout=600)  # raises where a cell does
    assert "setting fast" in printed(executed)
    assert readme_figure(executed).startswith(PNG)


def test_saved_outputs_come_from_one_unbroken_run_in_the_cpu_setting():
    notebook = read_notebook()
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "setting cpu" in printed(notebook)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 10


def test_the_file_holds_nothing_of_the_machine_that_ran_it():
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    text = re.sub(r'"image/png": "[^"]*"', "", NOTEBOOK.read_text(encoding="utf-8"))
    assert not re.findall(r"(?<![\w.)])/(?:home|root|tmp|Users|work|usr|opt)/\S*|site-packages|[A-Z]:\\\\", text)


def test_the_figure_of_the_readme_is_the_one_in_the_notebook():
    assert FIGURE.read_bytes() == readme_figure(read_notebook())
