"""The code that MLflow keeps beside a registered adapter and runs to load it (models from code).

It is copied into every version and outlives this checkout: all it may do is name the class.
"""

try:
    from tasks.register.served import RegisteredModel
except ImportError as error:
    raise ImportError(
        "this model is an adapter made by Tunesmith and is loaded by it: install Tunesmith into this "
        f"environment, or run from its checkout ({error})"
    ) from error

import mlflow.models

mlflow.models.set_model(RegisteredModel())
