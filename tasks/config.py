"""The one settings tree. YAML, the command line, the Prefect form and MLflow's params are views of it.

A default is written here and nowhere else. `load_settings` reads a YAML file and `section.key=value`
overrides; every mistake in either is an `InputError` that names the key and the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from tasks.budget import parse_budget
from tasks.errors import InputError


def _some_layers(count: int) -> int:
    if count == 0 or count < -1:
        raise ValueError("give a number of layers from 1 up, or -1 for all of them")
    return count


Layers = Annotated[int, AfterValidator(_some_layers)]

T = TypeVar("T")
R = TypeVar("R", bound="Range")

DORA_BITS = (2, 4, 8)
"""Bits of a quantised base that mlx-lm's DoRA can read; see tasks/train/quantised_base.py."""


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class QuantizeSettings(Section):
    """How a model is quantised: a base before anything is trained on it, or a fused model."""

    bits: Literal[2, 3, 4, 6, 8] = Field(4, description="of a weight")
    group_size: Literal[32, 64, 128] = Field(64, description="weights that share a scale and an offset")


class ModelSettings(Section):
    """The base model."""

    source: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="the bundled model's name, a hub name (owner/name), a folder, or a .gguf file",
    )
    revision: str | None = Field(None, description="hub branch, tag or commit")
    quantize: QuantizeSettings | None = Field(
        None, description="quantise the base first (QLoRA): {bits: 4, group_size: 64}"
    )
    dequantize: bool = Field(
        False, description="import a quantised GGUF file as float32, as full training needs"
    )


class MappingSettings(Section):
    """The columns of rows in none of the known forms; a dot leads into an object, as `turn.question`.

    Give `text`, or `messages`, or `prompt` and `completion`.
    """

    text: str | None = Field(None, description="column of a text that is learnt whole")
    prompt: str | None = Field(None, description="column of the question")
    input: str | None = Field(None, description="column put after the question, if it is not empty")
    completion: str | None = Field(None, description="column of the answer")
    messages: str | None = Field(None, description="column of the list of turns")
    role: str | None = Field(None, description="of a turn: who speaks (default 'role' or 'from')")
    content: str | None = Field(None, description="of a turn: what is said (default 'content' or 'value')")
    system: str | None = Field(None, description="column of a system prompt")
    tools: str | None = Field(None, description="column of the tools that may be called")

    @model_validator(mode="after")
    def _one_form(self) -> MappingSettings:
        if not any(self.model_dump().values()):
            return self
        pair = self.prompt is not None and self.completion is not None
        if [self.text is not None, self.messages is not None, pair].count(True) != 1:
            raise ValueError("give 'text', or 'messages', or both 'prompt' and 'completion'")
        return self


class DataSettings(Section):
    """The rows, and how they become tokens."""

    source: str = Field(
        "stdlib",
        min_length=1,
        description="a file (JSONL, JSON, CSV, TSV, Parquet, text; .gz, .zst), a folder of them, "
        "a hub dataset (owner/name), or the built-in 'stdlib'",
    )
    subset: str | None = Field(None, description="of a hub dataset: its configuration")
    revision: str | None = Field(None, description="of a hub dataset: branch, tag or commit")
    mapping: MappingSettings = MappingSettings()
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="whether one bad row ends everything")
    max_rows: int | None = Field(None, ge=10, description="use this many rows, chosen by hash and seed")
    min_chars: int = Field(1, ge=1, description="shorter rows are left out")
    max_chars: int | None = Field(None, ge=1, description="longer rows are left out")
    near_duplicates: float | None = Field(
        None, ge=0.5, lt=1, description="leave out rows this similar (Jaccard) to another, by MinHash"
    )
    valid_share: float = Field(0.1, gt=0, lt=0.5, description="share of the rows held out for validation")
    test_share: float = Field(0.1, gt=0, lt=0.5, description="share of the rows held out for the final test")
    max_seq_length: int = Field(2048, ge=16, description="longest row (tokens); no answer is ever cut")
    on_long_row: Literal["error", "drop", "truncate-prompt"] = Field(
        "drop", description="what becomes of rows over max_seq_length"
    )
    supervise: Literal["answers", "last-answer", "everything"] = Field(
        "answers", description="what is learnt of a chat"
    )
    template: Literal["model", "chatml", "alpaca"] = Field(
        "model", description="how a chat is written; 'model' is its own, or ChatML where it has none"
    )
    system_prompt: str | None = Field(None, description="put before chats that have none of their own")
    goal: Literal["style", "task", "domain", "broad"] = Field(
        "task", description="what is to be learnt; decides how many rows are advised"
    )
    seed: int = Field(0, description="decides which row goes to which split")


