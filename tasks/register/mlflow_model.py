"""An adapter made an MLflow model where it lies: its folder among the run's artifacts gets MLflow's files.

One folder is both: mlx_lm reads `adapters.safetensors` and `adapter_config.json`, MLflow reads `MLmodel`,
which names the folder itself as the model's artifact. Nothing is stored twice, and the base not at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.answer import Sampling
from tasks.tracking import Run

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

CODE_FILE = Path(__file__).with_name("served_model.py")

ARTIFACT_PATH = "adapter"
"""Of the run's artifacts; the training step puts the adapter there."""

PACKAGES = ("mlflow", "mlx", "mlx-lm", "numpy", "pandas", "transformers")
"""What a version needs beside Tunesmith itself, said here because MLflow would find out by importing."""


def log_mlflow_model(run: Run, prompt: str, lineage: Mapping[str, str]) -> str:
    """Put MLflow's files beside the run's adapter; the address of the model.

    Args:
        prompt: of the input example.
        lineage: stored as the model's metadata.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / ARTIFACT_PATH
        _write(written, run, prompt, lineage)
        run.client.log_artifacts(run.id, str(written), ARTIFACT_PATH)
    return f"runs:/{run.id}/{ARTIFACT_PATH}"


def _write(folder: Path, run: Run, prompt: str, lineage: Mapping[str, str]) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    from tasks.register.served import ADAPTER

    described = Model(artifact_path=ARTIFACT_PATH, run_id=run.id)
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(CODE_FILE),
        signature=signature(),
        input_example=({"prompt": [prompt]}, asdict(Sampling())),
        pip_requirements=[f"{name}=={version(name)}" for name in PACKAGES],
        metadata=dict(lineage),
        mlflow_model=described,
    )
    # save_model would copy the adapter; it lies beside these files already.
    here = {"path": ".", "uri": f"runs:/{run.id}/{ARTIFACT_PATH}"}
    python_function = described.flavors[mlflow.pyfunc.FLAVOR_NAME]
    python_function["artifacts"] = {ADAPTER: here}
    python_function["model_code_path"] = CODE_FILE.name  # where it lay here is nobody's business
    described.save(str(folder / "MLmodel"))


def signature() -> ModelSignature:
    """Prompts or chats in, answers out; how they are sampled as parameters."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array, Object, Property

    turn = Object([Property("role", DataType.string), Property("content", DataType.string)])
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.string, "prompt", required=False),
        ColSpec(Array(turn), "messages", required=False),
    ]
    kinds: dict[type[Any], DataType] = {int: DataType.long, float: DataType.double}
    params = [ParamSpec(name, kinds[type(value)], value) for name, value in asdict(Sampling()).items()]
    return ModelSignature(Schema(inputs), Schema([ColSpec(DataType.string)]), ParamSchema(params))
