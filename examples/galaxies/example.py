"""Real galaxies: learned from stamps of HST COSMOS and simulated sky, then taken out of sky and out of blends.

    python examples/galaxies/example.py --data-dir DATA     # DATA/galaxies/*.fits, hsc_cosmos_35.npz

Writes `data.npz` beside `problem.yaml`, fits that (an interrupted fit goes on where it was), and scores held-out
galaxies over simulated sky, of which the truth is known; then blends of two held-out galaxies, and a real scene of
the Hyper Suprime-Cam in five bands, which has no truth. Tables, figures and the report page go to `--out`.
"""

import argparse
from pathlib import Path

import numpy as np

from dichroic import Separator
from dichroic.benchmark.problems import blends, galaxies
from dichroic.diagnostics.report import write_report
from dichroic.io import load_problem
from dichroic.metrics import coverage, output_snr
from dichroic.runtime.tables import text_table
from dichroic.separation.result import save_npz

HERE = Path(__file__).parent
DRAWS = 64


def row(name: str, truth: np.ndarray, estimate: np.ndarray, inside: str = "") -> list[str]:
    """A line of a table: dB, the error of the whole flux, its bias, and what intervals hold."""
    flux = estimate.sum((1, 2)) / truth.sum((1, 2)) - 1
    score = output_snr(estimate, truth).mean()
    return [name, f"{score:.2f}", f"{np.abs(flux).mean():.3f}", f"{flux.mean():+.3f}", inside]


def table(
    truth: np.ndarray, own: np.ndarray, draws: np.ndarray, others: dict[str, np.ndarray]
) -> str:
    """Scores of images `(n, H, W)`, where they were seen (0 elsewhere).

    True images have noise themselves, of standard deviation `own`: intervals are of the draws with as much, and no
    answer can score more than without it.
    """
    noise = own * np.random.default_rng(0).normal(
        size=draws.shape
    )  # intervals are of single pixels
    where = own > 0
    hold = coverage((draws + noise)[:, where], truth[where], level=0.9)
    most = 10 * np.log10(np.sum(truth**2, (1, 2)) / np.sum(own**2, (1, 2))).mean()
    rows = [
        row("dichroic, posterior mean", truth, draws.mean(0), f"{100 * hold.value:.1f}%"),
        row("dichroic, one draw", truth, draws[0]),
        *(row(name, truth, x) for name, x in others.items()),
        ["the most, for the noise of true images", f"{most:.2f}", "", "", ""],
    ]
    return text_table(["", "dB", "flux error", "bias", "90% hold"], rows)


def held_out(separator: Separator, arrays: dict, data_dir: str | None, out: Path) -> None:
    """Galaxies that the fit has not seen, over simulated sky."""
    view, truth, own = galaxies.held_out_view(data_dir=data_dir)
    result = separator.separate(view, n_draws=DRAWS)
    seen = view.operators["galaxy"].each(result.draws["galaxy"]) * view.mask
    others = {
        "Wiener filter, mean spectra": galaxies.wiener(view, arrays),
        "the stamp as it is": view.observations,
    }
    scores = table(truth["galaxy"], own[:, None, None] * view.mask, seen, others)
    print(f"\n{len(own)} held-out galaxies over simulated sky\n{scores}")
    columns = {
        "observed": view.observations,
        "galaxy": truth["galaxy"],
        "posterior mean": seen.mean(0),
        "a draw": seen[0],
        "std": seen.std(0),
        "neighbour": truth["sky"],
        "sky, mean": result.mean["sky"] * view.mask,
    }
    gallery(columns, range(6), out / "held-out.png")


def two_galaxies(separator: Separator, data_dir: str | None, out: Path) -> None:
    """Blends of two: each is a source of the kind that was learned."""
    view, truth, own = blends.blend_view(data_dir=data_dir)
    result = separator.with_sources(dict.fromkeys(truth, "galaxy")).separate(view, n_draws=DRAWS)
    seen = {k: view.operators[k].each(x) for k, x in result.draws.items()}
    both = lambda images, axis=0: np.concatenate([images[k] for k in truth], axis)
    others = {"the blend as it is": np.concatenate([view.observations] * 2)}
    scores = table(both(truth), both(own), both(seen, 1), others)
    print(f"\n{len(view.observations)} blends of two held-out galaxies\n{scores}")
    columns = {"observed": view.observations}
    for k in truth:
        columns |= {k: truth[k], f"{k}, mean": seen[k].mean(0), f"{k}, std": seen[k].std(0)}
    gallery(columns, range(6), out / "blends.png")


