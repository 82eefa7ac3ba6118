"""Evaluation beside mlx-lm's own: answers in batches, and the test loss of base and tuned.

    python benchmarks/evaluate.py --quick     # 16 prompts, 16 tokens each, 16 test rows; two minutes on a CPU
    python benchmarks/evaluate.py             # 64 prompts, 48 tokens each, 64 test rows; 20 minutes

The bundled 135M model answers test prompts of the built-in data greedily: here by
`tasks.evaluate.generation.answer_prompts`, which writes `evaluate.batch_size` answers at once, there by
`mlx_lm.generate`, one after the other. `generation_ratio` is our tokens by the second over theirs, the
reading of the prompts included in both, `same_text` the share of answers that are equal to the letter.

Then the test loss of the model with a random adapter on its last eight layers: here as an evaluation
measures it, from what the frozen layers gave for these rows, there by `mlx_lm.tuner.trainer.evaluate`
with the same rows and batch size, a number of rows that it drops none of. `test_loss_ratio` is their time
over ours; `first_test_loss_ratio` is that of the first evaluation of the rows, the pass through the frozen
layers included, which base and all that is tuned on it share. The losses differ by what mlx-lm counts
beside the supervised tokens, one token of padding a row (tests/test_evaluate_losses.py accounts for it).

Sides take turns in one process. Answers are written once, after one prompt that does not count; test losses
are medians over three rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from step_trainers import cache_of_its_own

ADAPTED_LAYERS = 8


def main() -> None:
    """Run, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 prompts and rows, one round")
    parser.add_argument("--batch-size", type=int, default=16, help="answers written at once")
    parser.add_argument("--model", help="what model.source takes; by default the bundled model")
    arguments = parser.parse_args()
    count, tokens, rounds = (16, 16, 1) if arguments.quick else (64, 48, 3)
    bench = Bench(arguments.model, count, tokens, arguments.batch_size)
    sides = {"ours": bench.our_answers, "mlx-lm": bench.their_answers}
    prompts, bench.prompts = bench.prompts, bench.prompts[:1]
    bench.rounds("one answer", sides, 1)
    bench.prompts = prompts
    answers = bench.rounds("answers", sides, 1)
    bench.adapt()
    with cache_of_its_own():
        first = bench.rounds("first test loss", {"ours": bench.our_loss, "mlx-lm": bench.their_loss}, 1)
        losses = bench.rounds("test loss", {"ours": bench.our_loss, "mlx-lm": bench.their_loss}, rounds)
    rate = {
        side: statistics.median(found["tokens"] / found["seconds"] for found in answers[side])
        for side in answers
    }
    taken = {side: statistics.median(found["seconds"] for found in losses[side]) for side in losses}
    pairs = list(zip(answers["ours"][-1]["texts"], answers["mlx-lm"][-1]["texts"], strict=True))
    figures = {
        "generation_ratio": round(rate["ours"] / rate["mlx-lm"], 2),
        "tokens_per_second": round(rate["ours"], 1),
        "same_text": round(sum(ours == theirs for ours, theirs in pairs) / len(pairs), 4),
        "test_loss_ratio": round(taken["mlx-lm"] / taken["ours"], 2),
        "first_test_loss_ratio": round(first["mlx-lm"][0]["seconds"] / first["ours"][0]["seconds"], 2),
        "test_loss": round(losses["ours"][-1]["loss"], 4),
        "test_loss_mlx_lm": round(losses["mlx-lm"][-1]["loss"], 4),
        "prompts": count,
        "batch_size": arguments.batch_size,
    }
    from record import record

    seconds = {
        what: {side: [found["seconds"] for found in rounds] for side, rounds in sides.items()}
        for what, sides in (("answers", answers), ("test_loss", losses))
    }
    record("evaluate", figures, arguments.quick, {"seconds": seconds})


