"""The choice of ring on the paper's own measurements (arXiv 2411.01783, table 4)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.select import RingHardware, RingMeasurement, RingStep, _switching_ratio, choose_ring, fit

# Llama 3 405B on 4 ranks, new and cached tokens together 128,000: new tokens, milliseconds of pass-KV and of pass-Q.
TABLE_4 = [
    (1280, 1023.39, 898.71),
    (3200, 1110.18, 1046.43),
    (4160, 1298.92, 1280.1),
    (6400, 1305.56, 1302.01),
    (12800, 2080.67, 2205.27),
    (25600, 3353.02, 3617.02),
    (38400, 4629.23, 4922.52),
    (51200, 5745.08, 6217.83),
    (64000, 6845.21, 7367.99),
    (76800, 7890.35, 8468.66),
    (89600, 8697.27, 9666.62),
    (102400, 10105.78, 10652.39),
    (115200, 11136.4, 11571.62),
    (128000, 11462.15, 12360.57),
]
# What the paper's table 5 says that its machines achieve.
PAPER = RingHardware(attention_flops=515e12, ring_bandwidth=25e9)


def step(new_tokens, cached_tokens, *, ranks=4, num_heads=128, num_kv_heads=8, **sizes):
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    return RingStep(new_tokens=new_tokens, cached_tokens=cached_tokens, ranks=ranks, **heads, **sizes)


MEASURED = [RingMeasurement(step(new, 128000 - new), pass_kv, pass_q) for new, pass_kv, pass_q in TABLE_4]


def right_and_worst(hardware):
    """(rows where the better variant is chosen, how much slower the choice is at worst)."""
    slower = [m.time(choose_ring(m.step, hardware).variant) / min(m.pass_kv, m.pass_q) - 1 for m in MEASURED]
    return slower.count(0.0), max(slower)


def test_the_stated_constants_choose_well_on_the_papers_table():
    right, worst = right_and_worst(PAPER)
    assert right >= 12
    assert worst < 0.02


def test_fitted_to_the_papers_table_every_row_is_right():
    assert right_and_worst(RingHardware(fit(MEASURED), 1.0)) == (14, 0.0)


def test_equation_2_has_the_papers_thresholds():
    # 800 TFLOP/s and 50 GB/s hide keys and values from 1,000 new tokens a rank on.
    hardware = RingHardware(800e12, 50e9)
    for ranks in (2, 4, 8, 16):
        assert choose_ring(step(1000 * ranks, 10**9, ranks=ranks), hardware).variant == "pass_kv"
        assert choose_ring(step(1000 * ranks - 50, 10**9, ranks=ranks), hardware).variant == "pass_q"


def test_full_prefill_passes_keys_and_decode_passes_queries():
    assert choose_ring(step(100, 0), PAPER).variant == "pass_kv"
    assert choose_ring(step(1, 100_000), PAPER).variant == "pass_q"


def test_reasons_say_what_was_compared():
    choice = choose_ring(step(3200, 124800), PAPER)
    assert choice.variant == "pass_q"
    assert [number in reason for number, reason in zip(("5150", "2.50%"), choice.reasons, strict=True)] == [True, True]
    assert choose_ring(step(5, 5, ranks=1), PAPER).reasons == ("one rank: nothing is passed",)


def test_wide_outputs_cost_more_to_send_back():
    """Llama 4's heads, a slow link, 30 % of the tokens new: between the thresholds of narrow outputs, 40 %, and of wide ones, 20 %."""
    hardware = RingHardware(1e15, 1e9)
    narrow, wide = (step(300, 700, num_heads=40, output_bytes_per_element=size) for size in (2, 4))
    assert choose_ring(narrow, hardware).variant == "pass_q"
    assert choose_ring(wide, hardware).variant == "pass_kv"


@given(
    st.integers(1, 10**6),
    st.integers(0, 10**7),
    st.sampled_from([2, 4, 16]),
    st.sampled_from([(128, 8), (40, 8), (32, 8), (8, 8)]),
    st.sampled_from([2, 4]),
)
def test_a_step_switches_at_one_ratio(new, cached, ranks, heads, output_bytes):
    s = step(new, cached, ranks=ranks, num_heads=heads[0], num_kv_heads=heads[1], output_bytes_per_element=output_bytes)
    ratio = _switching_ratio(s)
    if math.isfinite(ratio):
        assert choose_ring(s, RingHardware(ratio * 0.999, 1.0)).variant == "pass_kv"
        assert choose_ring(s, RingHardware(ratio * 1.001, 1.0)).variant == "pass_q"
    else:
        assert choose_ring(s, RingHardware(1e30, 1.0)).variant == "pass_kv"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RingHardware(0, 1), "attention_flops is 0; expected a positive number"),
        (lambda: RingHardware(1, "25e9"), "ring_bandwidth is '25e9'; expected a positive number"),
        (lambda: RingHardware(True, 1), "attention_flops is True; expected a positive number"),
        (lambda: RingHardware(1, np.True_), "ring_bandwidth is np.True_; expected a positive number"),
        (lambda: step(True, 5), "new_tokens is True; expected a whole number of at least 1"),
        (lambda: step("1", 5), "new_tokens is '1'; expected a whole number of at least 1"),
        (lambda: step(0, 5), "new_tokens is 0; expected a whole number of at least 1"),
        (lambda: step(1, -1), "cached_tokens is -1; expected a whole number of at least 0"),
        (lambda: step(1, 1, num_heads=9), "num_heads is 9; expected a multiple of num_kv_heads, 8"),
        (lambda: fit([]), "0 of 0 measurements are of several ranks"),
        (lambda: fit([RingMeasurement(step(5, 0), 1.0, 2.0)]), "passes keys and values on any machine"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
