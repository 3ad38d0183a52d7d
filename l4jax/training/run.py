"""A whole training run: answers, batches, steps, reports. Each part continues where an interrupted run has left it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.checkpoints.store import DrafterCheckpoint
from l4jax.config import DrafterConfig, check_fits
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import UNMEASURED, TableJson
from l4jax.interrupts import kept_interrupts
from l4jax.llm import LLM
from l4jax.parallel.arrays import to_host
from l4jax.speculator import LoadedDrafter
from l4jax.training.batches import Rows, batch, batches_in, draft_vocabulary, pack
from l4jax.training.data import Example, Generation, Progress, answer, read_data
from l4jax.training.drafters import Version, first_weights, new_drafter, trained_at, weights_from_target
from l4jax.training.evaluate import replay
from l4jax.training.folder import RunFolder, claim
from l4jax.training.kept import KeptStates
from l4jax.training.losses import Measured, TargetStates
from l4jax.training.output import save_drafter
from l4jax.training.trainer import Trainer, TrainState
from sharding.words import counted

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a run's outcome, beside its target and its data.

    ``layers``: of an EAGLE-1 drafter. ``intermediate_size``: of the drafter's feed-forward blocks (0: the target's). ``draft_vocab``:
    tokens that an EAGLE-3 drafter can guess; ``target_head``: whether its output head is the target's. ``ttt_steps``: training passes of
    an EAGLE-3 drafter, each over the output of the one before; also the length of the chains that measure both kinds. ``length``: tokens
    of a row, and the most that a prompt and its answer have together. ``batch``: rows of a step. ``held_out``: the share of prompts kept
    for evaluation. ``temperature``, ``max_tokens``: of the answers. ``seed``: 0 to 2**64 - 1.
    """

    version: Version = "eagle3"
    layers: int = 1
    intermediate_size: int = 0
    draft_vocab: int = 8192
    target_head: bool = False
    ttt_steps: int = 7
    length: int = 2048
    batch: int = 8
    epochs: int = 1
    lr: float = 1e-4
    warmup: int = 100
    held_out: float = 0.02
    temperature: float = 0.8
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "intermediate_size",
            "draft_vocab",
            "ttt_steps",
            "length",
            "batch",
            "epochs",
            "warmup",
            "max_tokens",
        ):
            lowest = {"length": 3, "max_tokens": 2, "warmup": 0, "intermediate_size": 0}.get(name, 1)
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {lowest}")
        if self.version == "eagle3" and self.layers != 1:
            raise ValueError(f"layers is {self.layers}; expected 1 for an EAGLE-3 drafter")
        if self.version == "eagle1" and self.target_head:
            raise ValueError("target_head is for EAGLE-3 drafters: an EAGLE-1 drafter always has its target's output head; leave it out")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; expected a number above 0")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; expected a share from 0 to below 1")
        SamplingParams(temperature=self.temperature, seed=self.seed)

    def of_shape(self, drafter: DrafterConfig) -> Settings:
        """These settings with the shape of an existing drafter."""
        return dataclasses.replace(
            self,
            version=drafter.version,
            layers=drafter.decoder.num_layers,
            intermediate_size=drafter.decoder.intermediate_size,
            draft_vocab=drafter.draft_vocab_size,
            target_head=drafter.target_head,
        )


