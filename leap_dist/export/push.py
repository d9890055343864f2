"""An export on the Hugging Face hub: one repository, one commit, its README the card.

Everything that can be known before is asked before anything is exported. The token is huggingface_hub's own (HF_TOKEN,
or `hf auth login`), and is shown in no message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from leap_dist.errors import UserError, own_words
from leap_dist.run_folder import CARD, Run
from leap_dist.secrets import remember_setting

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FLAG = "--push-to-hub"
EMPTY = {".gitattributes"}  # what a repository holds at first

T = TypeVar("T")


def hub_id(run: Run) -> str | None:
    """What the model that a run began from is called on the hub, where it came from there: this machine's cache has it.

    None else: where the run was started its name may have been that of a folder, and be another model's on the hub.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = run.job["model"].get("name")
    if name is None or Path(name).exists():
        return None
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path
        return None
    return name if isinstance(cached, str) else None


class Hub:
    """A repository on the hub, OWNER/NAME, that an export may go to."""

    def __init__(self, name: str, kinds: Sequence[str]) -> None:
        """UserError where an upload could not succeed: the name, the kinds of export, the token, the network."""
        from huggingface_hub import HfApi, constants

        self.name = name
        _check_name(name)
        if len(kinds) != 1:
            raise UserError(
                f"{FLAG}: got --to {','.join(kinds)}; a repository holds one kind of export: run it once for each, "
                "each with a name of its own"
            )
        if constants.is_offline_mode():
            raise UserError(f"{FLAG}: HF_HUB_OFFLINE is set; unset it, or leave {FLAG} out")
        self._api = HfApi()
        self._check_owner()
        self._exists = self._is_there()

    def push(self, folder: Path, message: str) -> str:
        """Make the repository hold the files of an export's folder and no others; returns its address.

        A new repository is private. UserError if the hub does not take it: then no file of it has changed, and a
        repository that was made for it is gone again.
        """
        where = f"; the export is in {folder}"
        if not self._exists:
            self._ask(lambda: self._api.create_repo(self.name, private=True), where)
        try:
            self._ask(lambda: _upload(self._api, self.name, folder, message), where)
        except BaseException:
            if not self._exists:
                with suppress(Exception):  # an empty one that stays, without a network, is taken by the next push
                    self._api.delete_repo(self.name)
            raise
        return f"{self._api.endpoint}/{self.name}"

    def _check_owner(self) -> None:
        from huggingface_hub import get_token

        if (token := get_token()) is None:
            raise UserError(f"{FLAG}: no token; set HF_TOKEN to one that may write, or log in with `hf auth login`")
        remember_setting("token", token)
        user = self._ask(self._api.whoami)
        owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
        if (owner := self.name.split("/")[0]) not in owners:
            raise UserError(f'{FLAG}: got "{self.name}"; the token is not of {owner}; allowed: {", ".join(owners)}')
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"{FLAG}: the token of {user['name']} may only read; make one that may write")

    def _is_there(self) -> bool:
        """Whether there is such a repository already; UserError if it holds something else than an export."""
        if not self._ask(lambda: self._api.repo_exists(self.name)):
            return False
        files = set(self._ask(lambda: self._api.list_repo_files(self.name)))
        if CARD not in files and not files <= EMPTY:
            raise UserError(f"{FLAG}: {self.name} is there and holds no export; choose another name")
        return True

    def _ask(self, question: Callable[[], T], otherwise: str = "") -> T:
        """What the hub answers; UserError, ending with `otherwise`, where it does not."""
        try:
            return question()
        except Exception as error:  # of the hub, the network, and the libraries between
            where = f"{self.name} cannot go to {self._api.endpoint}"
            raise UserError(f"{FLAG}: {where}: {own_words(error)}{otherwise}") from None


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        wrong = "" if "/" in name else "no owner"
    except HFValidationError as error:
        wrong = own_words(error)
    if wrong:
        raise UserError(f'{FLAG}: got "{name}": {wrong}; allowed: OWNER/NAME, a user or an organisation and a new name')


def _upload(api: HfApi, name: str, folder: Path, message: str) -> None:
    """One commit; what an older export has left is deleted in it."""
    api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns="*")
