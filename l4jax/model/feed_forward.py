"""Feed-forward blocks: dense SwiGLU, and Llama 4's mixture of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax.config import MoEConfig
from l4jax.model.weights import WeightSpec, declare
from pallas_kernels.grouped_matmul import grouped_matmul
from sharding.mesh import MeshSpec


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; the gate and up projections are one matrix, [gate | up].

    On a mesh, each rank along ``tensor`` has part of the intermediate width.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, mesh: MeshSpec) -> None:
        self.width = mesh.along("tensor")
        self.gate_up = declare(WeightSpec((2, intermediate_size, hidden_size), (None, "feed_forward", "embed"), fan_in=hidden_size))
        self.down = declare(WeightSpec((hidden_size, intermediate_size), ("embed", "feed_forward"), fan_in=intermediate_size))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The block's output, before the residual."""
        return self.width.sum(self.partial(x_BTD))

    def partial(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What this rank adds to the output."""
        gate_up_cFD = self.gate_up[...]
        width = gate_up_cFD.shape[1]
        gate_up_BTf = jnp.einsum("btd,fd->btf", x_BTD, gate_up_cFD.reshape(2 * width, -1))
        hidden_BTF = jax.nn.silu(gate_up_BTf[..., :width]) * gate_up_BTf[..., width:]
        return jnp.einsum("btf,df->btd", hidden_BTF, self.down[...])


class MixtureOfExperts(nnx.Module):
    """Top-1 routed experts plus a shared expert.

    ``y = shared(x) + expert_i(sigmoid(r_i) * x)`` with ``i = argmax(r)``, ``r = router(x)``. The score multiplies the
    expert's *input*: SwiGLU is not linear, so scaling its output instead would be another function.

    On a mesh, each rank along ``expert`` has some of the routed experts, and each along ``tensor`` part of their width.
    Every rank has every token and computes what its own experts do; one sum over all of them, the shared expert's part
    included, makes the output.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, mesh: MeshSpec) -> None:
        experts, width = moe.num_experts, moe.intermediate_size
        self.expert_ranks = mesh.along("expert")
        self.all_ranks = mesh.along("expert", "tensor")
        self.router = declare(WeightSpec((experts, hidden_size), (None, "embed"), fan_in=hidden_size))
        self.experts_gate_up = declare(
            WeightSpec((experts, hidden_size, 2, width), ("expert", "embed", None, "feed_forward"), fan_in=hidden_size)
        )
        self.experts_down = declare(WeightSpec((experts, width, hidden_size), ("expert", "feed_forward", "embed"), fan_in=width))
        self.shared = SwiGLU(hidden_size, width, mesh)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The block's output, before the residual."""
        with jax.named_scope("shared_expert"):
            shared_BTD = self.shared.partial(x_BTD)
            if self.expert_ranks.count > 1:  # all of them have computed it: it must count once
                shared_BTD = jnp.where(self.expert_ranks.index() == 0, shared_BTD, jnp.zeros_like(shared_BTD))
        with jax.named_scope("routed_experts"):
            routed_MD = self._routed(x_BTD.reshape(-1, x_BTD.shape[-1]))
        return self.all_ranks.sum(shared_BTD + routed_MD.reshape(x_BTD.shape))

    def _routed(self, x_MD: Float[Array, "M D"]) -> Float[Array, "M D"]:
        scores_ME = jnp.einsum("md,ed->me", x_MD, self.router[...], preferred_element_type=jnp.float32)
        expert_M = jnp.argmax(scores_ME, axis=-1)
        gate_M1 = jax.nn.sigmoid(jnp.max(scores_ME, axis=-1, keepdims=True))
        # Counted from this rank's first expert: its own come first, and tokens for the others are sorted behind theirs.
        experts, own = scores_ME.shape[-1], self.experts_down.shape[0]
        expert_M = (expert_M - self.expert_ranks.index() * own) % experts
        order_M = jnp.argsort(expert_M)
        group_sizes_E = jnp.bincount(expert_M, length=experts)[:own].astype(jnp.int32)

        gated_MD = (x_MD.astype(jnp.float32) * gate_M1).astype(x_MD.dtype)[order_M]
        gate_up_EDf = self.experts_gate_up[...].reshape(*self.experts_gate_up.shape[:2], -1)
        gate_up_Mf = grouped_matmul(gated_MD, gate_up_EDf, group_sizes_E)
        width = gate_up_Mf.shape[-1] // 2
        hidden_MF = jax.nn.silu(gate_up_Mf[:, :width]) * gate_up_Mf[:, width:]
        out_MD = grouped_matmul(hidden_MF, self.experts_down[...], group_sizes_E)
        return jnp.zeros_like(out_MD).at[order_M].set(out_MD, unique_indices=True)
