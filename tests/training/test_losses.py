"""The losses beside the equations, written out with loops over sequences, chains and keys, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.llm import LLM
from l4jax.model.llama import Llama
from l4jax.model.weights import BoundModel
from l4jax.training.batches import Rows, pack, take
from l4jax.training.data import Example
from l4jax.training.losses import STATE_NOISE
from l4jax.training.trainer import Trainer
from tests.training import small

Array = np.ndarray
TOKEN_IDS = {"eagle3": np.array([0, 2, 3, 5, 7, 11, 13, 17, 19, 21, 22], np.int32), "eagle1": np.arange(24, dtype=np.int32)}
NOISE = 5


def rms(x: Array, scale: Array) -> Array:
    return x / np.sqrt(np.mean(x * x) + 1e-5) * scale


def rotated(x: Array, position: int) -> Array:
    out = np.empty_like(x)
    for pair in range(len(x) // 2):
        angle = position * 10000.0 ** (-2 * pair / len(x))
        even, odd = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = even * np.cos(angle) - odd * np.sin(angle)
        out[2 * pair + 1] = even * np.sin(angle) + odd * np.cos(angle)
    return out


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


Entry = tuple[Array, Array]  # the keys and values of an entry, by KV head


def layer(w: Mapping[str, Array], name: str, x: Array, residual: Array, position: int, before: list[Entry]) -> tuple[Array, Entry]:
    """Attention over the entries before and this one, then the feed-forward block: the output, and this one's keys and values."""
    qkv = np.einsum("kghd,d->kgh", w[f"{name}.attention.qkv"], x)
    keys, values = np.stack([rotated(k, position) for k in qkv[:, -2]]), qkv[:, -1]
    entries = [*before, (keys, values)]
    attended = np.zeros((qkv.shape[0], qkv.shape[1] - 2, qkv.shape[2]))
    for head in range(qkv.shape[0]):
        for group in range(qkv.shape[1] - 2):
            query = rotated(qkv[head, group], position)
            weights = softmax(np.array([query @ k[head] / np.sqrt(len(query)) for k, _ in entries]))
            attended[head, group] = sum(weight * v[head] for weight, (_, v) in zip(weights, entries, strict=True))
    out = residual + np.einsum("dkgh,kgh->d", w[f"{name}.attention.out"], attended)
    normed = rms(out, w[f"{name}.feed_forward_norm.scale"])
    gate, up = w[f"{name}.feed_forward.gate_up"] @ normed
    return out + w[f"{name}.feed_forward.down"] @ (gate / (1 + np.exp(-gate)) * up), (keys, values)


def eagle3(w: Mapping[str, Array], embedding: Array, hidden: Array, position: int, before: list[Entry]) -> tuple[Array, Entry]:
    joined = np.concatenate([rms(embedding, w["layer.embedding_norm.scale"]), rms(hidden, w["layer.hidden_norm.scale"])])
    return layer(w, "layer", joined, hidden, position, before)


def eagle1(w: Mapping[str, Array], embedding: Array, hidden: Array, position: int, before: list[Entry]) -> tuple[Array, Entry]:
    x = w["fuse"] @ np.concatenate([embedding, hidden])
    return layer(w, "layers.0", x, x, position, before)


Told = Callable[[Example], tuple[Array, Array, Array]]


def telling(llm: LLM, trainer: Trainer) -> Told:
    """The target's features, final states and logits for one sequence, alone."""
    model = BoundModel(Llama(llm.config, taps=trainer.config.aux_layers))
    bound = model.bind(model.leaves(llm.weights))
    packed = jax.jit(lambda token_BT: bound.packed(token_BT, jnp.zeros_like(token_BT)))

    def told(example: Example) -> tuple[Array, Array, Array]:
        tokens = [*example.prompt, *(example.answer or ())]
        # Padded to one length, for one program: what comes later changes nothing.
        token_BT = np.zeros((1, small.LENGTH), np.int32)
        token_BT[0, : len(tokens)] = tokens
        final, feature = (np.asarray(states[0, : len(tokens)], np.float64) for states in packed(token_BT))
        return feature, final, llm.logits([tokens])[0].astype(np.float64)

    return told


