"""Methods compared on problems with known answers: accuracy, calibration, time and memory.

names     what can be asked for, and the sizes of a benchmark (no JAX)
problems  a name as observations to learn from, held-out ones, and the truth
methods   a name as something that fits, separates and samples; `limit` is the exact posterior
scores    numbers from draws and truths
job       one problem, method and seed, in a process of its own
runner    all of them, those that are not done yet
results   what is finished in a folder, and its statistics over seeds
cells     tables render   the statistics as text, Markdown, HTML and a figure

OUT/<problem>/<method>/seed<N>/job.json        what is asked for
                               fit/            the run of the fit
                               heldout.npz     truth/<source>, draw/<source>
                               result.json     written last; failed.json instead if it failed
OUT/results.json, table.md, table.html, table.png
"""
