"""An export onto the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from abmll.config import Refused


def check_push(name: str) -> None:
    """Refused where the name is no OWNER/NAME, or nobody is logged in. Asks no server."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Refused(f"--push: {name}: {error}") from error
    if name.count("/") != 1:
        raise Refused(f"--push: {name}: is not OWNER/NAME; name the user or organisation too")
    if huggingface_hub.get_token() is None:
        raise Refused(f"--push: {name}: nobody is logged in to the Hugging Face hub here; run: hf auth login")


def push(folder: Path, name: str) -> str:
    """The repository's address. It is made private; one that is there keeps its visibility. Refused as the hub does."""
    check_push(name)
    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Adapter exported by abmll")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Refused(f"--push: {name}: the hub did not take it ({reason}); {folder} is whole") from error
    return str(url)
