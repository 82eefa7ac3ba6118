"""Optuna trials left RUNNING by a killed process: told as failed, or the sampler avoids their region."""

from __future__ import annotations

from collections.abc import Collection

from tasks.alive import is_gone
from tasks.home import runs_dir

PROCESS = "tunesmith.process"
"""User attribute of a trial: `tasks.alive.this_process` of who runs it."""

STANDING = "standing"
"""User attribute of a trial of ours: all that is known of it, from which a search goes on."""


def fail_trials(known: Collection[tuple[str, int]] = (), storage: str | None = None) -> list[str]:
    """Tell FAIL for trials that are RUNNING though the process that ran them is gone.

    Those of a search that can be gone on with are left to `tunesmith search --resume`, which loses none.

    Args:
        known: (study, number) of trials whose process is known to be gone, as by their MLflow runs.
        storage: Optuna's address; by default the SQLite file under `mlruns/`, and nothing without one.

    Returns:
        "study trial 3" of each.
    """
    if storage is None and not (runs_dir() / "optuna.db").exists():
        return []
    import optuna
    from optuna.trial import TrialState

    failed = []
    at = optuna.storages.get_storage(storage or f"sqlite:///{runs_dir() / 'optuna.db'}")
    for study in at.get_all_studies():
        for trial in at.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            dead = is_gone(str(trial.user_attrs.get(PROCESS, "")))
            if STANDING in trial.user_attrs or not (dead or (study.study_name, trial.number) in known):
                continue
            at.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            failed.append(f"{study.study_name} trial {trial.number}")
    return failed
