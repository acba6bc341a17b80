"""Executes toy_appendix.ipynb with the Python that runs this script, without a browser.

python tests/toy/run_notebook.py                    check that it runs, in the fast setting; writes nothing
python tests/toy/run_notebook.py --setting cpu      the same in the setting of the saved outputs (about 5 minutes)
python tests/toy/run_notebook.py --setting cpu --write
                                                    renew the saved outputs and the README's figure
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "toy_appendix.ipynb"
FIGURE = ROOT / "docs" / "images" / "toy.png"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class ThisPython(KernelSpecManager):
    """Starts kernels with the running interpreter. A registered "python3" may belong to another environment."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(
            argv=[*command, "--HistoryManager.enabled=False", "--log-level=ERROR"],
            display_name="Python 3",
            language="python",
        )


def execute(notebook: nbformat.NotebookNode, setting: str, timeout: int = 3600) -> nbformat.NotebookNode:
    """The notebook with the outputs of one run in `setting`, as if opened in the repository's root.

    Raises nbclient.exceptions.CellExecutionError where a cell fails, its assertions included; TimeoutError where a
    cell takes longer than `timeout` seconds.
    """
    manager = AsyncKernelManager(kernel_spec_manager=ThisPython())
    client = NotebookClient(
        notebook, km=manager, timeout=timeout, record_timing=False, resources={"metadata": {"path": str(ROOT)}}
    )
    # Not the matplotlib back end that a test run or a server may have chosen: the inline one.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    executed = client.execute(env=environment | {"NEON_TOY": setting})
    executed.metadata = nbformat.from_dict(METADATA)  # without the kernel's version of Python
    return executed


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    """The cells that carry a tag, in order."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def readme_figure(notebook: nbformat.NotebookNode) -> bytes:
    """PNG shown by the one cell tagged `figure`."""
    (cell,) = tagged(notebook, "figure")
    (output,) = cell.outputs
    return base64.b64decode(output.data["image/png"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=["fast", "cpu", "full"], default="fast")
    parser.add_argument(
        "--write", action="store_true", help="save the outputs in the notebook, and the README's figure"
    )
    arguments = parser.parse_args()

    start = time.monotonic()
    notebook = execute(nbformat.read(NOTEBOOK, as_version=4), arguments.setting)
    if arguments.write:
        nbformat.write(notebook, NOTEBOOK)
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        FIGURE.write_bytes(readme_figure(notebook))
    print(f"{NOTEBOOK.name}, setting {arguments.setting}: all cells ran in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