def _amount(text: str) -> str:
    """A budget as `tasks.budget` reads it."""
    try:
        parse_budget(text, free_bytes=1)
    except InputError as error:
        raise ValueError(str(error)) from None
    return text


class TrainSettings(Section):
    """The training loop."""

    method: Literal["lora", "dora", "full", "soft-prompt"] = Field("lora", description="what is trained")
    from_adapter: str | None = Field(
        None,
        min_length=1,
        description="begin with this adapter's weights: a folder, of mlx-lm or of PEFT; method, rank, scale, "
        "targets and num_layers are taken from it",
    )
    num_layers: Layers = Field(8, description="adapt the last N layers; -1 for all")
    targets: tuple[str, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="modules adapted in each layer: names as q_proj, or attention, mlp, all-linear",
    )
    rank: int = Field(8, ge=1, le=4096, description="LoRA rank")
    alpha: float = Field(32.0, gt=0, description="LoRA scale is alpha / rank")
    rank_stabilized: bool = Field(False, description="LoRA scale is alpha / sqrt(rank)")
    scale: float | None = Field(None, gt=0, description="LoRA scale itself, in place of alpha")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the input of each adapter")
    prompt_tokens: int = Field(16, ge=1, le=1024, description="length of a soft prompt")
    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "muon", "lion"] = "adamw"
    learning_rate: float = Field(2e-4, gt=0, le=1)
    lora_plus_ratio: float = Field(1.0, ge=1, description="learning rate of LoRA's B over that of A")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(5, ge=0)
    final_lr_share: float = Field(0.1, ge=0, le=1, description="where the schedule ends, of the peak")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient's global norm")
    batch_size: int = Field(4, ge=1, description="rows a forward pass")
    accumulation_steps: int = Field(1, ge=1, description="forward passes an update")
    frozen_prefix: Literal["auto", "always", "never"] = Field(
        "auto", description="compute the layers below the adapted ones once per row; auto: where that pays"
    )
    prefix_cache_gb: float = Field(20.0, gt=0, description="disk for what they gave, of all runs together")
    budget: Annotated[str, AfterValidator(_amount)] = Field(
        "75%", description="memory for the run: 8GB, 512MB, or a share of what is free: 75%"
    )
    adapt: bool = Field(False, description="over budget: change what costs least quality, and say so")
    grad_checkpoint: bool = Field(False, description="recompute activations: less memory, a third slower")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="stop earlier, after this many updates")
    max_minutes: float | None = Field(None, gt=0, description="stop earlier, after this much training time")
    steps_per_eval: int = Field(100, ge=1, description="validate every N updates, and at both ends")
    valid_rows: int | None = Field(None, ge=1, description="validate on the first N rows only")
    patience: int | None = Field(
        None, ge=1, description="stop after this many validations without a gain of min_gain"
    )
    min_gain: float = Field(0.0, ge=0, description="fall of val_loss that counts as a gain")
    steps_per_save: int | None = Field(None, ge=1, description="write a checkpoint every N updates")
    minutes_per_save: float = Field(5.0, gt=0, description="write a checkpoint this often")
    seed: int = Field(0, description="order of the rows, adapter initialisation and dropout")

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> TrainSettings:
        if self.lora_plus_ratio > 1 and self.method not in ("lora", "dora"):
            raise ValueError(f"lora_plus_ratio is of lora and dora; leave it out with {self.method}")
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("adam has no weight_decay; adamw is adam with it")
        return self


