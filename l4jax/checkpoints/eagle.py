"""Published EAGLE heads: a folder with ``config.json`` and the weights, as safetensors or ``pytorch_model.bin``.

Each format has its own names for the same weights. All of a format's names are mandatory: an engine that replaces a missing tensor by
random values drafts badly, without any error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from l4jax.checkpoints.files import LICENCES, copy_files, not_read
from l4jax.checkpoints.hf import attention_recipes, layer_recipes, swiglu_recipes
from l4jax.checkpoints.recipes import Wanted
from l4jax.checkpoints.safetensors import INDEX, SINGLE, SafetensorsFiles
from l4jax.checkpoints.source import CheckpointError, Recipe, TensorInfo
from l4jax.checkpoints.store import Checkpoint
from l4jax.checkpoints.torch_zip import TorchFile
from l4jax.config import DrafterConfig, Eagle1Config, Eagle3Config, check_fits
from l4jax.config_formats.eagle import HeadAnswers, drafter_config_from_eagle, head_format, says_head
from l4jax.files import FileError, read_json

_HEAD = "lm_head.weight"
_TORCH = "pytorch_model.bin"
_ROWS = 4096
_FUSES = {f"{prefix}{name}.weight" for prefix in ("", "model.") for name in ("fc", "fusion_fc")}


def is_head(directory: Path) -> bool:
    """Whether a folder with a ``config.json`` holds an EAGLE head: it has the weight that only heads have.

    Where its weights cannot be read, its configuration decides, so that what opens the folder says what is wrong with them.
    """
    try:
        files = SafetensorsFiles(directory) if _has_safetensors(directory) else _TorchFiles(directory)
    except FileError:
        return says_head(read_json(directory / "config.json"))
    return not _FUSES.isdisjoint(files.tensors)


class EagleSource:
    """An opened head (see :class:`l4jax.checkpoints.source.Source`), checked against the target that it is for."""

    def __init__(self, directory: Path, target: Checkpoint, answers: HeadAnswers) -> None:
        self._directory, self._target = directory, target
        values = read_json(directory / "config.json")
        form = head_format(values)
        self.format = f"eagle head ({form})"
        self._files = _open_files(directory)
        self.fingerprint: Mapping[str, list[int]] = self._files.fingerprint
        self.notes = self._files.notes
        # Some writers prefix all names with the module's own.
        prefix = "model." if "model.fc.weight" in self._files.tensors else ""
        self._names = {key.removeprefix(prefix): key for key in self._files.tensors}
        if len(self._names) < len(self._files.tensors):
            twice = min(key for key in self._files.tensors if f"model.{key}" in self._files.tensors)
            raise CheckpointError(f"{directory} has tensor {twice} twice, once as model.{twice}; expected one of them")
        self.tensors: Mapping[str, TensorInfo] = {name: self._files.tensors[key] for name, key in self._names.items()}
        self.config: DrafterConfig = drafter_config_from_eagle(values, self.tensors, target.config, target.tokenizer_digest, answers)
        check_fits(self.config, target.config)
        if self.config.target_head:
            # A conversion may only be continued for the same target.
            self.fingerprint = {**self.fingerprint, f"the target {target.digest}": []}
            if _HEAD not in self.tensors and "fc.weight" in self.tensors:
                shape = (self.config.draft_vocab_size, self.config.decoder.hidden_size)
                self.tensors = {**self.tensors, _HEAD: TensorInfo(shape, self.tensors["fc.weight"].dtype)}
        speculators = form == "speculators"
        self.recipes: Mapping[str, Recipe] = (
            _eagle1_recipes(self.config, self.tensors, speculators=speculators)
            if isinstance(self.config, Eagle1Config)
            else _eagle3_recipes(self.config, self.tensors, speculators=speculators)
        )
        # EAGLE-1 drafts with its target's head, of which some writers store a copy.
        self.ignored = frozenset({_HEAD} & self.tensors.keys() if self.config.version == "eagle1" else ())
        if self.ignored:
            self._check_head(self._target_head(), "with which an EAGLE-1 drafter drafts")

    def read(self, key: str) -> np.ndarray:
        """Return the tensor; an output head that the files leave out is the target's, cut to the draft vocabulary."""
        if key == _HEAD and self.config.target_head:
            recipe = self.recipes["token_ids"]
            head_VD = self._target_head()[recipe.assemble([self.read(key) for key in recipe.keys])]
            if key not in self._names:
                return head_VD.astype(self.tensors[key].dtype, copy=False)
            self._check_head(head_VD, "as target_head in config.json says")
        return self._files.read(self._names[key])

    def _check_head(self, head_VD: np.ndarray, why: str) -> None:
        """Raise :class:`CheckpointError` unless the output head in the files is the target's."""
        own_VD = self._files.read(self._names[_HEAD])
        if not _equal_but_for_rounding(own_VD, head_VD):
            raise CheckpointError(
                f"tensor {_HEAD} is not the output head of {self._target.directory}, {why}; give the model that the head was trained for"
            )

    def _target_head(self) -> np.ndarray:
        """The target's output head, over its whole vocabulary."""
        name = self._target.config.output_weight
        return self._target.read_group(self._target.weights[name].group)[name]

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Write nothing: a drafter drafts the target's tokens."""
        return []

    def write_other_files(self, directory: Path) -> list[str]:
        """Copy the head's licence files, or else those of the target, from which it was distilled."""
        return copy_files(self._directory, LICENCES, directory) or copy_files(self._target.directory, LICENCES, directory)


