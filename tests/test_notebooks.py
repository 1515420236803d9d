"""The notebooks: what is committed is complete and clean, and every one of them runs.

The first half reads the committed files and is fast. The second half executes every notebook from start to end and is
marked slow: `pytest -m slow tests/test_notebooks.py`. It runs in a temporary copy of the repository, with the
notebook's own folder as the working directory, so that nothing committed and nothing of the user's is touched.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="reading notebooks needs nbformat, which comes with jupyter")
nbclient = pytest.importorskip("nbclient", reason="executing notebooks needs nbclient (requirements-test.txt)")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NAMES = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS]
MAX_BYTES = 500_000

# /home/... and the like, and C:\Users\...; not and/or, not https://example.org/home/x, not ../tmp/x
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:work|root|home|tmp|Users|usr|opt|mnt|private|var)/|[A-Za-z]:\\+Users\\")


def text_of(output):
    """All text of one output: stream, traceback, and every representation but the base64 ones."""
    yield from (output.get("text", ""), *output.get("traceback", []))
    for kind, data in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            yield data if isinstance(data, str) else str(data)


def problems(notebook):
    """Everything that must not be in a committed notebook, as a list of sentences."""
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not executed once from top to bottom: execution counts {counts}")
    if not any(cell.outputs for cell in cells):
        found.append("no cell has an output")
    for i, cell in enumerate(cells, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {i} ends in {output.ename}: {output.evalue}")
            for match in filter(None, map(MACHINE_PATH.search, text_of(output))):
                found.append(f"an output of code cell {i} shows a path of somebody's machine: {match.group()!r}")
    for cell in notebook.cells:
        if match := MACHINE_PATH.search(cell.source):
            found.append(f"a cell names a path of somebody's machine: {match.group()!r} in {cell.source[:60]!r}")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    return found


def test_there_are_notebooks():
    assert "notebooks/01_ssd.ipynb" in NAMES and "notebooks/solutions/01_ssd_solutions.ipynb" in NAMES
    assert "notebooks/03_from_loop_to_triton.ipynb" in NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert path.stat().st_size < MAX_BYTES, f"{path.stat().st_size:,} bytes: lower the figures' dpi"


def good_notebook():
    v4 = nbformat.v4
    outputs = [v4.new_output("stream", name="stdout", text="2 and/or 3, see https://example.org/home/x and ../tmp/y\n")]
    outputs += [v4.new_output("display_data", data={"image/png": "iVBORw0K/tmp/home/"})]  # base64 may spell anything
    cells = [v4.new_code_cell("1 + 1", execution_count=1, outputs=outputs), v4.new_code_cell("2", execution_count=2)]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def spoil_count(nb):
    nb.cells[1].execution_count = 5


def spoil_never_run(nb):
    nb.cells[1].execution_count = None


def spoil_outputs(nb):
    nb.cells[0].outputs = []


def spoil_error(nb):
    nb.cells[1].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]


def spoil_path(nb):
    nb.cells[0].outputs[0].text = "saved in /home/ada/nano2/out\n"


def spoil_quoted_path(nb):
    nb.cells[1].outputs = [nbformat.v4.new_output("execute_result", data={"text/plain": "PosixPath('/tmp/x')"})]


def spoil_windows_path(nb):
    nb.cells[0].outputs[0].text = "C:\\Users\\ada\\nano2\n"


def spoil_source(nb):
    nb.cells[1].source = "open('/root/x')"


def spoil_kernel(nb):
    nb.metadata.kernelspec.name = "venv39"


@pytest.mark.parametrize("spoil", [f for name, f in sorted(globals().items()) if name.startswith("spoil_")])
def test_problems_are_found(spoil):
    notebook = good_notebook()
    assert problems(notebook) == []
    spoil(notebook)
    assert len(problems(notebook)) == 1


def tagged(path, tag):
    return [c.source for c in nbformat.read(path, as_version=4).cells if tag in c.metadata.get("tags", [])]


SOLUTIONS = [p for p in NOTEBOOKS if p.parent.name == "solutions"]


@pytest.mark.parametrize("path", SOLUTIONS, ids=[p.name for p in SOLUTIONS])
def test_solutions_are_held_to_the_same_checks(path):
    """A solutions notebook asserts the very checks that its notebook shows (where check cells carry a tag)."""
    exercises = path.parent.parent / path.name.replace("_solutions", "")
    shown, solved = tagged(exercises, "exercise-check"), tagged(path, "exercise-check")
    if not shown and path.name != "01_ssd_solutions.ipynb":
        pytest.skip(f"{exercises.name} does not tag its check cells")
    assert 2 <= len(shown) <= 3
    assert solved == [source + "\nassert done" for source in shown]
    assert tagged(exercises, "check-helper") == tagged(path, "check-helper") != []
    stubs, answers = tagged(exercises, "exercise"), tagged(path, "exercise")
    assert len(stubs) == len(answers) == len(shown) and all(s != a for s, a in zip(stubs, answers))


# ---------------------------------------------------------------------------------------------------------------------
# Execution
# ---------------------------------------------------------------------------------------------------------------------


def execute(notebook, folder):
    """Run every cell with this very interpreter; raises nbclient's CellExecutionError at the first cell that fails."""
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return notebook


@pytest.fixture
def clean_environment(tmp_path, monkeypatch):
    """Small sizes, no network libraries going online, and no settings or start-up files of the user's own."""
    monkeypatch.setenv("NANO2_FAST", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a notebook must set it by itself
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment, not one of ~/.local
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # Agg would draw nothing into the notebook


@pytest.fixture
def repository_copy(tmp_path):
    """The repository without its history, environments, caches and results."""
    skip = shutil.ignore_patterns(".*", "__pycache__", "out", "venv", "env", "node_modules")
    return Path(shutil.copytree(ROOT, tmp_path / "nano2", ignore=skip))


@pytest.mark.slow
def test_the_kernel_is_this_interpreter(clean_environment, tmp_path):
    cell = nbformat.v4.new_code_cell("import sys, torch; print(sys.prefix)")
    executed = execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    assert executed.cells[0].outputs[0].text.strip() == sys.prefix


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, clean_environment, repository_copy):
    if "triton" in name:
        pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    path = repository_copy / name
    committed = (ROOT / name).read_bytes()
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # nothing of the committed run may pass for this one
    execute(notebook, path.parent)
    errors = [p for p in problems(notebook) if "path of somebody's machine" not in p]  # it runs in a temporary folder
    assert errors == []
    assert (ROOT / name).read_bytes() == committed