def _metric_file(metric: str) -> str:
    """`file.py:function` with the file absolute: a run may be resumed from another folder."""
    file, colon, function = metric.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise ValueError("give a Python file and a function in it: path/to/file.py:function")
    return f"{Path(file).expanduser().absolute()}:{function}"


def _answer_format(wanted: str | None) -> str | None:
    if wanted not in (None, "json"):
        try:
            re.compile(str(wanted))
        except re.error as error:
            raise ValueError(f"neither 'json' nor a regular expression: {error}") from None
    return wanted


class JudgeSettings(Section):
    """A model that compares the answers of two runs, at an OpenAI-compatible address."""

    url: str | None = Field(None, description="of `tunesmith ab`: the judge, as http://127.0.0.1:8080/v1")
    model: str | None = Field(None, description="the judge's name there")
    api_key_env: str = Field(
        "TUNESMITH_JUDGE_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with the judge's key; none is sent when it is not set",
    )
    criteria: str = Field(
        "accuracy, relevance, coherence and completeness",
        min_length=1,
        description="what makes an answer the better one",
    )
    both_orders: bool = Field(True, description="ask twice, each answer first once; at odds is a tie")
    temperature: float | None = Field(0.0, ge=0, description="of the judge; null leaves it to the server")
    timeout_s: float = Field(60.0, gt=0, description="in which the judge has to answer")
    concurrency: int = Field(4, ge=1, le=64, description="questions to the judge at once")


class EvaluateSettings(Section):
    """The comparison of base and tuned on the test rows."""

    samples: int = Field(8, ge=0, description="test prompts answered by base and tuned")
    max_tokens: int = Field(48, ge=1, description="longest answer (tokens)")
    batch_size: int = Field(8, ge=1, description="rows a forward pass, and answers written at once")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token, 1 samples as learnt")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens of this mass")
    top_k: int | None = Field(None, ge=1, description="sample among this many of the likeliest tokens")
    repetition_penalty: float = Field(
        1.0, ge=1, le=10, description="divides the logits of the last 20 tokens; 1 for none"
    )
    seed: int = Field(0, ge=0, description="of sampling and of the intervals")
    format: Annotated[str | None, AfterValidator(_answer_format)] = Field(
        None, description="what an answer has to be: json, or a regular expression for all of it"
    )
    metrics: tuple[Annotated[str, AfterValidator(_metric_file)], ...] = Field(
        (), description="metrics of your own, path/to/file.py:function (answer, reference, prompt -> number)"
    )
    general_rows: int = Field(
        16, ge=0, description="texts on which general ability is compared, 64 tokens each; 0 for none"
    )

    judge: JudgeSettings = JudgeSettings()

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> EvaluateSettings:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise ValueError("top_p and top_k choose among what is sampled; give a temperature above 0")
        return self


FusedForm = Annotated[
    Annotated[Literal["base"], Tag("(base)")] | Annotated[QuantizeSettings, Tag("(bits)")],
    Discriminator(lambda value: "(bits)" if isinstance(value, dict | QuantizeSettings) else "(base)"),
]
"""Told apart by their kind, so that a mistake in the one is not answered with a complaint of the other."""


class FuseSettings(Section):
    """Merging the adapter into the base weights."""

    enabled: bool = True
    quantize: FusedForm | None = Field(
        None,
        description="the fused model: 'base', as its base is, or {bits: 4, group_size: 64}; else dequantised",
    )
    tolerance: float = Field(
        1e-3,
        gt=0,
        description="largest test-loss difference of fused and adapter: relative, below 1 nat absolute",
    )
    token_tolerance: float = Field(
        0.05, ge=0, le=1, description="largest share of greedy tokens that fused and adapter choose otherwise"
    )
    keep: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of what the adapter changed that a quantised form keeps, or it is not used",
    )