def _equal_but_for_rounding(a_VD: np.ndarray, b_VD: np.ndarray) -> bool:
    """Whether they differ by at most one rounding to 16 bits: the target may have been held in 16 bits while its drafter was trained."""
    blocks = (slice(start, start + _ROWS) for start in range(0, len(a_VD), _ROWS))
    return a_VD.shape == b_VD.shape and all(
        np.allclose(a_VD[rows].astype(np.float32), b_VD[rows].astype(np.float32), rtol=2.0**-8, atol=1e-7) for rows in blocks
    )


class _TorchFiles:
    """The tensors of a ``pytorch_model.bin``."""

    def __init__(self, directory: Path) -> None:
        self._file = TorchFile(directory / _TORCH)
        self.tensors: Mapping[str, TensorInfo] = {key: tensor.info for key, tensor in self._file.tensors.items()}
        self.fingerprint: Mapping[str, list[int]] = {_TORCH: self._file.fingerprint}
        self.notes = not_read(directory, self.fingerprint)
        if self._file.others:
            raise CheckpointError(f"{self._file.path}: {min(self._file.others)} is not a tensor; expected a dictionary of tensors")

    def read(self, key: str) -> np.ndarray:
        """Return the tensor."""
        return self._file.read(key)


def _has_safetensors(directory: Path) -> bool:
    return any((directory / name).exists() for name in (SINGLE, INDEX))


def _open_files(directory: Path) -> SafetensorsFiles | _TorchFiles:
    """Open a head's weight files. If it has both kinds they must agree: SafeAILab's code reads ``pytorch_model.bin``, vLLM the other."""
    if not (directory / _TORCH).exists():
        return SafetensorsFiles(directory)
    torch = _TorchFiles(directory)
    if not _has_safetensors(directory):
        return torch
    files = SafetensorsFiles(directory)
    same = files.tensors == torch.tensors and all(files.read(key).tobytes() == torch.read(key).tobytes() for key in files.tensors)
    if not same:
        raise CheckpointError(
            f"{directory} has {_TORCH} and safetensors, and they are not the same weights; remove the one that is not meant"
        )
    return files


