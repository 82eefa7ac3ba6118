"""An upload happens when asked for, privately, and the token stands nowhere but in the request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from huggingface_hub.errors import HFValidationError

from tasks.errors import InputError, StepError
from tasks.export.upload import check_upload, upload

SECRET = "hf_notforanybody"


class StandIn:
    """The hub: remembers what it was asked."""

    asked: ClassVar[list[tuple[str, Any]]]
    private = True
    fault: Exception | None = None

    def __init__(self, token: str) -> None:
        self.asked.append(("token", token))

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        self.asked.append(("create", (name, private, exist_ok)))
        if self.fault:
            raise self.fault
        return f"somewhere/{name}"

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **what: Any) -> None:
        self.asked.append(("upload", what))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    class Fresh(StandIn):
        asked: ClassVar[list[tuple[str, Any]]] = []

    monkeypatch.setattr("huggingface_hub.HfApi", Fresh)
    monkeypatch.setenv("HF_TOKEN", f" {SECRET}\n")
    return Fresh


def test_a_new_model_is_private(hub: type[StandIn], tmp_path: Path) -> None:
    assert upload(tmp_path, "owner/mine") == "somewhere/owner/mine"
    assert hub.asked[:2] == [("token", SECRET), ("create", ("owner/mine", True, True))]
    [(_, what)] = [asked for asked in hub.asked if asked[0] == "upload"]
    assert (what["repo_id"], what["folder_path"]) == ("owner/mine", tmp_path)


def test_a_public_model_of_that_name_is_written_to_only_when_that_is_said(
    hub: type[StandIn], tmp_path: Path
) -> None:
    hub.private = False
    with pytest.raises(InputError, match="already, and public; give another name, or --public"):
        upload(tmp_path, "owner/mine")
    assert not [asked for asked in hub.asked if asked[0] == "upload"]
    upload(tmp_path, "owner/mine", public=True)
    assert ("create", ("owner/mine", False, True)) in hub.asked
    assert hub.asked[-1][0] == "upload"


@pytest.mark.parametrize("fault", [OSError, HFValidationError])
def test_a_refusal_is_told_without_the_token(
    hub: type[StandIn], tmp_path: Path, fault: type[Exception]
) -> None:
    hub.fault = fault(f"401: token {SECRET} is not allowed\nsecond line")
    with pytest.raises(StepError, match=r"did not take it \(401: token \*\*\* is not allowed\)") as told:
        upload(tmp_path, "owner/mine")
    assert SECRET not in str(told.value)
    assert told.value.__cause__ is None


def test_no_token_and_no_name_are_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    check_upload("owner/mine")
    with pytest.raises(InputError, match="is no name of the hub; give owner/name"):
        check_upload("mine")
    monkeypatch.setenv("HF_TOKEN", " ")
    with pytest.raises(InputError, match="HF_TOKEN is not set"):
        check_upload("owner/mine")
