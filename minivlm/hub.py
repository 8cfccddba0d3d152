"""Where a checkpoint's files come from: a folder, a checkpoint that ships in this package, or the Hugging Face Hub.

Only files that are asked for are downloaded, one by one, through `huggingface_hub` (its cache, its progress bars, its
resumed downloads). Nothing here knows about models.
"""

import json
from dataclasses import dataclass
from pathlib import Path

BUILT_IN = Path(__file__).parent / "checkpoints"
# What a processor is made of.
BESIDE_THE_WEIGHTS = (
    *("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


@dataclass(frozen=True)
class Source:
    """A named set of files. `folder` is set for local sources; otherwise `name` is a Hub id."""

    name: str
    folder: Path | None = None
    revision: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def file(self, filename: str, required: bool = True) -> Path | None:
        """Local path of one file, downloaded if need be; None if it is absent and not `required` (else OSError)."""
        if self.folder is None:
            return self._download(filename, required)
        path = self.folder / filename
        if path.is_file():
            return path
        if required:
            raise OSError(f"{self.name} has no {filename}; found {_listing(self.folder)}")
        return None

    def json(self, filename: str, required: bool = True) -> dict | None:
        """One JSON file as a dict; None if absent and not `required`. ValueError if it is not a JSON object."""
        path = self.file(filename, required)
        return None if path is None else read_json(path)

    def _download(self, filename: str, required: bool) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            return Path(
                hf_hub_download(
                    self.name,
                    filename,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=self.local_files_only,
                )
            )
        except LocalEntryNotFoundError as error:  # offline (or no connection) and not in the cache
            if not required and self._cached_anything():
                return None
            raise OSError(
                f"{filename} of {self.name!r} is not in the local cache and the Hub cannot be reached; "
                f"connect once, or pass a local folder. {self._hint()}"
            ) from error
        except EntryNotFoundError as error:
            if not required:
                return None
            raise OSError(f"{self.name!r} on the Hub has no file {filename}") from error
        except GatedRepoError as error:
            raise OSError(
                f"{self.name!r} is gated: accept its licence at https://huggingface.co/{self.name}, "
                "then log in with `hf auth login` or pass token="
            ) from error
        except RevisionNotFoundError as error:
            raise OSError(f"{self.name!r} has no revision {self.revision!r}") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise OSError(
                f"{self.name!r} is neither a folder, nor a checkpoint that ships with minivlm "
                f"({', '.join(built_in())}), nor a repository on the Hub that you may read (private ones need token=)"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise OSError(f"could not download {filename} of {self.name!r}: {error}. {self._hint()}") from error

    def _cached_anything(self) -> bool:
        """True if the config of this checkpoint is cached: then an absent optional file is simply absent."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, "config.json", cache_dir=self.cache_dir, revision=self.revision)
        return isinstance(found, str)

    def _hint(self) -> str:
        return f"Checkpoints that need no connection: {', '.join(built_in())}." if built_in() else ""


def source(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Source:
    """A folder on disk, the name of a checkpoint in this package (`shapes-idefics2`), or a Hub id, in this order.

    Raises TypeError for anything but a string or path, OSError for a path that looks local and is not a folder.
    """
    if not isinstance(name_or_folder, str | Path):
        raise TypeError(f"a checkpoint is named by a string or path, found {type(name_or_folder).__name__}")
    name = str(name_or_folder)
    if not name:
        raise OSError("no such folder: the name of the checkpoint is empty")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, folder)
    if folder.is_file():
        raise OSError(f"{name} is a file; pass the folder that holds config.json and the safetensors files")
    if name in built_in():
        return Source(name, BUILT_IN / name)
    if isinstance(name_or_folder, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise OSError(f"no such folder: {name!r}")
    cache = None if cache_dir is None else str(cache_dir)
    return Source(name, None, revision, cache, token, local_files_only)


def built_in() -> list[str]:
    """Names of the small trained checkpoints that ship in the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob("*/config.json"))


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "an empty folder"
