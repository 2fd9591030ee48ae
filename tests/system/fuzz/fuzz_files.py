"""Coverage-guided fuzzing of every file that is read: `python tests/system/fuzz/fuzz_files.py [TARGET] -max_total_time=120`.

Needs atheris (`pip install atheris`), which is in no lock file. The first byte of an input says what is
done to the rest: of safetensors files the hash is made right again in half of the inputs, so that what comes
after it is reached. Anything but the contents that were saved or a `DichroicError` is a finding; so is
an input that takes longer than `-timeout` seconds or more memory than `-rss_limit_mb`.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dichroic", "yaml", "zipfile"]):
    import targets as fuzz

    from dichroic.errors import DichroicError


def main() -> None:
    """Fuzz the target named first, or all of them in turn by the second byte of the input."""
    warnings.simplefilter("ignore")
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    chosen = {k: t for k, t in fuzz.targets().items() if name in (None, k)}
    expected = {k: t.run(t.good) for k, t in chosen.items()}
    corpus = Path(tempfile.mkdtemp())
    for i, (label, target) in enumerate(chosen.items()):
        (corpus / label).write_bytes(bytes([0, i]) + target.good)
        (corpus / f"{label}-resealed").write_bytes(bytes([1, i]) + target.good)

    def one(data: bytes) -> None:
        if len(data) < 2:
            return
        label = list(chosen)[data[1] % len(chosen)]
        target, content, sealed = chosen[label], data[2:], chosen[label].sealed
        if data[0] % 2 and target.name.endswith(".safetensors"):
            content, sealed = fuzz.resealed(content), False
        if content is None:
            return
        try:
            found = target.run(content)
        except DichroicError:
            return
        if sealed and found != expected[label]:
            raise AssertionError(f"{label}: loaded something else than what was saved")

    options = ["-rss_limit_mb=4096", "-timeout=20", "-max_len=16384", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