def real_scene(separator: Separator, data_dir: str | None, out: Path) -> None:
    """Seven objects in five bands."""
    scene = blends.load_scene(data_dir)
    view = blends.scene_view(scene)
    kinds = dict.fromkeys(view.operators, "galaxy")
    result = separator.with_sources(kinds).separate(view, n_draws=DRAWS)
    seen = {k: view.operators[k].each(x) for k, x in result.draws.items()}
    rows = []
    for k, x in seen.items():
        flux = x.sum((2, 3))
        cells = [f"{m:.2f} ± {s:.2f}" for m, s in zip(flux.mean(0), flux.std(0), strict=True)]
        rows.append([k, *cells])
    print("\nHyper Suprime-Cam, flux by band\n" + text_table(["", *scene.bands], rows))
    print(f"χ²/M by band: {', '.join(f'{c:.2f}' for c in result.chi2.mean(0))}")
    model = sum(x.mean(0) for x in seen.values())
    columns = {"observed": scene.images, "model": model, "residual": scene.images - model}
    columns |= {k: x.mean(0) for k, x in seen.items()}
    gallery(columns, range(len(scene.bands)), out / "scene.png", scale=3)


def new_galaxies(separator: Separator, arrays: dict, data_dir: str | None, out: Path) -> None:
    """Samples of the prior, as the camera would see them, beside stamps."""
    _, camera = galaxies.load_galaxies(data_dir)
    drawn = camera.look(4.0).each(separator.sample_prior("galaxy", 30))
    stamps = (arrays["galaxy"] * 4 / arrays["amplitude"][:, None, None])[::20]
    split = lambda images, name, first: {f"{name} {i + first}": images[i:30:5] for i in range(5)}
    columns = {"stamp 1": stamps[30:], **split(stamps, "stamp", 2), **split(drawn, "new", 1)}
    gallery(columns, range(6), out / "prior.png")


def gallery(columns: dict, rows, path: Path, *, scale: float = 4) -> None:
    """Images side by side, by name, in units in which the noise of the first is even: `arcsinh(x / scale)`."""
    from matplotlib.figure import Figure

    rows, first = list(rows), next(iter(columns.values()))
    figure = Figure(figsize=(1.25 * len(columns), 1.25 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, at in zip(rows, axes, strict=True):
        seen = np.abs(first[i][first[i] != 0])
        unit, top = scale * np.median(seen), np.arcsinh(seen.max() / np.median(seen) / scale)
        for axis, (name, images) in zip(at, columns.items(), strict=True):
            axis.imshow(np.arcsinh(images[i] / unit), vmin=-0.3, vmax=top, origin="lower")
            axis.set(xticks=[], yticks=[])
            if i == rows[0]:
                axis.set_title(name, fontsize=8)
    figure.savefig(path, dpi=72)


def main() -> None:
    """Data, fit, three tables, the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="the folder with galaxies/; by default $DICHROIC_DATA")
    parser.add_argument("--out", type=Path, default=Path("galaxies-out"))
    args = parser.parse_args()
    arrays = galaxies.galaxy_arrays(data_dir=args.data_dir)
    save_npz(HERE / "data.npz", arrays)
    problem, settings = load_problem(HERE / "problem.yaml")
    separator = Separator(problem, settings).fit(args.out / "run", resume=True)
    held_out(separator, arrays, args.data_dir, args.out)
    two_galaxies(separator, args.data_dir, args.out)
    real_scene(separator, args.data_dir, args.out)
    new_galaxies(separator, arrays, args.data_dir, args.out)
    page = write_report(args.out / "run", separator=separator, metrics=separator.metrics)
    print(f"\nfigures in {args.out}, report: {page}")


if __name__ == "__main__":
    main()