def train_drafter(
    llm: LLM,
    data: Path,
    out: Path,
    settings: Settings,
    *,
    target_digest: str,
    target_tokenizer: str | None,
    report_every: int,
    save_every: int,
    keep_states: bool,
    log: Log,
    progress: Progress,
    start: DrafterCheckpoint | None = None,
    target_directory: Path | None = None,
) -> Path:
    """Train a drafter for a loaded target on the prompts of ``data``; return the drafter's folder, in ``out``.

    ``target_digest``, ``target_tokenizer``: digests of the target's checkpoint and of its tokenizer file, if it has one. ``keep_states``:
    the target passes over each row once, and its states stay in the host's memory. ``start``: a drafter of this target to start from; its
    shape and draft vocabulary replace those of the settings. Licence files come from its folder, or from ``target_directory``, the
    target's: a distilled drafter is under its target's licence too.

    Every ``save_every`` steps the state is saved and measured on the held-out prompts; then, and every ``report_every`` steps, ``log``
    and the metrics get a report. Raises ValueError for data or settings that cannot be used, and for the folder of another run;
    KeyboardInterrupt for every Ctrl-C.
    """
    if settings.batch % llm.placement.spec.data or llm.placement.spec.size != llm.placement.spec.data:
        raise ValueError(f"the mesh is {llm.placement.spec}; expected data=N, where N divides the batch of {settings.batch}")
    if settings.length > llm.config.max_position_embeddings:
        raise ValueError(f"length is {settings.length}; expected at most the target's context of {llm.config.max_position_embeddings}")
    loaded = None
    if start is not None:
        check_fits(start.config, llm.config)
        loaded = LoadedDrafter.restored(start, llm.placement, jnp.dtype(jnp.float32))
        settings = settings.of_shape(start.config)
    if settings.version == "eagle3" and settings.draft_vocab > llm.config.vocab_size:
        raise ValueError(f"draft_vocab is {settings.draft_vocab}; expected at most {llm.config.vocab_size}, the target's vocabulary")
    read = read_data(data, llm, settings.temperature)
    how = Generation(settings.max_tokens, settings.length, settings.seed)
    fitting = [example for example in read.examples if how.leaves_room_for(example)]
    too_long = len(read.examples) - len(fitting)
    if all(example.is_held_out(settings.held_out) for example in fitting):
        raise ValueError(
            f"none of {counted(len(read.examples), 'prompt')} can be trained on: answers to {too_long:,} have no room in "
            f"{settings.length} tokens, and the held-out share takes {len(fitting):,}; give more prompts, a greater length or a smaller "
            "share to hold out"
        )
    whose = {
        "target": target_digest,
        "data": read.digest,
        "dtype": llm.weights["embed"].dtype.name,
        "start": None if start is None else start.digest,
        **dataclasses.asdict(settings),
    }
    with claim(out, whose) as folder, kept_interrupts() as check_interrupts:
        if folder.drafter.exists():
            log(f"{folder.drafter} is complete")
            return folder.drafter
        if read.repeated:
            lines = counted(read.repeated, "line that repeats", "lines that repeat")
            log(f"left out: {lines} a prompt, whose answer would be the same")

        def report(done: int, total: int) -> None:
            check_interrupts()
            progress(done, total)

        examples = answer(llm, fitting, how, folder.answers, report)
        llm.engine.discard()
        single = sum(len(example.answer or ()) < 2 for example in examples)
        log(
            f"{counted(len(examples), 'answer')}; {counted(too_long, 'prompt')} left no room for one in {settings.length} tokens; "
            f"{counted(single, 'answer of a single token is', 'answers of a single token are')} not trained on"
        )
        speculation = UNMEASURED if start is None else start.speculation
        licences = [*([start.directory] if start is not None else []), *([target_directory] if target_directory else [])]
        run = _Run(
            llm,
            examples,
            settings,
            folder,
            target_tokenizer=target_tokenizer,
            keep_states=keep_states,
            start=loaded,
            speculation=speculation,
            licences=licences,
            log=log,
        )
        run.to_end(report_every, save_every, check_interrupts)
        return folder.drafter


