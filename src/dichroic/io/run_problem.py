"""The problem that a run was fitted to, from the file that the run names, or where that has moved."""

from pathlib import Path

from dichroic.errors import RunError
from dichroic.io.problem_file import load_problem
from dichroic.problem.problem import Problem
from dichroic.runtime.records import read_record


def problem_of(run: Path, file: Path | None = None, *, probe: bool = True) -> Problem:
    """The problem of the run folder `run`, its arrays left in their files; of `file`, where that is given.

    Its operators are not probed unless `probe`.

    Raises `RunError` if `run` holds neither a run nor a model, or names no file that exists where none is given.
    """
    check_saved(run)
    if file is None and (run / "run.json").exists():
        named = read_record(run / "run.json").get("problem_file")
        file = Path(named) if isinstance(named, str) and named and "\0" not in named else None
        if file is not None and not file.is_file():
            raise RunError(
                f"the problem file of {run}, {file}, is not there any more: say where it is (--problem)"
            )
    if file is None:
        raise RunError(
            f"{run} does not know the problem file that it was fitted to: say where it is (--problem), "
            "or use Separator.load from Python"
        )
    return load_problem(file, stored=True, probe=probe)[0]


def check_saved(folder: Path) -> None:
    """Raise `RunError` unless `folder` holds a run or a saved model."""
    if not folder.is_dir():
        raise RunError(
            f"there is no folder {str(folder)!r}; expected a run folder or a saved model"
        )
    if not any((folder / name).exists() for name in ("run.json", "model.json")):
        raise RunError(
            f"{str(folder)!r} holds neither a run nor a saved model: no run.json, no model.json"
        )
