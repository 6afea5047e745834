"""A simulated Kaggle: read-only inputs, a working folder, no network, a kernel that knows nothing of this checkout."""

import asyncio
import os
import shutil
import stat
import sys
from pathlib import Path

import nbformat

NO_NETWORK = '''
import sys


def refuse(event, args):
    """Everything but this machine is out of reach."""
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1"):
        raise OSError(f"no network: {args[1]}")
    if event == "socket.getaddrinfo" and args[0] not in (None, "", "localhost", "127.0.0.1", "::1"):
        raise OSError(f"no network: {args[0]}")


sys.addaudithook(refuse)
'''


def lay_out(root, built):
    """/kaggle below `root`: the built data set among the inputs, read-only, and an empty working folder."""
    target = Path(root) / "input" / "datasets" / "someone" / "the-kit"
    shutil.copytree(Path(built) / "dataset", target, ignore=shutil.ignore_patterns("dataset-metadata.json"))
    (Path(root) / "working").mkdir(parents=True)
    read_only(Path(root) / "input")
    return Path(root)


def read_only(folder, writable=False):
    """Take (or give back) the permission to write from a folder and all in it."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        bits = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
        path.chmod(path.stat().st_mode | stat.S_IWUSR if writable else path.stat().st_mode & ~bits)


def attach_output(root, name):
    """Save the working folder as the output of a version and attach it: an empty working folder, one input more."""
    root = Path(root)
    read_only(root / "input", writable=True)
    target = root / "input" / name
    shutil.copytree(root / "working", target, ignore=shutil.ignore_patterns(".lock", ".kernel.lock"))
    shutil.rmtree(root / "working")
    (root / "working").mkdir()
    read_only(root / "input")
    return target


def clean_environment(root, scratch, **more):
    """Environment of the kernel: nothing of this session's, no network, the simulated Kaggle."""
    scratch = Path(scratch)
    for name in ("home", "tmp", "guard"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    (scratch / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    return {"PATH": "/usr/bin:/bin", "HOME": str(scratch / "home"), "TMPDIR": str(scratch / "tmp"), "LANG": "C.UTF-8",
            "PYTHONPATH": str(scratch / "guard"), "PYTHONNOUSERSITE": "1", "SSL_KIT_KAGGLE": str(root),
            "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1", **more}


def run_notebook(built, root, scratch, python=sys.executable, cells=(), timeout_s=600, environment=None):
    """Execute the built notebook as Kaggle does, with `cells` added at its end; returns what it printed.

    The executed notebook is left in scratch/executed.ipynb. Raises nbclient's CellExecutionError.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient import NotebookClient

    class Kernel(AsyncKernelManager):
        """A kernel of the given Python."""

        @property
        def kernel_spec(self):
            return KernelSpec(argv=[str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                              display_name="", language="python")

    notebook = nbformat.read(next((Path(built) / "notebook").glob("*.ipynb")), as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    client = NotebookClient(notebook, timeout=timeout_s, kernel_manager_class=Kernel,
                            resources={"metadata": {"path": str(Path(root) / "working")}})
    environment = clean_environment(root, scratch) if environment is None else environment
    try:
        asyncio.run(client.async_execute(env=environment, cwd=str(Path(root) / "working")))
    finally:
        nbformat.write(notebook, Path(scratch) / "executed.ipynb")
    return "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code"
                   for output in cell.outputs)


def tree(folder):
    """Names, sizes and times of everything in a folder."""
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in Path(folder).rglob("*") if not os.path.islink(path)}
