"""An exported folder put onto the Hugging Face hub: only when asked for, private unless said otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.errors import InputError, StepError
from tasks.models.hub import is_hub_name

TOKEN = "HF_TOKEN"


def check_upload(name: str) -> None:
    """Refuse an upload that cannot be, before anything is made for it.

    Raises:
        InputError: no name of the hub, or no token in the environment.
    """
    if not is_hub_name(name):
        raise InputError(f"--upload {name}: is no name of the hub; give owner/name")
    if not os.environ.get(TOKEN, "").strip():
        raise InputError(
            f"--upload {name}: {TOKEN} is not set; put a token with the right to write into the environment"
        )


def upload(folder: Path, name: str, public: bool = False) -> str:
    """Upload a folder as the model `name`, made private where it is new; its address.

    The token is read from `HF_TOKEN`, and from nowhere else, and stands in no message.

    Raises:
        InputError: as `check_upload`, or the model is there and public, which was not asked for.
        StepError: the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    # HTTPError is of whichever client the hub's package uses: httpx up to 1, httpx2 from 2 on.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    check_upload(name)
    token = os.environ[TOKEN].strip()
    hub = HfApi(token=token)
    try:
        address = hub.create_repo(name, private=not public, exist_ok=True)
        if not public and not hub.model_info(name).private:
            raise InputError(
                f"--upload {name}: is there already, and public; give another name, or --public to say so"
            )
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Model exported by Tunesmith")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).replace(token, "***")
        raise StepError(
            f"--upload {name}: the hub did not take it ({reason}); the export itself is in {folder}"
        ) from None
    return str(address)