class Bench:
    """The model, the prompts and the rows of both sides."""

    def __init__(self, source: str | None, count: int, tokens: int, batch_size: int) -> None:
        from tasks.config import DataSettings, EvaluateSettings, ModelSettings
        from tasks.models.load import load_model
        from tasks.models.resolve import resolve_model
        from tasks.prepare.chats import load_rows
        from tasks.prepare.pipeline import prepare_data
        from tasks.prepare.splits import load_splits
        from tasks.prepare.tokenise import encode_prompt
        from tasks.train.frozen_prefix import base_identity

        model = resolve_model(ModelSettings(source=source) if source else ModelSettings())
        data = prepare_data(DataSettings(), model)
        self.loaded, self.identity = load_model(model.path), base_identity(model)
        self.settings = EvaluateSettings(max_tokens=tokens, batch_size=batch_size)
        self.rows = load_splits(data.path)["test"].first(count)
        chats = load_rows(data.path, "test")[:count]
        self.prompts = [encode_prompt(self.loaded.tokenizer, chat["messages"]) for chat in chats]

    def rounds(
        self, what: str, sides: dict[str, Callable[[], dict[str, Any]]], rounds: int
    ) -> dict[str, list[dict[str, Any]]]:
        """What each side finds in each round, with its `seconds`."""
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(rounds):
            for side, measure in sides.items():
                started = time.perf_counter()
                measured = measure()
                measured["seconds"] = time.perf_counter() - started
                print(f"{what}, round {number}, {side}: {measured['seconds']:.1f} s", flush=True)
                found[side].append(measured)
        return found

    def our_answers(self) -> dict[str, Any]:
        """All prompts, several at once."""
        from tasks.evaluate.generation import answer_prompts

        made = answer_prompts(self.loaded, self.prompts, self.settings, "").answers
        return {"tokens": sum(answer.tokens for answer in made), "texts": [answer.text for answer in made]}

    def their_answers(self) -> dict[str, Any]:
        """All prompts, one after the other."""
        from mlx_lm import stream_generate

        tokens, texts = 0, []
        for prompt in self.prompts:
            text = ""
            # What mlx_lm.generate does, with the number of tokens to be had.
            for step in stream_generate(
                self.loaded.model, self.loaded.tokenizer, prompt, max_tokens=self.settings.max_tokens
            ):
                text += step.text
            tokens += step.generation_tokens - (step.finish_reason == "stop")
            texts.append(text.strip())
        return {"tokens": tokens, "texts": texts}

    def adapt(self) -> None:
        """Put a random adapter onto the last layers."""
        import mlx.core as mx

        from tasks.config import TrainSettings
        from tasks.train.adapters import adapter_config, adapter_weights, add_adapter

        network = self.loaded.model
        settings = TrainSettings(num_layers=ADAPTED_LAYERS)
        add_adapter(network, adapter_config(settings, len(network.layers)), seed=0)
        noise = {
            name: 0.01 * mx.random.normal(array.shape, key=mx.random.key(place))
            for place, (name, array) in enumerate(adapter_weights(network).items())
        }
        network.load_weights(list(noise.items()), strict=False)
        network.eval()

    def our_loss(self) -> dict[str, Any]:
        """As an evaluation measures it."""
        from tasks.config import TrainSettings
        from tasks.evaluate.losses import measure_losses
        from tasks.train.frozen_prefix import for_measuring

        network = self.loaded.model
        depth = len(network.layers) - ADAPTED_LAYERS
        with for_measuring(network, self.rows, depth, TrainSettings(), self.identity) as rows:
            return {"loss": measure_losses(network, rows, self.settings.batch_size, "")["loss"]}

    def their_loss(self) -> dict[str, Any]:
        """As `mlx_lm.lora --test --mask-prompt` measures it."""
        from mlx_lm.tuner.trainer import evaluate

        rows = [self.rows.row(index) for index in range(len(self.rows))]
        dataset = [(tokens.tolist(), int(supervised.argmax())) for tokens, supervised in rows]
        return {"loss": evaluate(self.loaded.model, dataset, self.settings.batch_size, num_batches=-1)}


if __name__ == "__main__":
    main()
