"""The two sides of a training step: Tunesmith's engine, and mlx-lm's own `train()`, unchanged.

mlx-lm's step is a closure inside `mlx_lm.tuner.trainer.train`, so `train` itself is run. It asks an
iterator for batches: a step is what happens between handing one out and being asked for the next, which is
the compiled step, its evaluation, the clearing of MLX's cache and its progress bar. Nothing is reported or
validated within.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import bare_engine  # noqa: F401
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers

from tasks.config import TrainSettings
from tasks.models.load import use_fast_code
from tasks.prepare.splits import TokenRows
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter
from tasks.train.batches import Group, update_groups
from tasks.train.frozen_prefix import frozen_depth, without_frozen_layers
from tasks.train.loss import mean_loss
from tasks.train.low_rank import low_rank_scale
from tasks.train.optimizers import make_optimizer
from tasks.train.prefix_cache import PrefixedRows
from tasks.train.update import Updates

LONG = 1_000_000
"""Updates planned, for a learning rate that is constant anyway."""

Row = tuple[list[int], int]
"""As mlx-lm has it: token ids, and from which of them on they are supervised."""


class OurTrainer:
    """Tunesmith's side: all that is called of its engine.

    Attributes:
        prefix_s: seconds taken by computing the frozen layers' output of all rows.
    """

    def __init__(
        self, network: nn.Module, rows: TokenRows, settings: TrainSettings, valid: TokenRows | None = None
    ) -> None:
        use_fast_code(network)  # as `load_model` does; that freed memory is kept holds for mlx-lm's side too
        add_adapter(network, adapter_config(settings, len(network.layers)), settings.seed)
        started = time.perf_counter()
        given = {"train": rows, "valid": valid or rows.first(1)}
        splits = without_frozen_layers(network, given, settings, {"rows": "of this process"})
        self.prefix_s = time.perf_counter() - started
        self.rows, self.valid = splits["train"], splits["valid"]
        if frozen_depth(settings, len(network.layers)) and not isinstance(self.rows, PrefixedRows):
            raise RuntimeError("the frozen layers were not taken out, see the warning: nothing to compare")
        self.network, self.settings, self.steps = network, settings, 0
        self._updates = Updates(network, make_optimizer(settings), settings, steps=LONG)
        self._order = self.groups()
        self._next: Group | None = None
        network.train()

    def groups(self) -> Iterator[Group]:
        """Update after update from the beginning, without end."""
        settings = self.settings
        return update_groups(self.rows, settings.batch_size, settings.accumulation_steps, settings.seed)

    def step(self, group: Group) -> float:
        """One update, waited for; its loss."""
        self.steps += 1
        return self._updates.launch(group.batches, self.steps).figures()["train_loss"]

    def run(self, count: int) -> list[Group]:
        """The next so many updates as the product's loop makes them: a batch while an update is under way."""
        done = []
        for _ in range(count):
            self.steps += 1
            done.append(self._next or next(self._order))
            launched = self._updates.launch(done[-1].batches, self.steps)
            self._next = next(self._order)
            launched.figures()
        return done

    def validate(self) -> float:
        """Mean loss over the validation rows."""
        return mean_loss(self.network, self.valid, self.settings.batch_size, "validation")

    @property
    def weights(self) -> dict[str, mx.array]:
        """Of the adapter."""
        return adapter_weights(self.network)

    def take(self, weights: dict[str, mx.array]) -> None:
        """Put other weights into the adapter."""
        self.network.load_weights(list(weights.items()), strict=False)


def shape_of(group: Group) -> tuple[int, ...]:
    """What a step may have to be compiled for anew."""
    return tuple(size for array in group.batches[0].arrays() for size in array.shape)


