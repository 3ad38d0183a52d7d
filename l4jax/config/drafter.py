"""The configurations of EAGLE drafters: small decoders that continue the target's hidden states, and what they read of the target."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from l4jax.config.checks import check, check_positive
from l4jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AnyDrafter:
    """What drafters of both versions have.

    ``decoder``: its layers, their RoPE and norms; its ``vocab_size`` is the target's, its ``max_position_embeddings`` the trained length.
    ``target_layers``: of the target that it was trained for; ``target_tokenizer``: the digest of the target's tokenizer, if known.
    ``own_embedding``: True if it has an embedding table of its own; otherwise it uses the target's.
    """

    decoder: ModelConfig
    target_layers: int
    target_tokenizer: str | None = None
    own_embedding: bool = False
    sources: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(self, "target_layers")
        check(self.decoder.moe is None, "a drafter with experts is not supported; expected dense layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle1Config(_AnyDrafter):
    """An EAGLE-1 drafter: it predicts the target's next final hidden state, has its width, and uses the target's output head.

    ``fuse_bias``: a bias where embedding and hidden state are joined; ``first_layer_normed``: a norm before the first layer's attention;
    ``final_normed``: a norm after the last layer (Llama 4's drafters have both).
    """

    version: ClassVar[Literal["eagle1"]] = "eagle1"
    aux_layers: ClassVar[tuple[int, ...]] = ()
    target_head: ClassVar[bool] = False  # it stores no output head, so none that is the target's

    fuse_bias: bool = False
    first_layer_normed: bool = False
    final_normed: bool = False

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that it can draft: all of the target's."""
        return self.decoder.vocab_size

    @property
    def target_hidden_size(self) -> int:
        """The target's width, which is its own."""
        return self.decoder.hidden_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Config(_AnyDrafter):
    """An EAGLE-3 drafter: it reads the residual stream in three places; its output head has ``draft_vocab_size`` of the target's tokens.

    ``aux_layers``: the target's layers whose input is read; the number ``target_layers`` means the last layer's output.
    ``norm_before_residual``: the layer's residual is the hidden state after its norm; ``norm_before_fuse``: one norm over the three states
    together; ``norm_each_aux``: one norm for each of them; ``norm_fed_back``: the next step gets the normed output; ``target_head``: the
    output head is the target's, cut to the draft vocabulary (FR-Spec, arXiv 2502.14856).
    """

    version: ClassVar[Literal["eagle3"]] = "eagle3"

    draft_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fuse: bool = False
    norm_each_aux: bool = False
    norm_fed_back: bool = False
    target_head: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "draft_vocab_size", "target_layers", "target_hidden_size")
        width, vocab = self.decoder.hidden_size, self.decoder.vocab_size
        check(self.draft_vocab_size <= vocab, f"draft_vocab_size is {self.draft_vocab_size}; expected at most the target's, {vocab}")
        target = self.target_hidden_size
        check(
            self.own_embedding or width == target,
            f"the drafter's width is {width}; expected the target's, {target}, because it uses the target's embedding",
        )
        super().__post_init__()
        check(self.decoder.num_layers == 1, f"an EAGLE-3 drafter has {self.decoder.num_layers} layers; expected 1")
        inside = self.aux_layers and all(0 <= layer <= self.target_layers for layer in self.aux_layers)
        check(bool(inside), f"aux_layers is {self.aux_layers}; expected layers of the target, 0 to {self.target_layers}")
        both = self.norm_before_fuse and self.norm_each_aux
        check(not both, "norm_before_fuse and norm_each_aux are both true; expected at most one")
        check(
            not self.target_head or width == target,
            f"the drafter's width is {width}; expected the target's, {target}; it uses the target's output head",
        )


DrafterConfig = Eagle1Config | Eagle3Config


def usual_aux_layers(layers: int) -> tuple[int, int, int]:
    """The layers whose input published EAGLE-3 drafters read, for a target with this number of layers."""
    return 2, layers // 2, layers - 3


def decoder_of(config: ModelConfig | DrafterConfig) -> ModelConfig:
    """The decoder of a model (itself) or of a drafter."""
    return config.decoder if isinstance(config, DrafterConfig) else config


def check_fits(drafter: DrafterConfig, target: ModelConfig) -> None:
    """Raise :class:`ConfigError`, naming the difference, if the drafter was made for another model."""
    for name, drafters, targets in (
        ("a vocabulary of", drafter.decoder.vocab_size, target.vocab_size),
        ("a hidden size of", drafter.target_hidden_size, target.hidden_size),
        ("a layer count of", drafter.target_layers, target.num_layers),
    ):
        check(
            drafters == targets,
            f"the drafter is for a model with {name} {drafters}, not {targets}; give this model's own drafter",
        )
    chunk = drafter.decoder.attention_chunk_size
    fits = chunk in (None, target.attention_chunk_size)
    check(fits, f"the drafter's attention_chunk_size is {chunk}, and the model's {target.attention_chunk_size}; expected the same, or null")
