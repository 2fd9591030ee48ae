"""State a problem in a YAML file: sources, views of their mixtures, and the settings of a fit.

    y_i = Σ_β A_i^{αβ} x_i^β + η_i          (view α, observation i, source β)

    sources:
      background: [5]                           # x^β: the shape of one draw
      signal: {shape: [8, 8]}
    views:
      mixed:
        observations: {file: data.npz, key: y}  # y_i, stacked along the first axis
        operators:                              # A^{αβ}: one per source that the view sees
          background: {dense: data.npz:A}
          signal: {compose: [{block_average: {factor: 2}}, {convolve: psf.npy}]}
        noise: {diagonal: data.h5:/variance}    # Σ; a number is the std of isotropic noise
        mask: data.zarr:mask                    # or "nan", or {flags: data.npz:flags, bad: [1, 8]}
        group: pair                             # views of one group are of the same draws
        truth: {signal: data.npz:x}
        held_out: data.npz:test                 # 1 for observations that are kept from training
    fit: {seed: 1, mixture: {components: 16}}

An array is `file.npz:key`, `file.npy`, `file.h5:/dataset`, `file.zarr:path` (relative to the folder
of the YAML file), a number or a list, or in a format of a field, such as `file.fits:unit` (`load_array`,
docs/formats.md).
The input shape of an operator follows from its source; in `compose` the last acts first, and its output
shape feeds the one before. Every error starts with the file and the position in it, as in
`problem.yaml: views.mixed: unknown key 'nose'; …`.
"""

from dichroic.io.arrays import load_array as load_array
from dichroic.io.new_view import load_view as load_view
from dichroic.io.new_view import open_view as open_view
from dichroic.io.problem_file import load_problem as load_problem
from dichroic.io.run_problem import check_saved as check_saved
from dichroic.io.run_problem import problem_of as problem_of
from dichroic.problem.lazy_view import LazyView as LazyView
from dichroic.problem.summary import summary_rows as summary_rows