class TheirTrainer:
    """mlx-lm's side, from given adapter weights or its own, with the same optimizer."""

    def __init__(
        self, network: nn.Module, weights: dict[str, mx.array] | None, settings: TrainSettings
    ) -> None:
        network.freeze()
        layers = len(network.layers) if settings.num_layers == -1 else settings.num_layers
        scale = low_rank_scale(settings)
        parameters = {"rank": settings.rank, "scale": scale, "dropout": settings.dropout}
        linear_to_lora_layers(network, layers, parameters)
        if weights is not None:
            if adapter_weights(network).keys() != weights.keys():
                raise RuntimeError("the two sides adapt different modules: nothing to compare")
            network.load_weights(list(weights.items()), strict=False)
        self.network, self.settings = network, settings
        decay = settings.weight_decay
        self.optimizer = optim.AdamW(settings.learning_rate, weight_decay=decay, bias_correction=True)

    def train(
        self, batches: Callable[..., Iterator[Any]], steps: int, report: TrainingCallback | None = None
    ) -> None:
        """Run `mlx_lm.tuner.trainer.train` on batches of an iterator that ends; `report` gets every step."""
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            arguments = trainer.TrainingArgs(
                batch_size=self.settings.batch_size,
                iters=steps + 1,  # so that the iterator is asked once more after the last step
                steps_per_report=1 if report else steps + 2,
                steps_per_save=steps + 2,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
            )
            trainer.train(
                self.network,
                self.optimizer,
                train_dataset=None,
                args=arguments,
                iterate_batches=batches,
                training_callback=report,
            )

    @property
    def weights(self) -> dict[str, mx.array]:
        """Of the adapter."""
        return adapter_weights(self.network)

    def loss(self, batch: tuple[mx.array, mx.array]) -> float:
        """`default_loss` of a batch, from the weights as they are."""
        return float(trainer.default_loss(self.network, *batch)[0])

    def validate(self, dataset: Any, longest: int) -> float:
        """`mlx_lm.tuner.trainer.evaluate` over the whole data set, of rows no longer than `longest`."""
        size = self.settings.batch_size
        return float(trainer.evaluate(self.network, dataset, size, num_batches=-1, max_seq_length=longest))


def their_batches(dataset: Any, batch_size: int, max_seq_length: int, epochs: int) -> Iterator[Any]:
    """mlx-lm's own batches with its own padding, for some epochs."""
    for epoch in range(epochs):
        yield from trainer.iterate_batches(dataset, batch_size, max_seq_length, seed=epoch)


def batch_of(rows: Sequence[Row]) -> tuple[mx.array, mx.array]:
    """Given rows as one batch of mlx-lm's, padded by its own code to the longest of them."""
    longest = max(len(tokens) for tokens, _ in rows)
    batch: tuple[mx.array, mx.array] = next(trainer.iterate_batches(rows, len(rows), longest))
    return batch


def exactly_supervised(rows: Sequence[Row]) -> tuple[mx.array, mx.array]:
    """`batch_of`, without the padding token that mlx-lm supervises in each padded row.

    `default_loss` (0.32.2) compares with `<=` where the token after a row's last is meant to be left out.
    """
    batch, bounds = batch_of(rows)
    return batch, bounds - mx.array([0, 1])


def in_turns(
    ours: OurTrainer,
    theirs: TheirTrainer,
    batches: Iterator[Any],
    warm: tuple[Iterable[Group], Sequence[Any]],
    blocks: int,
    block: int,
) -> dict[str, Any]:
    """Run both sides in alternating blocks of steps, the making of their batches included.

    Each block begins with a step that is not timed: mlx-lm leaves MLX's cache of memory empty, Tunesmith
    leaves it full, and neither is to start from what the other left.

    Args:
        warm: a batch of each shape for either side, run before and timed apart.

    Returns:
        Seconds and row indices or batches of each block, by side, and the seconds of `warm`.
    """
    times: dict[str, Any] = {"ours": [], "theirs": [], "our_groups": [], "their_batches": []}
    our_warm, their_warm = warm

    def hand_out(**_: Any) -> Iterator[Any]:
        started = time.perf_counter()
        yield from their_warm
        times["their_first_s"] = time.perf_counter() - started
        for _ in range(blocks):
            ours.run(1)
            started = time.perf_counter()
            done = ours.run(block)
            times["ours"].append(time.perf_counter() - started)
            times["our_groups"].append([batch.rows for group in done for batch in group.batches])
            yield next(batches)
            started = time.perf_counter()
            handed = []
            for _ in range(block):
                handed.append(next(batches))
                yield handed[-1]
            times["theirs"].append(time.perf_counter() - started)
            times["their_batches"].append([lengths for _, lengths in handed])

    started = time.perf_counter()
    for group in our_warm:
        ours.step(group)
    times["our_first_s"] = time.perf_counter() - started
    theirs.train(hand_out, len(their_warm) + blocks * (block + 1))
    return times


@contextmanager
def cache_of_its_own() -> Iterator[None]:
    """A cache folder that is empty before and gone after: the frozen layers are computed here and now."""
    before = os.environ.get("TUNESMITH_CACHE")
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        os.environ["TUNESMITH_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("TUNESMITH_CACHE")
            if before is not None:
                os.environ["TUNESMITH_CACHE"] = before
