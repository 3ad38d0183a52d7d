"""Rows for the sampler."""

import jax.numpy as jnp
import numpy as np

from l4jax.decoding.sampling import SamplingRows, mask_words, sampling_settings


def sampling_rows(params, seeds, stop_ids, vocab_size):
    """The settings of rows of which row ``b`` is in slot ``b``."""
    settings = sampling_settings(params, seeds, stop_ids, vocab_size)
    B = len(params)
    masks = {"guided_B": jnp.zeros(B, bool), "allowed_BW": jnp.zeros((B, mask_words(vocab_size)), jnp.uint32)}
    return SamplingRows(**vars(settings), slot_B=np.arange(B, dtype=np.int32), **masks)
