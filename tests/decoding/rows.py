"""Rows for the sampler."""

import numpy as np

from l4jax.decoding.sampling import SamplingRows, sampling_settings


def sampling_rows(params, seeds, stop_ids, vocab_size):
    """The settings of rows of which row ``b`` is in slot ``b``."""
    settings = sampling_settings(params, seeds, stop_ids, vocab_size)
    return SamplingRows(**vars(settings), slot_B=np.arange(len(params), dtype=np.int32))