def expected_eagle3(llm: LLM, told: Told, w: Mapping[str, Array], examples: list[Example], passes: int) -> tuple[float, Array, Array]:
    """The loss; and by pass the hits and the guesses."""
    embed, ids = np.asarray(llm.weights["embed"], np.float64), TOKEN_IDS["eagle3"]
    losses: list[list[float]] = [[] for _ in range(passes)]
    hits, guesses = np.zeros(passes), np.zeros(passes)
    for example in examples:
        tokens = [*example.prompt, *(example.answer or ())]
        feature, _, logits = told(example)
        read = feature @ w["fuse"].T
        outs, entries = [], []
        for i in range(len(tokens) - 1):
            out, entry = eagle3(w, embed[tokens[i + 1]], read[i], i, entries)
            outs.append(out)
            entries.append(entry)
        for begin in range(len(example.prompt) - 1, len(tokens) - 2):  # the root is the next token
            hidden, chain = outs[begin], entries[: begin + 1]
            for index in range(passes):
                t = begin + index
                if t + 2 >= len(tokens):
                    break
                if index > 0:
                    hidden, entry = eagle3(w, embed[tokens[t + 1]], hidden, t, chain)
                    chain = [*chain, entry]
                guesses[index] += 1
                best = int(np.argmax(logits[t + 1]))
                if best not in ids:
                    continue
                z = w["head"] @ rms(hidden, w["norm.scale"])
                p = softmax(logits[t + 1][ids])
                losses[index].append(-float(p @ np.log(softmax(z))))
                hits[index] += ids[int(np.argmax(z))] == best
    return sum(0.8**i * float(np.mean(of)) for i, of in enumerate(losses)), hits, guesses


def expected_eagle1(llm: LLM, told: Told, w: Mapping[str, Array], rows: Rows) -> tuple[float, Array, Array]:
    embed, head = (np.asarray(llm.weights[name], np.float64) for name in ("embed", "head"))
    losses, hits, guesses = [], np.zeros(1), np.zeros(1)
    for row in range(len(rows.number_B)):
        noise = jax.random.uniform(jax.random.fold_in(jax.random.key(NOISE), rows.number_B[row]), (rows.token_BT.shape[1], embed.shape[1]))
        for start in np.unique(rows.first_BT[row][rows.answer_BT[row]]):
            at = np.flatnonzero(rows.first_BT[row] == start)
            tokens, prompt = rows.token_BT[row][at].tolist(), int(np.count_nonzero(~rows.answer_BT[row][at]))
            feature, final, logits = told(Example("", tuple(tokens), ()))
            feature = feature + STATE_NOISE * (np.asarray(noise, np.float64)[at] - 0.5)
            entries: list[Entry] = []
            for i in range(len(tokens) - 2):
                out, entry = eagle1(w, embed[tokens[i + 1]], feature[i], i, entries)
                entries.append(entry)
                if i < prompt - 1:
                    continue
                away = np.abs(out - final[i + 1])
                distance = np.mean(np.where(away < 1, away**2 / 2, away - 0.5))
                z, p = head @ out, softmax(logits[i + 1])
                losses.append(distance - 0.1 * float(p @ np.log(softmax(z))))
                hits += np.argmax(z) == np.argmax(p)
                guesses += 1
    return float(np.mean(losses)), hits, guesses


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small.target(rope_scaling=None)


@pytest.fixture(scope="module")
def examples(llm: LLM) -> list[Example]:
    return small.answered(llm, (3, 6, 2, 9), 8, temperature=1.0)


@pytest.mark.parametrize("version", ["eagle3", "eagle1"])
def test_loss_hits_and_gradient_of_one_batch(version: str, llm: LLM, examples: list[Example]) -> None:
    ids = TOKEN_IDS[version]
    trainer = small.trainer(llm, version, ids)
    weights = small.random_drafter(trainer)
    rows = pack(examples, small.LENGTH, seed=0)
    assert len(rows.number_B) == 2  # some rows have several sequences
    rows = take(rows, np.arange(2), 3)
    measure = small.measure(llm, trainer, rows, ids, jax.random.key(NOISE))
    w = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    if version == "eagle3":
        loss, hits, guesses = expected_eagle3(llm, telling(llm, trainer), w, examples, 3)
        assert 0 < hits.sum() < guesses.sum()
    else:
        loss, hits, guesses = expected_eagle1(llm, telling(llm, trainer), w, rows)
    (value, measured), gradient = measure(weights)
    np.testing.assert_allclose(value, loss, rtol=2e-6)
    np.testing.assert_array_equal(measured.hits_d, hits)
    np.testing.assert_array_equal(measured.guesses_d, guesses)
    for name, slope in gradient.items():
        # Along the gradient itself, where the loss changes most.
        size = float(jnp.linalg.norm(slope))
        assert size > 0, name
        ends = [float(measure({**weights, name: weights[name] + step * slope / size})[0][0]) for step in (1e-2, -1e-2)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, size, rtol=2e-2, err_msg=name)
