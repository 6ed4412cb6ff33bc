"""What is read of the harness' files."""

import math

from dpo_ray.orchestration.benchmarks_job import scores_of


def test_scores_have_their_interval() -> None:
    results = {
        "results": {
            "ifeval": {"alias": "ifeval", "strict,none": 0.5, "strict_stderr,none": 0.1, "inst,none": 0.25},
            "gsm8k": {"exact,flexible": 0.75, "exact_stderr,flexible": "N/A"},
        },
        "n-samples": {"ifeval": {"original": 541, "effective": 25}},
    }
    found = scores_of(results)
    assert list(found) == ["ifeval strict", "ifeval inst", "gsm8k exact (flexible)"]
    strict = found["ifeval strict"]
    assert (strict.value, strict.num) == (0.5, 25)
    assert math.isclose(strict.high - 0.5, 0.1959964, rel_tol=1e-6)
    assert math.isclose(0.5 - strict.low, 0.1959964, rel_tol=1e-6)
    assert found["gsm8k exact (flexible)"].value == 0.75
    assert math.isnan(found["ifeval inst"].low)
    assert math.isnan(found["gsm8k exact (flexible)"].high)
