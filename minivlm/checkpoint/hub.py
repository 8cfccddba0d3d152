"""Where a checkpoint's files come from: a folder, a checkpoint that ships in this package, or the Hugging Face Hub.

Only requested files are downloaded, one by one, through `huggingface_hub` (its cache, its progress bars, its resumed
downloads). Nothing here depends on models.

Files come from strangers: only regular files and links to them are opened (a named pipe would block for ever), and only
up to a size that such a file can have.
"""

import contextlib
import difflib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minivlm.checkpoint import journal

BUILT_IN = Path(__file__).parents[1] / "builtin"
MAX_JSON = 2**23  # bytes; parsed, they can take twenty times as much
MAX_DEPTH = 16  # of objects and lists in each other; files need 4
CONFIG = "config.json"
MAX_MESSAGE = 2500  # characters of an error, which may quote a file
# First bytes of files that are not what their names promise → what they are.
NOT_THE_FILE = {
    b"version https://git-lfs": "a Git LFS pointer, which only names the file; run `git lfs pull`, or download it",
    b"<!doctype html": "a web page; download the file from …/resolve/main/, not from …/blob/main/",
    b"<html": "a web page; download the file from …/resolve/main/, not from …/blob/main/",
    b"PK\x03\x04": "a PyTorch pickle, which can run code when read; convert it to safetensors first",
    b"\x80\x02": "a pickle, which can run code when read; convert it to safetensors first",
    b"\x80\x04": "a pickle, which can run code when read; convert it to safetensors first",
    b"\x89HDF": "an HDF5 file; convert it to safetensors first",
    b"GGUF": "a GGUF file, which is not supported; use the original safetensors checkpoint",
}
UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".tmp")  # ends of downloads under way


class CheckpointError(ValueError):
    """Every refusal to load a checkpoint is of this type; the message says what is wrong. Long messages are cut."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…")


class CheckpointFileError(CheckpointError, OSError):
    """A checkpoint's file is missing, cannot be fetched, is incomplete, or is not a regular file."""


