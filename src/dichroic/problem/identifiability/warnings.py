"""What is wrong with the views of a problem, in words, and what to do about it."""

from collections.abc import Iterator, Sequence

import numpy as np

from dichroic.problem.identifiability.kernel import Kernel
from dichroic.problem.identifiability.result import SourceIdentifiability

Counts = dict[tuple[str, ...], tuple[int, int]]

_SEE_ALONE = "add a view that sees one of them alone or with another weight"
_SEE_MORE = "add a view that sees more of it, or observations with other operators"


def warnings_of(
    results: Sequence[SourceIdentifiability],
    means: Kernel,
    covariances: Kernel,
    lacking: Counts,
    short: Counts,
    exact: bool,
) -> tuple[str, ...]:
    """Sentences about every source that is not identified, or weakly.

    `lacking` and `short` are `(equations, unknowns)` of sources with too few equations, all of them
    and those that a probe found nothing wrong with.
    """
    kind = "" if exact else "probed "
    return (
        *_lacking(lacking),
        *_short(short),
        *_unseen(results, covariances, kind),
        *_confusion([s.name for s in results], means, covariances, kind),
        *_weak(results),
    )


def _lacking(lacking: Counts) -> Iterator[str]:
    for (name, *others), (equations, unknowns) in lacking.items():
        if not others:
            yield (
                f"source {name!r}: its covariance has {unknowns} entries, but those of the views "
                f"that see it only {equations}; {_SEE_MORE}"
            )


def _short(short: Counts) -> Iterator[str]:
    for group, (equations, unknowns) in short.items():
        yield (
            f"sources {_listed(group)}: their covariances have {unknowns} entries together, but "
            f"those of the views that see them only {equations}: not all can be identified, though "
            f"a probe found nothing wrong; {_SEE_ALONE}"
        )


def _unseen(
    results: Sequence[SourceIdentifiability], covariances: Kernel, kind: str
) -> Iterator[str]:
    for s, part in zip(results, covariances.parts, strict=True):
        if part.unseen:
            yield (
                f"source {s.name!r}: the views see only {part.size - part.unseen} of the "
                f"{part.size} {kind}dimensions of its covariance; {_SEE_MORE}"
            )


def _confusion(names: list[str], means: Kernel, covariances: Kernel, kind: str) -> Iterator[str]:
    groups = covariances.groups()
    for group in groups:
        yield _confused_group([names[k] for k in group], group, covariances, kind)
    for group in means.groups():
        if not any(set(group) <= set(told) for told in groups):
            yield (
                f"sources {_listed([names[k] for k in group])}: their means cannot be distinguished, "
                "though their covariances can; add a view that sees one of them alone"
            )


def _confused_group(names: list[str], group: list[int], kernel: Kernel, kind: str) -> str:
    if kernel.same[np.ix_(group, group)].all():
        scales = kernel.scales[group]
        total = "their sum" if np.ptp(scales) < 1e-3 * scales.max() else "one weighted sum of them"
        return (
            f"sources {_listed(names)} enter every view through the same operator: only {total} "
            f"can be learned; {_SEE_ALONE}"
        )
    parts = zip(names, (kernel.parts[k] for k in group), strict=True)
    shares = [f"{p.undetermined - p.unseen} of {p.size} for {n!r}" for n, p in parts]
    return (
        f"sources {_listed(names)} cannot be distinguished in some {kind}dimensions of their "
        f"covariances ({', '.join(shares)}); {_SEE_ALONE}"
    )


def _weak(results: Sequence[SourceIdentifiability]) -> Iterator[str]:
    for s in results:
        if s.verdict == "weakly identified":
            yield (
                f"source {s.name!r} is weakly identified (condition number {s.condition:.1e}): it "
                "takes very many observations to learn; add a view that sees it alone or with more "
                "weight"
            )


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(n) for n in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"
