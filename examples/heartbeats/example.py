"""A weak, simulated heartbeat over a real one: learn both, and take the weak one out of time not seen.

    python examples/heartbeats/example.py --data-dir DATA

`DATA/signals/ecg.dat` holds the electrocardiogram (without it, SciPy fetches the same; see
`dichroic.benchmark.problems.ecg`). Writes `data.npz`, to which `problem.yaml` refers, and a run folder with the
report; started again, it goes on where it was.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dichroic.benchmark.baselines import second_moments, wiener
from dichroic.benchmark.problems import ecg
from dichroic.diagnostics.plots import colour, png
from dichroic.diagnostics.report import write_report
from dichroic.io import load_problem, load_view
from dichroic.metrics import coverage, mean_chi2, output_snr
from dichroic.problem.problem import joint_observations
from dichroic.problem.view import View
from dichroic.runtime.tables import text_table
from dichroic.separation.result import Separation, save_npz
from dichroic.separation.separator import Separator

HERE = Path(__file__).parent
DRAWS = 32
SHOWN = 4


def answers(view: View, alone: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Each baseline's estimate of the weak heartbeat, `(n, WINDOW)`."""
    y, beat = np.asarray(view.observations), alone.mean(axis=0)
    scaled = np.outer(y @ beat / (beat @ beat), beat)  # the average beat, fitted to each window
    moments = second_moments({"strong": alone, "weak": ecg.simulated_windows(seed, 20000)})
    linear = wiener(joint_observations([view]), moments)
    return {
        "Wiener, true moments of the weak heartbeat": linear["weak"],
        "average beat subtracted, scaled to each window": (y - scaled) / ecg.HEIGHT,
        "average beat subtracted": (y - beat) / ecg.HEIGHT,
        "as observed": y / ecg.HEIGHT,
    }


def figure(windows: ecg.Windows, result: Separation) -> Figure:
    """A few windows: what is observed, and both heartbeats with the 90% band of the weak one."""
    page = Figure(figsize=(9, 4.2), layout="constrained")
    axes = page.subplots(2, SHOWN, sharex=True, sharey="row")
    time = np.arange(-ecg.BEFORE, ecg.AFTER) / ecg.RATE
    for k, i in enumerate(np.linspace(0, len(windows.y) - 1, SHOWN, dtype=int)):
        low, high = np.quantile(ecg.HEIGHT * result.draws["weak"][:, i], [0.05, 0.95], axis=0)
        axes[0, k].plot(time, windows.y[i], color="0.35", lw=1, label="observed")
        strong = result.draws["strong"][:, i].mean(axis=0)
        axes[0, k].plot(time, strong, color=colour(0), lw=1, ls="--", label="strong, mean")
        axes[1, k].fill_between(
            time, low, high, color=colour(1), alpha=0.35, lw=0, label="weak, 90% band"
        )
        axes[1, k].plot(time, ecg.HEIGHT * windows.weak[i], color="black", lw=1, label="truth")
        axes[1, k].set_xlabel("seconds from the R peak", fontsize=9)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for row in axes:
        row[0].legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return page


def main() -> None:
    """Prepare, fit, separate, score, report."""
    parser = argparse.ArgumentParser(description="Separate two heartbeats with learned priors.")
    parser.add_argument("--data-dir", help="the folder that has signals/ecg.dat")
    parser.add_argument("--out", type=Path, default=HERE / "run", help="the run folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recording = ecg.load_ecg(args.data_dir)
    arrays = ecg.training_arrays(recording, args.seed)
    save_npz(HERE / "data.npz", arrays)
    problem, settings = load_problem(HERE / "problem.yaml")
    settings["seed"] = args.seed
    separator = Separator(problem, settings).fit(args.out, resume=True)

    windows = ecg.held_out_windows(recording, args.seed)
    view = load_view({"observations": windows.y.astype(np.float32)}, problem, like="both")
    result = separator.separate(view, n_draws=DRAWS, seed=args.seed)
    found = {
        "dichroic, posterior mean": result.mean["weak"],
        "dichroic, one draw": result.draws["weak"][0],
        **answers(view, arrays["alone"], args.seed),
    }
    rows = [
        [name, f"{output_snr(estimate, windows.weak).mean():.2f}"]
        for name, estimate in found.items()
    ]
    title = f"output SNR of the weak heartbeat, {len(windows.y)} held-out windows"
    print(text_table([title, "dB"], rows))
    truths = {"strong": windows.strong, "weak": windows.weak}
    inside = {k: coverage(result.draws[k], x, level=0.9) for k, x in truths.items()}
    words = ", ".join(f"{k} {100 * c.value:.1f}%" for k, c in inside.items())
    print(f"90% intervals that hold the truth: {words}; χ²/M {mean_chi2(result.chi2):.3f}")
    (args.out / "separated.png").write_bytes(png(figure(windows, result)))
    page = write_report(
        args.out, separator=separator, metrics=separator.metrics, title="Two heartbeats"
    )
    print(f"figure: {args.out / 'separated.png'}\nreport: {page}")


if __name__ == "__main__":
    main()