class _Run:
    """The steps of a run, after the prompts have been answered."""

    def __init__(
        self,
        llm: LLM,
        examples: Sequence[Example],
        settings: Settings,
        folder: RunFolder,
        *,
        target_tokenizer: str | None,
        keep_states: bool,
        start: LoadedDrafter | None,
        speculation: TableJson,
        licences: Sequence[Path],
        log: Log,
    ) -> None:
        usable = [example for example in examples if len(example.answer or ()) >= 2]
        train = [example for example in usable if not example.is_held_out(settings.held_out)]
        held_out = [example for example in usable if example.is_held_out(settings.held_out)]
        if not train:
            raise ValueError(
                f"of {counted(len(examples), 'answer')} none that is trained on has 2 tokens or more "
                f"(the held-out share takes {len(held_out):,}); give more prompts"
            )
        if settings.version == "eagle1":
            token_ids = np.arange(llm.config.vocab_size, dtype=np.int32)
        else:
            token_ids = draft_vocabulary(train, settings.draft_vocab) if start is None else to_host(start.weights["token_ids"])
        longest = max(len(example.prompt) + len(example.answer or ()) for example in train)
        config = (
            new_drafter(
                llm.config,
                settings.version,
                layers=settings.layers,
                intermediate_size=settings.intermediate_size,
                draft_vocab=len(token_ids),
                target_head=settings.target_head,
                length=longest,
                target_tokenizer=target_tokenizer,
            )
            if start is None
            else trained_at(start.config, longest)
        )
        self._rows, self._held_out = pack(train, settings.length, settings.seed), pack(held_out, settings.length, settings.seed)
        self._steps = settings.epochs * batches_in(self._rows, settings.batch)
        self._settings, self._folder, self._log = settings, folder, log
        self._speculation, self._licences = speculation, licences
        given: dict[str, Any] = weights_from_target(config, llm.config, llm.weights, token_ids)
        if start is not None:
            # The head is taken from this target: the drafter may have been trained for an earlier version of it.
            given = {**start.weights, **({"head": given["head"]} if config.target_head else {})}
        self._trainer = Trainer(
            config,
            llm,
            given,
            passes=settings.ttt_steps,
            rate=settings.lr,
            warmup=settings.warmup,
            steps=self._steps,
            seed=settings.seed,
        )
        self._target_states: Callable[[Rows], TargetStates] = self._trainer.target_states
        if keep_states:
            self._target_states = KeptStates(self._trainer.target_states)
        saved = folder.load_state(self._trainer.array_names)
        if saved is not None:
            self._start, self._state = saved[0], self._trainer.from_arrays(saved[1])
        elif start is not None:
            self._start, self._state = 0, self._trainer.first_state(given)
        else:
            rows = batch(self._rows, settings.batch, 0, settings.seed)
            feature_Mf = to_host(self._trainer.target_states(rows).feature_BTf)[_sequences(rows)]
            self._start, self._state = 0, self._trainer.first_state(first_weights(config, given, feature_Mf, settings.seed))
        answer_tokens = sum(len(example.answer or ()) for example in train)
        log(
            f"{counted(len(train), 'sequence')} with {counted(answer_tokens, 'answer token')} in "
            f"{counted(len(self._rows.number_B), 'row')}; {len(held_out)} held out; "
            f"step {self._start} of {self._steps}"
        )

    def to_end(self, report_every: int, save_every: int, check_interrupts: Callable[[], None]) -> None:
        """Run all remaining steps, then write the drafter."""
        recent: list[tuple[jax.Array, Measured]] = []
        tokens, began = 0, time.perf_counter()
        for step in range(self._start + 1, self._steps + 1):
            rows = batch(self._rows, self._settings.batch, step - 1, self._settings.seed)
            self._state, of_step = self._trainer.step(self._state, rows, self._target_states(rows), step)
            check_interrupts()
            recent.append(of_step)
            tokens += int(np.count_nonzero(_sequences(rows)))
            saving = step % save_every == 0 or step == self._steps
            if not saving and step % report_every:
                continue
            values = {"step": step, **_summary(jax.device_get(recent))}
            values["tokens_per_second"] = round(tokens / (time.perf_counter() - began), 1)
            if not math.isfinite(values["loss"]):
                raise ValueError(f"the loss is {values['loss']} at step {step}; expected a number: lower lr")
            if saving:
                values |= self._held_out_values(self._state)
            self._folder.report(values)
            self._log(_line(values, self._steps))
            if saving:
                arrays = self._trainer.to_arrays(self._state)
                if not all(np.isfinite(array).all() for array in arrays.values()):
                    raise ValueError(f"the weights are not finite after step {step}; expected numbers: lower lr")
                self._folder.save_state(step, arrays)
            recent, tokens, began = [], 0, time.perf_counter()
        save_drafter(
            self._folder.drafter,
            self._trainer.config,
            self._trainer.weights(self._state),
            speculation=self._speculation,
            licences=self._licences,
        )

    def _held_out_values(self, state: TrainState) -> dict[str, Any]:
        """How speculation would do on the held-out answers."""
        if len(self._held_out.number_B) == 0:
            return {}
        found = replay(self._trainer, state, self._held_out, self._settings.batch, self._settings.ttt_steps)
        by_depth = [round(count / max(found.rounds, 1), 4) for count in found.accepted]
        return {"held_out_acceptance_length": round(found.acceptance_length, 4), "held_out_accepted": by_depth}


def _sequences(rows: Rows) -> np.ndarray:
    """Which tokens of a batch are not padding (sequences of one token): bool [B, T]."""
    first_BT = np.asarray(rows.first_BT)
    begins_BT = first_BT == np.arange(first_BT.shape[1])[None]
    goes_on_BT = np.concatenate([~begins_BT[:, 1:], np.zeros_like(begins_BT[:, :1])], axis=1)
    return ~begins_BT | goes_on_BT


def _summary(recent: Sequence[tuple[Any, Measured]]) -> dict[str, Any]:
    """The mean loss over some steps and, by pass, the share of guesses whose likeliest token is the target's."""
    hits_d, guesses_d = (np.sum([getattr(m, name) for _, m in recent], axis=0) for name in ("hits_d", "guesses_d"))
    accuracy = [round(float(hits / max(guessed, 1.0)), 4) for hits, guessed in zip(hits_d, guesses_d, strict=True)]
    return {"loss": float(np.mean([loss for loss, _ in recent])), "accuracy": accuracy}


def _line(values: dict[str, Any], steps: int) -> str:
    accuracy = " ".join(f"{share:.2f}" for share in values["accuracy"])
    line = f"step {values['step']}/{steps}: loss {values['loss']:.4f}, accuracy {accuracy}, {values['tokens_per_second']:.0f} tokens/s"
    held_out = values.get("held_out_acceptance_length")
    return line if held_out is None else f"{line}; held out: acceptance length {held_out:.2f}"
