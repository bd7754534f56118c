"""Contract C36: the report of sharded and replicated models is that of one process."""

import warnings

import pytest

from layouts import LAYOUTS, WHOLE_BATCH_LAYOUTS, method, network, plain, run
from ranks import start_ranks


def measures(layout):
    """Return the measures that do not depend on a rank's share of the batch."""
    model = LAYOUTS[layout](network()) if layout else plain(network())
    optimizer = method("sam")(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_shard_tensor.*|.*redistribut.*")
        run(model, optimizer, range(2), whole_batch=not layout or layout in WHOLE_BATCH_LAYOUTS)
    report = optimizer.report()
    return report.weight_norm, report.length_in_rho, report.cosine, report.gradient_difference


@pytest.mark.parametrize("layout", LAYOUTS)
def test_c36_report_in_every_layout_is_that_of_one_process(layout):
    expected = measures(None)
    assert expected[1] == pytest.approx(1.0, rel=1e-3)
    for found in start_ranks()(measures, layout):
        assert found == pytest.approx(expected, rel=1e-6)
