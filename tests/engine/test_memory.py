"""The KV cache has the tokens that were asked for, or those that memory allows."""

from __future__ import annotations

import jax
import pytest

from l4jax import LLM, SamplingParams
from l4jax.cache import PAGE_SIZE
from l4jax.engine import memory
from l4jax.engine.engine import Engine
from tests.tiny import drafter, llama3_like, loaded_drafter, scout_like, shallow, weights

CONFIG = shallow(scout_like(attention_chunk_size=256, max_position_embeddings=1000))
DENSE = shallow(llama3_like(max_position_embeddings=1000))
PARAMS = SamplingParams(max_tokens=4, temperature=0)


def cache_bytes(engine: Engine) -> int:
    """Of keys and values, on all devices."""
    resident = engine._memory.abstract(engine.shape)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((resident.cache, resident.draft_cache)))


# Of these, each data rank has its share, and a page holds PAGE_SIZE tokens on each rank that shares a sequence's.
@pytest.mark.parametrize(
    ("mesh", "kv_tokens", "pages", "tokens"),
    [
        ("tensor=1", 1, 1, 128),
        ("tensor=1", 128, 1, 128),
        ("tensor=1", 1281, 11, 1408),
        ("data=2", 1281, 6, 768),
        ("sequence=2", 1281, 6, 1536),
        ("data=2,sequence=2", 1281, 3, 768),
    ],
)
def test_the_cache_has_the_tokens_that_were_asked_for(mesh: str, kv_tokens: int, pages: int, tokens: int) -> None:
    for config in (CONFIG, DENSE):
        engine = LLM(config, weights(config), mesh=mesh, kv_tokens=kv_tokens).engine
        assert (engine.options.full_pages, engine.shape.full_pages, engine.kv_tokens) == (pages, pages, tokens)
        ranks = engine.options.shape.token_ranks
        assert engine.options.local_pages == engine.shape.local_pages == (0 if config is DENSE else min(pages * ranks, 2 * 8 * 2))


@pytest.mark.parametrize(("mesh", "max_batch", "slots"), [("tensor=1", 3, 3), ("data=2", 3, 2), ("sequence=2", 3, 3), ("data=2", None, 8)])
def test_by_default_each_slot_has_room_for_the_context(mesh: str, max_batch: int | None, slots: int) -> None:
    engine = LLM(CONFIG, weights(CONFIG), mesh=mesh, max_batch=max_batch).engine
    assert engine.options.slots == slots
    assert engine.kv_tokens == slots * 1024  # 1,000 in whole pages


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("mesh", ["tensor=1", "data=2", "sequence=2"])
def test_a_cache_takes_a_quarter_of_a_cpus_memory_at_most(monkeypatch: pytest.MonkeyPatch, mesh: str, drafts: bool) -> None:
    made = loaded_drafter(drafter(CONFIG, aux_layers=(0, 1, 2))) if drafts else None
    speculation = "chain:2" if drafts else "off"

    def llm() -> LLM:
        return LLM(CONFIG, weights(CONFIG), mesh=mesh, drafter=made, speculation=speculation)

    whole = llm().engine
    resident = whole._memory.abstract(whole.shape)
    everything = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(resident))
    # Nearly a quarter of what there is: a page more would be too many.
    monkeypatch.setattr(memory, "own_available_bytes", lambda *_: everything * 4)
    assert llm().engine.shape == whole.shape
    monkeypatch.setattr(memory, "own_available_bytes", lambda *_: everything * 4 - 1)
    assert llm().engine.shape.full_pages == whole.shape.full_pages - 1
    monkeypatch.setattr(memory, "own_available_bytes", lambda *_: everything * 4 - cache_bytes(whole) * 2)
    assert whole.shape.full_pages * 0.3 < llm().engine.shape.full_pages < whole.shape.full_pages * 0.7
    monkeypatch.setattr(memory, "own_available_bytes", lambda *_: 1000)
    block = PAGE_SIZE * (2 if mesh == "sequence=2" else 1)
    with pytest.raises(
        ValueError, match=rf"^a KV cache of {block} tokens takes .* may take 0.0 GB beside the weights; lower max_batch"
    ) as no:
        llm()
    assert "\n" not in str(no.value)


def test_a_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"^a KV cache of 1000000000000 tokens takes \d+\.\d GB, and beside the weights this device has \d+\.\d GB; lower kv_tokens or"
    for mesh in ("tensor=1", "data=2"):
        with pytest.raises(ValueError, match=message) as refused:
            LLM(CONFIG, weights(CONFIG), mesh=mesh, kv_tokens=10**12)
        assert "\n" not in str(refused.value)
    # All of the memory may be asked for, not only a quarter.
    size = LLM(CONFIG, weights(CONFIG), kv_tokens=2048).engine
    resident = size._memory.abstract(size.shape)
    everything = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(resident))
    monkeypatch.setattr(memory, "own_available_bytes", lambda *_: everything)
    assert LLM(CONFIG, weights(CONFIG), kv_tokens=2048).engine.shape == size.shape
    with pytest.raises(ValueError, match="a KV cache of 2049 tokens"):
        LLM(CONFIG, weights(CONFIG), kv_tokens=2049)


@pytest.mark.parametrize("mesh", ["tensor=1", "data=2", "sequence=2"])
def test_a_request_longer_than_the_cache_is_refused_and_nothing_else_is_lost(mesh: str) -> None:
    llm = LLM(DENSE, weights(DENSE), mesh=mesh, max_batch=2, kv_tokens=256, prefill_lengths=(64,))
    held = llm.engine.kv_tokens
    assert held == (128 if mesh == "data=2" else 256)
    joined = llm.add([1, 2, 3], PARAMS)
    for ask in (llm.generate, llm.add, lambda prompt, params: llm.generate([[5], prompt], [params] * 2)):
        with pytest.raises(
            ValueError, match=rf"a request of {held} prompt tokens, and at most {held + 4} in all, may need .* larger kv_tokens$"
        ) as refused:
            ask([7] * held, PARAMS)
        assert "\n" not in str(refused.value)
    assert len(llm.generate([[7] * (held - 3)], PARAMS)[0].token_ids) == 4  # the last token is never run
    assert joined.completion is not None and joined.completion.token_ids == joined.tokens