def _eagle1_recipes(config: Eagle1Config, tensors: Mapping[str, TensorInfo], *, speculators: bool) -> dict[str, Recipe]:
    decoder, wanted = config.decoder, Wanted(tensors)
    D = decoder.hidden_size
    fuse = "fusion_fc" if speculators else "fc"
    if config.own_embedding:
        wanted.same("embed", "embed_tokens.weight", (decoder.vocab_size, D))
    wanted.same("fuse", f"{fuse}.weight", (D, 2 * D))
    if config.fuse_bias:
        wanted.same("fuse_bias", f"{fuse}.bias", (D,))
    for i in range(decoder.num_layers):
        theirs = "transformer." if speculators else f"layers.{i}."
        layer_recipes(wanted, decoder, i, f"layers.{i}.", theirs, attention_normed=i > 0 or config.first_layer_normed)
    if config.final_normed:
        wanted.same("norm.scale", "norm.weight", (D,))
    return wanted.recipes


def _eagle3_recipes(config: Eagle3Config, tensors: Mapping[str, TensorInfo], *, speculators: bool) -> dict[str, Recipe]:
    decoder, wanted = config.decoder, Wanted(tensors)
    D, V, width, count = decoder.hidden_size, config.draft_vocab_size, config.target_hidden_size, len(config.aux_layers)
    theirs = "layers.0." if speculators else "midlayer."
    if config.own_embedding:
        wanted.same("embed", "embed_tokens.weight", (decoder.vocab_size, D))
    wanted.same("fuse", "fc.weight", (D, count * width))
    if config.norm_before_fuse:
        wanted.same("fuse_norm.scale", "input_norm.weight", (count * width,))
    for i in range(count if config.norm_each_aux else 0):
        wanted.same(f"aux_norms.{i}.scale", f"fc_norm.{i}.weight", (width,))
    wanted.same("layer.embedding_norm.scale", f"{theirs}input_layernorm.weight", (D,))
    wanted.same("layer.hidden_norm.scale", f"{theirs}hidden_norm.weight", (D,))
    attention_recipes(wanted, decoder, "layer.attention.", f"{theirs}self_attn.", input_size=2 * D)
    wanted.same("layer.feed_forward_norm.scale", f"{theirs}post_attention_layernorm.weight", (D,))
    swiglu_recipes(wanted, "layer.feed_forward.", f"{theirs}mlp.", D, decoder.intermediate_size)
    wanted.same("norm.scale", "norm.weight", (D,))
    which = "the target's output head, cut to the draft vocabulary" if config.target_head else "as it is"
    wanted.add("head", [(_HEAD, (V, D))], lambda parts: parts[0], which)
    if decoder.vocab_size == V and "d2t" not in tensors:
        wanted.add("token_ids", [], lambda _: np.arange(V, dtype=np.int32), "all tokens")
        return wanted.recipes
    # ModelOpt leaves out t2d, which repeats what d2t says.
    parts: list[tuple[str, tuple[int, ...]]] = [("d2t", (V,))]
    if "t2d" in tensors or not tensors.keys() >= {"d2t"}:
        parts.append(("t2d", (decoder.vocab_size,)))
    wanted.add("token_ids", parts, lambda parts: _token_ids(parts, decoder.vocab_size), "d2t: offsets from a draft token to the target's")
    return wanted.recipes


def _token_ids(parts: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Return the target's token id for each token of the draft vocabulary: int32 [draft_vocab_size]."""
    kinds = [part.dtype.kind for part in parts]
    if kinds[0] not in "iu" or kinds[1:] not in ([], ["b"]):
        names = ", ".join(part.dtype.name for part in parts)
        raise CheckpointError(f"tensors d2t and t2d are of the types {names}; expected integers, and true or false")
    ids = np.arange(len(parts[0])) + parts[0].astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) < len(ids):
        raise CheckpointError(
            f"tensor d2t does not lead to different tokens of the target's {vocab_size}; expected offsets: target = draft + d2t[draft]"
        )
    if len(parts) > 1 and not np.array_equal(np.flatnonzero(parts[1]), np.sort(ids)):
        raise CheckpointError("tensors d2t and t2d name different tokens; expected t2d to be true at the tokens that d2t leads to")
    return ids.astype(np.int32)
