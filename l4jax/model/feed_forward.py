"""Feed-forward blocks: dense SwiGLU, and Llama 4's mixture of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from l4jax.config import MoEConfig
from l4jax.model.weights import WeightSpec, declare
from pallas_kernels.experts import Experts, experts, swiglu_block
from pallas_kernels.experts.weights import scaled
from pallas_kernels.matmul import matmul
from sharding.exchange import RowExchange
from sharding.mesh import MeshSpec


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; the gate and up projections are one matrix, [gate | up].

    On a mesh, each rank along ``tensor`` has a part of the intermediate width.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, mesh: MeshSpec) -> None:
        self.width_ranks = mesh.along("tensor")
        self.gate_up = declare(WeightSpec((2, intermediate_size, hidden_size), (None, "feed_forward", "embed"), fan_in=hidden_size))
        self.down = declare(WeightSpec((hidden_size, intermediate_size), ("embed", "feed_forward"), fan_in=intermediate_size))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The block's output, before the residual."""
        return self.width_ranks.sum(self.partial(x_BTD))

    def partial(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """This rank's summand of the output."""
        return swiglu_block(x_BTD, self.gate_up[...], self.down[...])

    def as_experts(self) -> Experts:
        """The same weights, as one expert."""
        return Experts(self.gate_up[...][None], self.down[...][None])


class MixtureOfExperts(nnx.Module):
    """Top-1 routed experts plus a shared expert.

    ``y = shared(x) + expert_i(sigmoid(r_i) * x)`` with ``i = argmax(r)``, ``r = router(x)``. The score multiplies the
    expert's *input*: SwiGLU is not linear, so scaling its output would be a different function.

    On a mesh, each rank along ``expert`` has some of the routed experts, and each rank along ``tensor`` a part of their width. If
    every rank has every token (decoding), each rank computes its own experts. One sum over all ranks, which includes the shared
    expert, gives the output. If each rank has tokens of its own (prefill), tokens are sent to their experts and back. The shared
    expert does not wait for them, and the sum is over ``tensor`` only.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, mesh: MeshSpec) -> None:
        experts, width = moe.num_experts, moe.intermediate_size
        self.expert_ranks, self.width_ranks = mesh.along("expert"), mesh.along("tensor")
        self.all_ranks = mesh.along("expert", "tensor")
        self.router = declare(WeightSpec((experts, hidden_size), (None, "embed"), fan_in=hidden_size))
        self.experts_gate_up = declare(
            WeightSpec((experts, 2, width, hidden_size), ("expert", None, "feed_forward", "embed"), fan_in=hidden_size)
        )
        self.experts_down = declare(WeightSpec((experts, hidden_size, width), ("expert", "embed", "feed_forward"), fan_in=width))
        self.shared = SwiGLU(hidden_size, width, mesh)

    def __call__(self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], *, spread: bool = False) -> Float[Array, "B T D"]:
        """The block's output, before the residual.

        Tokens that are not valid (padding, finished rows) are not routed. ``spread``: True if each rank along ``expert`` has tokens
        of its own.
        """
        x_MD, valid_M = x_BTD.reshape(-1, x_BTD.shape[-1]), valid_BT.reshape(-1)
        if spread and self.expert_ranks.count > 1:
            with jax.named_scope("shared_expert"):
                shared_MD = self.shared.partial(x_BTD).reshape(x_MD.shape)
            with jax.named_scope("routed_experts"):
                out_MD, ranks = shared_MD + self._sent_to_experts(x_MD, valid_M), self.width_ranks
        else:
            out_MD, ranks = self._here(x_MD, valid_M), self.all_ranks
        return ranks.sum(out_MD.reshape(x_BTD.shape))

    def _route(self, x_MD: Float[Array, "M D"]) -> tuple[Int32[Array, "M"], Float32[Array, "M"]]:
        """Choose each token's expert; also returns its score, by which the expert's input is multiplied."""
        scores_ME = matmul(x_MD, self.router[...], dtype=jnp.dtype(jnp.float32))
        return jnp.argmax(scores_ME, axis=-1).astype(jnp.int32), jax.nn.sigmoid(jnp.max(scores_ME, axis=-1))

    def _here(self, x_MD: Float[Array, "M D"], valid_M: Bool[Array, "M"]) -> Float[Array, "M D"]:
        """Outputs of this rank's experts for the tokens routed to them; on the first rank along ``expert`` also the shared expert's."""
        expert_M, score_M = self._route(x_MD)
        rank = self.expert_ranks.index()
        local_expert_M = jnp.where(valid_M, expert_M - rank * self.experts_down.shape[0], -1)
        # Every rank has every token, but the shared expert must count once.
        shared_here = rank == 0 if self.expert_ranks.count > 1 else None
        return experts(x_MD, score_M, local_expert_M, self._routed(), self.shared.as_experts(), shared_here)

    def _routed(self) -> Experts:
        return Experts(self.experts_gate_up[...], self.experts_down[...])

    def _sent_to_experts(self, x_MD: Float[Array, "M D"], valid_M: Bool[Array, "M"]) -> Float[Array, "M D"]:
        """Send each token to the rank of its expert; returns the experts' outputs."""
        expert_M, score_M = self._route(x_MD)
        R, own = self.expert_ranks.count, self.experts_down.shape[0]
        expert_M = jnp.where(valid_M, expert_M, R * own)
        order_M = jnp.argsort(expert_M)
        # The number of tokens that each rank has for each expert determines how many arrive where.
        size_RRe = self.expert_ranks.gather(jnp.bincount(expert_M, length=R * own).astype(jnp.int32)).reshape(R, R, own)
        exchange = RowExchange(self.expert_ranks, jnp.sum(size_RRe, axis=2))
        arrived_AD = exchange.send(scaled(x_MD, score_M)[order_M])
        arriving_Re = size_RRe[:, self.expert_ranks.index()]
        run_A = jnp.searchsorted(jnp.cumsum(arriving_Re.reshape(-1)), jnp.arange(arrived_AD.shape[0], dtype=jnp.int32), side="right")
        expert_A = jnp.where(run_A < R * own, run_A % own, own).astype(jnp.int32)
        out_MD = exchange.send_back(experts(arrived_AD, None, expert_A, self._routed()))
        out_MD = jnp.where(valid_M[order_M][:, None], out_MD, jnp.zeros((), out_MD.dtype))
        return jnp.zeros_like(out_MD).at[order_M].set(out_MD, unique_indices=True)