@contextlib.contextmanager
def blame(where: str) -> Iterator[None]:
    """Turn a ValueError into a CheckpointError whose message begins with `where`: a file's content is to blame."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


# The files of a processor.
BESIDE_THE_WEIGHTS = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """A named set of files. `folder` is set for local sources; otherwise `name` is a Hub id.

    subfolder: where the files are inside the folder or repository.
    """

    name: str
    folder: Path | None = None
    revision: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    subfolder: str = ""

    def file(self, filename: str, required: bool = True) -> Path | None:
        """Local path of one file, downloaded if not yet here; None if it is absent and not `required`.

        What an adapter's folder does not have is taken from the checkpoint that it was trained on.
        Raises CheckpointFileError for anything but a regular file, or a link to one.
        """
        found = self.own(filename, required=False)
        if found is None and self.base is not None:
            return self.base.file(filename, required)
        return self.own(filename, required) if found is None and required else found

    @cached_property
    def base(self) -> "Source | None":
        """For an adapter, the checkpoint that it was trained on, as its configuration names it; None for a model.

        Raises CheckpointFileError if it names none, or another adapter.
        """
        path = self.own(ADAPTER, required=False) if self.own(CONFIG, required=False) is None else None
        if path is None:
            return None
        values = read_json(path)
        name, revision = (values.get(key) for key in ("base_model_name_or_path", "revision"))
        if not isinstance(name, str) or not name:
            raise CheckpointFileError(
                f"{self.name} holds an adapter and no model, and does not name the one that it was trained on: pass "
                "that model, and this folder as adapter="
            )
        where = {"cache_dir": self.cache_dir, "token": self.token, "local_files_only": self.local_files_only}
        try:
            found = source(name, revision=revision if isinstance(revision, str) else None, **where)
            found.own(CONFIG, required=True)
        except CheckpointError as error:
            raise CheckpointFileError(
                f"{self.name} holds an adapter of {name:.200}, which cannot be loaded: {error}. Pass the model from "
                "where it is now, and this folder as adapter="
            ) from error
        return found

    def own(self, filename: str, required: bool) -> Path | None:
        """`file`, without a base."""
        if self.folder is None:
            return self._download(filename, required)
        path = self.folder / self.subfolder / filename
        try:
            found = path.is_file()
        except OSError as error:  # a name too long, a folder that may not be entered
            raise CheckpointFileError(
                f"{filename:.99} of {self.name:.99} cannot be opened: {error.strerror}"
            ) from error
        if found:
            if path.with_name(path.name + ".aria2").exists():  # which fills the whole file with zeros first
                raise CheckpointFileError(f"{self.name} has {filename}{_unfinished(path)}; wait, or resume it")
            return path
        if path.is_symlink():
            raise CheckpointFileError(f"{path} is a link to {path.readlink()}, where no file is; download it again")
        if path.exists():
            kind = "a folder" if path.is_dir() else "a pipe or device"
            raise CheckpointFileError(f"{path} should be a regular file, found {kind}")
        if not required:
            return None
        raise CheckpointFileError(f"{self.name} has no {filename}{_unfinished(path)}; found {_listing(path.parent)}")

    def json(self, filename: str, required: bool = True) -> dict | None:
        """One JSON file as a dict; None if absent and not `required`. CheckpointError if it is not a JSON object."""
        path = self.file(filename, required)
        return None if path is None else read_json(path)

    def _download(self, filename: str, required: bool) -> Path | None:
        """A file from the Hub, or from its local cache; None if it is absent and not `required`."""
        from huggingface_hub import errors, hf_hub_download

        try:
            found = hf_hub_download(
                self.name,
                filename,
                subfolder=self.subfolder or None,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                local_files_only=self.local_files_only or not _is_reachable(),
            )
        except (errors.EntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            unknown = isinstance(error, errors.LocalEntryNotFoundError) and not self._cached_anything()
            if isinstance(error, errors.EntryNotFoundError) and not required and not unknown:
                return None
            raise CheckpointFileError(self._why_not(filename, error)) from error
        return Path(found)

    def _why_not(self, filename: str, error: Exception) -> str:
        """The message about a file that could not be fetched."""
        from huggingface_hub import errors

        match error:
            case errors.LocalEntryNotFoundError():
                return (
                    f"{filename} of {self.name!r} is not in the local cache and the Hub cannot be reached; "
                    f"connect once, or pass a local folder. {suggestion(self.name) or _hint()}"
                )
            case errors.EntryNotFoundError():
                return f"{self.name!r} on the Hub has no file {filename}"
            case errors.GatedRepoError():
                return (
                    f"{self.name!r} is gated: accept its licence at https://huggingface.co/{self.name}, "
                    "then log in with `hf auth login` or pass token="
                )
            case errors.RevisionNotFoundError():
                return f"{self.name!r} has no revision {self.revision!r}"
            case errors.RepositoryNotFoundError() | errors.HFValidationError():
                return (
                    f"{self.name!r} is neither a folder, nor a checkpoint that ships with minivlm "
                    f"({', '.join(built_in())}), nor a repository on the Hub that you may read (private ones need "
                    f"token=). {suggestion(self.name)}".rstrip(". ")
                )
        return f"could not download {filename} of {self.name!r}: {' '.join(str(error).split())}. {_hint()}"

    def _cached_anything(self) -> bool:
        """True if the config of this checkpoint is cached: then an absent optional file is simply absent."""
        from huggingface_hub import try_to_load_from_cache

        config = f"{self.subfolder}/{CONFIG}" if self.subfolder else CONFIG
        found = try_to_load_from_cache(self.name, config, cache_dir=self.cache_dir, revision=self.revision)
        return isinstance(found, str)


_answers: dict[str, tuple[bool, float]] = {}  # address of the Hub → whether it answered, and when it was asked


def _is_reachable() -> bool:
    """Whether the Hub answers at all, asked once a minute: the Hub's own client tries six times for every file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answered, asked = _answers.get(constants.ENDPOINT, (False, -math.inf))
    if not answered and time.monotonic() - asked > 60:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            answered = True
        except Exception:  # of several HTTP libraries, or that HF_HUB_OFFLINE is set
            answered = False
        _answers[constants.ENDPOINT] = answered, time.monotonic()
    return answered


def suggestion(name: str) -> str:
    """A sentence that names the checkpoint that may have been meant by `name`; empty if none is close."""
    from minivlm.families import FAMILIES

    known = [*built_in(), *(released for family in FAMILIES.values() for released in family.released)]
    by_end = {checkpoint.rpartition("/")[2].lower(): checkpoint for checkpoint in known}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), by_end, n=1, cutoff=0.8)
    found = by_end[close[0]] if close else name
    return "" if found == name else f"Did you mean {found}?"


