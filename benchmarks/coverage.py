"""How often does a 95 % interval of AUC hold the truth, if patches belong to patients?

    python -m benchmarks.coverage --rounds=1000 --out=results/coverage.json

Simulates studies: patients of whom 40 % are positive, each with some patches. The score of a patch
is 1.2 for a positive patient, plus a part of the patient and a part of the patch, both N(0, 1). The
true AUC of a positive and a negative patch is Phi(1.2 / 2) = 0.7257. The intervals are those of
`cv_jax.learn.diagnostics.estimates`, over patients and over patches.
"""

import numpy as np
from scipy.stats import norm

from benchmarks.machine import make_parser, save
from cv_jax.learn.diagnostics import auc, estimates

SHIFT = 1.2


def coverage(studies: int, patients: int, patches: int, resamples: int) -> dict[str, float]:
    """Returns the share of the studies whose interval, over patients or patches, has the truth."""
    truth = norm.cdf(SHIFT / 2)
    hits = {"patients": 0, "patches": 0}
    for study in range(studies):
        rng = np.random.default_rng(study)
        patient = np.repeat(np.arange(patients), patches)
        positive = patient < 0.4 * patients
        score = (
            SHIFT * positive + rng.normal(size=patients)[patient] + rng.normal(size=len(patient))
        )
        for name, group in (("patients", patient), ("patches", None)):
            found = estimates({"auc": auc}, score, positive, group, resamples, seed=study)["auc"]
            hits[name] += found.low <= truth <= found.high
    return {name: count / studies for name, count in hits.items()}


def main() -> None:
    """Reads the command line, prints the coverage for few and many patients, and saves it."""
    args = make_parser(__doc__, rounds=1000).parse_args()
    rows = []
    for patients in (15, 30, 60):
        size = {"patients": patients, "patches": 12, "resamples": 500}
        rows.append({**size, **{f"over {k}": x for k, x in coverage(args.rounds, **size).items()}})
        print(rows[-1], flush=True)
    save("coverage", args, {"truth": float(norm.cdf(SHIFT / 2)), "rows": rows})


if __name__ == "__main__":
    main()
