"""Makes observations.npz, which is kept beside it: the paper's first synthetic problem, 1,024 of each view."""

from pathlib import Path

import numpy as np

from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.separation.result import save_npz

problem = manifold_problem(seed=0, count=1024)
arrays = {}
for view in problem.views:
    arrays[f"{view.name}/y"] = np.asarray(view.observations, np.float32)
    matrix = next(iter(view.operators.values())).matrix  # the same for all sources of a view
    arrays[f"{view.name}/A"] = np.asarray(matrix, np.float32)
save_npz(Path(__file__).with_name("observations.npz"), arrays)
