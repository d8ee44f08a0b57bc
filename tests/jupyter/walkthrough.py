"""The walkthrough notebook in a folder where it may write, shortened where a test has no time for all of it."""

import nbformat

NAME = "en/qlora_walkthrough.ipynb"
STEPS = 200


def copy(repository, folder, steps=STEPS, extra=()):
    """A copy in `folder/notebooks/en`, beside the data and the model; `extra` code cells go to its end. Its path."""
    notebooks = folder / "notebooks"
    (notebooks / "en").mkdir(parents=True)
    for name in ("data", "models"):
        (notebooks / name).symlink_to(repository / "notebooks" / name)
    notebook = nbformat.read(repository / "notebooks" / NAME, as_version=4)
    for cell in notebook.cells:
        for word in ("max_steps: {},", "checkpoint-{}"):
            cell.source = cell.source.replace(word.format(STEPS), word.format(steps))
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if not all(any(word in cell.source for cell in notebook.cells) for word in (f"max_steps: {steps},", f"-{steps}")):
        raise ValueError(f"{NAME} no longer trains {STEPS} steps: tell tests/jupyter/walkthrough.py")
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in extra]
    path = notebooks / NAME
    nbformat.write(notebook, path)
    return path