class RegisterSettings(Section):
    """The MLflow model registry."""

    enabled: bool = True
    name: str | None = Field(
        None,
        pattern=r"^[^/:'\"]+$",
        description="registered model; by default base model and data, joined",
    )
    promote: Literal["if-better", "always", "never"] = Field("if-better", description="when @champion moves")
    metric: str = Field(
        "test_loss", min_length=1, description="figure of the evaluation that decides: test_loss, chrf, …"
    )


class Range(Section):
    """Every number from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = Field(False, description="evenly over the orders of magnitude")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low:g}) must be above 0 on a log scale")
        return self


class LearningRateRange(Range):
    """Learning rates, on a log scale.

    Within the defaults lie the best rates for LoRA of published comparisons, which found the learning rate to
    matter most and rank little (Biderman et al. 2024, arXiv:2405.09673; Schulman et al. 2025, "LoRA Without
    Regret").
    """

    low: float = Field(3e-5, gt=0)
    high: float = Field(1e-3, gt=0, le=1)
    log: bool = True


class WholeRange(Range):
    """Every whole number from `low` to `high`."""

    low: int = Field(ge=1)
    high: int = Field(ge=1)


def _form(value: object) -> str:
    """Which of the three forms of a searched parameter is given."""
    if isinstance(value, Mapping | Range):
        return "(range)"
    return "(list)" if isinstance(value, list | tuple) else "(fixed)"


def _layers_or_share(value: int | str) -> int | str:
    if isinstance(value, int):
        return _some_layers(value)
    if not re.fullmatch(r"L(/[1-9]\d*)?", value):
        raise ValueError(
            "give a number of layers, -1 for all, or a share of the model's L layers: L/8, L/2, L"
        )
    return value


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise ValueError("an empty list; give at least one value, or leave the setting out")
    if len(set(values)) < len(values):
        raise ValueError("a value stands twice; give each once")
    return values


Rate = Annotated[float, Field(gt=0, le=1)]
Rank = Annotated[int, Field(ge=1, le=4096)]
Positive = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
LayersOrShare = Annotated[int | str, AfterValidator(_layers_or_share)]

Some = Annotated[tuple[T, ...], AfterValidator(_distinct)]
Searched = Annotated[
    Annotated[T, Tag("(fixed)")] | Annotated[Some[T], Tag("(list)")] | Annotated[R, Tag("(range)")],
    Discriminator(_form),
]
"""A parameter that is fixed, one of a list, or anywhere in a range.

Told apart by their kind, so that a mistake in one is not answered with a complaint of the others.
"""


class SearchSettings(Section):
    """Hyperparameter search: what is varied, how often, in how much memory.

    Each parameter is a value, a list of values, or a range {low: …, high: …, log: true}.
    """

    trials: int = Field(12, ge=1, description="proposals that are trained")
    time: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?\s*(s|min|h|d)$",
        description="propose for this long instead of `trials` times: 8h, 90min",
    )
    budget: str = Field(
        "75%", description="memory for the trials at work: 8GB, 512MB, or a share of what is free: 75%"
    )
    learning_rate: Searched[Rate, LearningRateRange] = LearningRateRange()
    rank: Searched[Rank, WholeRange] = (8, 16, 32, 64)
    num_layers: Searched[LayersOrShare, WholeRange] = Field(
        ("L/8", "L/4", "L/2", "L"), description="numbers, -1, or shares of the model's L layers"
    )
    alpha: Searched[Positive, Range] | None = Field(None, description="in place of train.alpha")
    scale: Searched[Positive, Range] | None = Field(None, description="in place of train.scale")
    dropout: Searched[Dropout, Range] | None = Field(None, description="in place of train.dropout")
    batch_size: Searched[Count, WholeRange] | None = Field(None, description="in place of train.batch_size")
    epochs: Searched[Positive, Range] | None = Field(None, description="in place of train.epochs")
    targets: Some[str] | None = Field(
        None, description="in place of train.targets; of each the names with a comma between: q_proj,v_proj"
    )
    objectives: Some[Literal["loss", "chrf", "rouge_l", "exact_match", "memory", "time"]] = Field(
        ("loss",),
        description="the first chooses the best trial; of several a Pareto front is found. Scores are of "
        "answers to the first evaluate.samples validation prompts. But for loss alone trials have no rungs",
    )
    sampler: Literal["tpe", "gp"] = Field("tpe", description="gp needs PyTorch")
    rungs: Literal["halving", "median", "none"] = Field(
        "halving",
        description="where trials stop: only the best of a rung go on (one bracket below 40 trials, "
        "Hyperband from there), those worse than the median stop, or none does",
    )
    reduction: int = Field(3, ge=2, le=10, description="of so many trials one goes on, so many times as long")
    first_rung: float = Field(0.1, gt=0, le=1, description="the least share of the full length for a trial")
    workers: int | None = Field(
        None, ge=1, description="trials side by side; one on a GPU, a core each on CPU"
    )
    finetune: bool = Field(True, description="evaluate, fuse and register the best trial")
    seed: int = Field(0, ge=0, description="of the sampler")

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> SearchSettings:
        if self.alpha is not None and self.scale is not None:
            raise ValueError("scale is used in place of alpha; search one of them")
        if self.objectives[0] in ("memory", "time"):
            raise ValueError(
                "objectives begin with loss or a score, which the best trial is chosen by; "
                f"got {self.objectives[0]}"
            )
        if self.objectives != ("loss",) and self.rungs != "none":
            raise ValueError(
                f"rungs {self.rungs} stops trials by their loss alone; set rungs=none for other objectives"
            )
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """The objectives that are scores of answers, which are wanted high."""
        return tuple(name for name in self.objectives if name not in ("loss", "memory", "time"))


class TrackingSettings(Section):
    """Where MLflow keeps runs."""

    uri: str | None = Field(None, description="MLFLOW_TRACKING_URI if set, else SQLite under mlruns/")
    experiment: str = Field(
        default_factory=lambda: os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith"), min_length=1
    )


class FlowSettings(Section):
    """How a run is carried out: tries, limits, turns on the machine, who is told of its end."""

    retries: int = Field(
        2, ge=0, le=20, description="tries more of a step that failed for what may heal, as a network"
    )
    retry_pause_s: float = Field(10.0, ge=0, description="before the first of them; doubled each time")
    step_minutes: float | None = Field(
        None, gt=0, description="a step that takes longer fails; training goes on from there when resumed"
    )
    when_busy: Literal["wait", "refuse", "share"] = Field(
        "wait", description="while another run trains on this machine"
    )
    notify_command: str | None = Field(
        None, description="shell command run when a run has ended; a JSON record is its standard input"
    )
    notify_webhook_env: str = Field(
        "TUNESMITH_WEBHOOK",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with an address that the same record is posted to",
    )
    notify_on: Literal["both", "success", "failure"] = Field("both", description="of which ends is told")


class Settings(Section):
    """Everything that decides what a run does."""

    name: str | None = Field(None, description="of the run in MLflow and Prefect; made up when absent")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    fuse: FuseSettings = FuseSettings()
    register_: RegisterSettings = Field(RegisterSettings(), alias="register")
    search: SearchSettings = SearchSettings()
    tracking: TrackingSettings = TrackingSettings()
    flow: FlowSettings = FlowSettings()

    @model_validator(mode="after")
    def _method_fits_the_rest(self) -> Settings:
        quantize, method = self.model.quantize, self.train.method
        if self.search.scores and not self.evaluate.samples:
            raise ValueError(
                f"search.objectives: {self.search.scores[0]} is a score of answers, and evaluate.samples is 0"
            )
        if quantize and method == "full":
            raise ValueError("train.method full cannot train quantised weights; leave out model.quantize")
        if quantize and method == "dora" and quantize.bits not in DORA_BITS:
            allowed = ", ".join(map(str, DORA_BITS))
            raise ValueError(f"train.method dora needs model.quantize.bits of {allowed}")
        if method == "soft-prompt" and self.fuse.enabled:
            raise ValueError("train.method soft-prompt has no weights to fuse; set fuse.enabled=false")
        return self


def load_settings(path: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file and lay `section.key=value` overrides over it.

    A `data.source`, `model.source` or `train.from_adapter` that names an existing path beside the YAML
    file is taken relative to that file, one given on the command line relative to the working directory.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, or a value is not allowed.
    """
    tree = read_yaml(path) if path else {}
    for override in overrides:
        _lay_over(tree, override)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(error, path)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its paths made absolute; `InputError` with file and line."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a YAML file such as {EXAMPLE}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give a YAML file such as {EXAMPLE}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        fault = str(getattr(error, "problem", error))
        raise InputError(
            f"{path}{line}: {fault if isinstance(error, _Twice) else f'not YAML: {fault}'}"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds a {type(tree).__name__}; expected sections such as 'train:'")
    for section, key in PATHS:
        settings = tree.get(section)
        if isinstance(settings, dict) and isinstance(source := settings.get(key), str):
            beside = path.resolve().parent / Path(source).expanduser()
            if beside.exists():
                settings[key] = str(beside)
    return tree


def flatten(settings: Settings) -> dict[str, Any]:
    """The settings as one level of dotted keys, the form of MLflow's params and of overrides.

    User and password in an address become `***`: params and reports are read by others.
    """
    flat = dict(_leaves(settings.model_dump(mode="json", by_alias=True)))
    return {
        key: CREDENTIALS.sub("://***@", value) if isinstance(value, str) else value
        for key, value in flat.items()
    }


def changed(settings: Settings) -> dict[str, Any]:
    """The dotted keys whose values are not the defaults."""
    defaults = flatten(Settings())
    return {key: value for key, value in flatten(settings).items() if value != defaults.get(key)}


def describe() -> dict[str, str]:
    """The description of every dotted key that has one."""
    return dict(_descriptions(Settings))


EXAMPLE = "flows/configs/quickstart.yaml"
PATHS = (("model", "source"), ("data", "source"), ("train", "from_adapter"))
"""Settings that may name a file or folder."""
CREDENTIALS = re.compile(r"://[^/@]*@")


class _Twice(yaml.MarkedYAMLError):
    """A key stands twice in one mapping."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML where a key that stands twice is an error; PyYAML would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise _Twice(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"'{override}': an override has the form section.key=value, as train.rank=16")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"'{override}': the value is not YAML; quote it") from None
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"'{override}': {section} is a value, not a section")
        place = inner
    place[last] = value


def _explain(error: ValidationError, path: Path | None) -> str:
    lines = []
    for fault in error.errors():
        # Tags of a union are no keys.
        key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("("))
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{key}'{_nearest(key)}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            # A fault of several keys together: the section's values would drown it.
            of_section = fault["type"] == "value_error" and isinstance(fault["input"], Mapping)
            place = (key and f"{key}: ") if of_section else f"{key} = {fault['input']!r}: "
            lines.append(f"{place}{message[0].lower()}{message[1:]}")
    where = f"{path}: " if path else ""
    return where + f"\n{where}".join(lines)


def _nearest(key: str) -> str:
    known = {**flatten(Settings()), **dict.fromkeys(Settings().model_dump(by_alias=True))}
    last = key.rsplit(".", 1)[-1]
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    close = close or [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    if close:
        return f"; did you mean '{close[0]}'?"
    return "; 'tunesmith show' lists them all"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _descriptions(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _descriptions(field.annotation, f"{key}.")
        elif field.description:
            yield key, field.description
