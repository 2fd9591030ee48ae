"""Earthquakes in the noise of their stations: learn both, and denoise records that the fit has not seen.

    python examples/earthquakes/example.py --data-dir DATA

`DATA/signals/seismic.npz` holds the records (see `dichroic.benchmark.problems.seismic`). Writes `data.npz`, to
which `problem.yaml` refers, and a run folder with the report; started again, it goes on where it was.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dichroic.benchmark.problems import seismic
from dichroic.benchmark.problems.seismic_baselines import (
    average_noise,
    band_passed,
    best_band,
    wiener,
)
from dichroic.diagnostics.plots import colour, png
from dichroic.diagnostics.report import write_report
from dichroic.io import load_problem, load_view
from dichroic.metrics import coverage, output_snr
from dichroic.problem.problem import Problem
from dichroic.runtime.tables import text_table
from dichroic.separation.result import save_npz
from dichroic.separation.separator import Separator

HERE = Path(__file__).parent
SNR = (0, 5, 10)  # dB
DRAWS = 32
SECONDS = 8  # of the windows in the figure


def denoise(separator: Separator, problem: Problem, parts: seismic.Tiles, seed: int) -> np.ndarray:
    """Posterior draws of the signals, `(DRAWS, n, samples)`."""
    operators = {"noise": "identity", "signal": {"diagonal": parts.gain}}
    view = load_view({"observations": parts.y, "operators": operators}, problem, like="after")
    result = separator.separate(view, n_draws=DRAWS, seed=seed)
    return parts.waveforms(result.draws["signal"])


def answers(
    mixture, known, train: seismic.Traces, level: np.ndarray, band
) -> dict[str, np.ndarray]:
    """Each baseline's estimate of the signals, `(n, samples)`."""
    own, average = seismic.noise_level(known), average_noise(train, known)
    spectrum = np.sqrt(np.mean(level**2, axis=0, keepdims=True)) * np.ones_like(level)
    return {
        "Wiener, average envelope and spectrum, own noise": wiener(mixture, own, level),
        "Wiener, average spectrum, own noise": wiener(mixture, own, spectrum),
        "Wiener, average spectrum, average noise": wiener(mixture, average, spectrum),
        f"band-pass, {band[0]:g} to {band[1]:g} Hz": band_passed(mixture, band),
        "as observed": mixture,
    }


def figure(mixtures, truths, draws) -> Figure:
    """For each SNR some windows: what is observed, and the signal with its 90% band."""
    page = Figure(figsize=(9, 5.4), layout="constrained")
    axes = page.subplots(len(SNR), 2, sharex=True)
    samples = slice(0, SECONDS * seismic.RATE)
    time = np.arange(seismic.WINDOW)[samples] / seismic.RATE
    for row, dB, y, x, w in zip(axes, SNR, mixtures, truths, draws, strict=True):
        low, high = np.quantile(w, [0.05, 0.95], axis=0)
        row[0].plot(time, y[samples], color="0.35", lw=0.8)
        row[0].set_ylabel(f"{dB} dB")
        row[1].fill_between(
            time, low[samples], high[samples], color=colour(1), alpha=0.4, lw=0, label="90% band"
        )
        row[1].plot(time, x[samples], color="black", lw=0.8, label="truth")
        row[1].set_ylim(row[0].get_ylim())
        for axis in row:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_yticks([])
    axes[0, 0].set_title("observed", fontsize=10, loc="left")
    axes[0, 1].legend(ncols=2, fontsize=9, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    for axis in axes[-1]:
        axis.set_xlabel("seconds after the P arrival")
    return page


def main() -> None:
    """Prepare, fit, denoise, score, report."""
    parser = argparse.ArgumentParser(description="Denoise seismic records with learned priors.")
    parser.add_argument("--data-dir", help="the folder that has signals/seismic.npz")
    parser.add_argument("--out", type=Path, default=HERE / "run", help="the run folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, test = seismic.split_records(seismic.load_traces(args.data_dir), args.seed)
    arrays = seismic.training_arrays(train, args.seed)
    save_npz(HERE / "data.npz", arrays)
    problem, settings = load_problem(HERE / "problem.yaml")
    settings["seed"] = args.seed
    separator = Separator(problem, settings).fit(args.out, resume=True)

    band = best_band(train, SNR, args.seed)
    rows, shown, inside = {}, [], {}
    made = seismic.injected(test, SNR, args.seed, per_signal=1)
    for dB, (mixture, truth, known) in zip(SNR, made, strict=True):
        parts = seismic.observed_tiles(mixture, known, arrays["level"])
        draws = denoise(separator, problem, parts, args.seed)
        found = {"dichroic, posterior mean": draws.mean(axis=0), "dichroic, one draw": draws[0]}
        found |= answers(mixture, known, train, arrays["level"], band)
        for name, estimate in found.items():
            rows.setdefault(name, []).append(f"{output_snr(estimate, truth).mean():.2f}")
        inside[dB] = coverage(draws, truth, level=0.9)
        i = 25 * len(shown) % len(truth)
        shown.append((mixture[i], truth[i], draws[:, i]))
    title = f"output SNR in dB, {len(made[0][0])} held-out windows, for an input of"
    print(text_table([title, *(f"{dB} dB" for dB in SNR)], [[k, *v] for k, v in rows.items()]))
    words = ", ".join(f"{100 * c.value:.1f}% at {dB} dB" for dB, c in inside.items())
    print(f"90% intervals that hold the truth: {words}")
    (args.out / "denoised.png").write_bytes(png(figure(*zip(*shown, strict=True))))
    page = write_report(
        args.out, separator=separator, metrics=separator.metrics, title="Earthquakes in noise"
    )
    print(f"figure: {args.out / 'denoised.png'}\nreport: {page}")


if __name__ == "__main__":
    main()