def source(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Source:
    """A folder on disk, the name of a checkpoint in this package (`shapes-idefics2`), or a Hub id, in this order.

    Raises TypeError for anything but a string or path, CheckpointFileError for a path where no folder is.
    """
    if not isinstance(name_or_folder, str | Path):
        raise TypeError(f"a checkpoint is named by a string or path, found {type(name_or_folder).__name__}")
    name = str(name_or_folder)
    if not name:
        raise CheckpointFileError("no such folder: the name of the checkpoint is empty")
    if subfolder and not re.fullmatch(r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*", subfolder):
        raise CheckpointFileError(f"subfolder should be a path inside the checkpoint, found {subfolder!r:.80}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / subfolder).is_dir():
            raise CheckpointFileError(f"{name} has no folder {subfolder}; found {_listing(folder)}")
        try:
            journal.finish(folder / subfolder)
        except OSError as error:
            raise CheckpointFileError(str(error)) from error
        return Source(name, folder, subfolder=subfolder)
    if folder.is_file():
        raise CheckpointFileError(f"{name} is a file; pass the folder that holds config.json and the safetensors files")
    if name in built_in():
        return Source(name, BUILT_IN / name, subfolder=subfolder)
    if isinstance(name_or_folder, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointFileError(f"no such folder: {name!r}")
    cache = None if cache_dir is None else str(cache_dir)
    return Source(name, None, revision, cache, token, local_files_only, subfolder)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload a folder as one commit to a repository, which is created if missing; returns the commit's address.

    Raises OSError where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload with minivlm",
            commit_description=commit_description,
        )
    except Exception as error:  # of several HTTP libraries
        reason = " ".join(str(error).split())
        raise OSError(f"{folder} could not be uploaded to {repo_id!r}: {reason:.400}. Are you logged in?") from error
    return str(commit)


def built_in() -> list[str]:
    """Names of the small trained checkpoints that ship in the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob("*/config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError that names the file and what is wrong with it.

    Stricter than Python's reader: no NaN or Infinity, no name twice in one object, no great size or depth.
    """
    value = parse_json(_read(path), path)
    if _deeper(value, MAX_DEPTH):
        raise CheckpointError(f"{path} is nested deeper than {MAX_DEPTH} levels, which no checkpoint's file is")
    return value


def read_text(path: Path) -> str:
    """A small text file, such as a template. Raises CheckpointError that names the file."""
    with blame(str(path)):
        return _read(path).decode()


def _read(path: Path) -> bytes:
    if not path.stat().st_size:  # the kernel's files have no size either, and reading some of them blocks for ever
        check_start(path, b"")
    with path.open("rb") as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; such a file has at most {MAX_JSON:,} here")
    check_start(path, content)
    return content


def parse_json(content: bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object from bytes; see `read_json`. `where` begins the message of an error."""
    try:
        value = json.loads(content.decode(), parse_constant=_no_number, object_pairs_hook=no_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} should hold a JSON object, found {type(value).__name__}")
    return value


def check_start(path: Path, content: bytes) -> None:
    """CheckpointFileError if a file is empty, or begins like something else that is often found instead."""
    if not content:
        raise CheckpointFileError(f"{path} is empty; download it again")
    for start, found in NOT_THE_FILE.items():
        if content[:64].lstrip().lower().startswith(start.lower()):
            raise CheckpointFileError(f"{path} is {found}")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(…, object_pairs_hook=)`: ValueError for a name twice in one object (Python takes the last)."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r:.80} is given twice")
    return values


def _deeper(value: Any, levels: int) -> bool:
    """Whether there is anything below so many levels of objects and lists."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(children) and (levels == 0 or any(_deeper(child, levels - 1) for child in children))


def _unfinished(path: Path) -> str:
    parts = [path.name + end for end in UNFINISHED if path.with_name(path.name + end).exists()]
    return f" but {parts[0]}, so its download is not finished" if parts else ""


def _hint() -> str:
    return f"Checkpoints that need no connection: {', '.join(built_in())}."


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "an empty folder"
