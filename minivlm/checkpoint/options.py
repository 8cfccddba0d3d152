"""Options that scripts pass because `transformers` takes them: accepted where they change nothing, else refused."""

import difflib
from collections.abc import Iterable
from typing import Any

# Option of `from_pretrained` → the values that change nothing here, and why another one is refused.
LOADING: dict[str, tuple[tuple[Any, ...], str]] = {
    "low_cpu_mem_usage": ((None, True, False), ""),  # loading always works that way
    "trust_remote_code": ((None, True, False), ""),  # code of a checkpoint is never run
    "use_safetensors": ((None, True), "pickled weights can run code when read; convert them to safetensors"),
    "weights_only": ((None, True), "pickled weights are never read"),
    "from_tf": ((None, False), "convert the weights to safetensors"),
    "from_flax": ((None, False), "convert the weights to safetensors"),
    "gguf_file": ((None,), "use the original safetensors checkpoint"),
    "output_loading_info": ((None, False), "what does not fit is an error, and what new= and unused= allow a warning"),
    "force_download": ((None, False), "remove the checkpoint from the Hub's cache instead"),
    "resume_download": ((None, True, False), ""),  # the Hub's client always does
    "proxies": ((None,), "set HTTPS_PROXY in the environment"),
    "variant": ((None,), "files are called model.safetensors here; save them under that name"),
    "offload_folder": ((None,), "blocks wait in main memory, not on a disk (device_map)"),
    "offload_state_dict": ((None, True, False), ""),  # weights are never in memory twice
    "offload_buffers": ((None, True, False), ""),  # models here have none
    "use_kernels": ((None, False), "attn_implementation chooses kernels"),
    "key_mapping": ((None,), "a model class's hub_prefixes names what files may call its parts"),
    "mirror": ((None,), "set HF_ENDPOINT in the environment"),
    "_fast_init": ((None, True, False), ""),
    "_from_auto": ((None, True, False), ""),
    "_commit_hash": ((None,), "pass revision="),
    "use_fast": ((None, True, False), ""),  # of processors: there is one here
}
WHERE = ("revision", "cache_dir", "local_files_only", "subfolder")
# The same for `save_pretrained`.
SAVING: dict[str, tuple[tuple[Any, ...], str]] = {
    "safe_serialization": ((None, True), "pickled weights can run code when read; safetensors is the only format"),
    "save_function": None,  # any: safetensors are written by its own library
    "variant": ((None,), "files are called model.safetensors here"),
    "save_peft_format": ((None, True, False), ""),
    "save_original_format": ((None, True), "names in files are those of the released checkpoints"),
    "distributed_checkpoint": ((None, False), "collect the weights in one process and pass state_dict="),
}


def refuse_others(options: dict[str, Any], table: dict[str, Any], known: Iterable[str]) -> None:
    """TypeError for an unknown option, ValueError for an unsupported value of an option of another library.

    known: the options that the caller takes itself, for the suggestion.
    """
    for name, value in options.items():
        if name not in table:
            close = difflib.get_close_matches(name, [*known, *table], n=1)
            raise TypeError(f"unknown option {name!r:.80}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if table[name] is None:
            continue
        neutral, why = table[name]
        if not any(value is allowed or (type(value) is type(allowed) and value == allowed) for allowed in neutral):
            raise ValueError(f"{name}={value!r:.80} is not supported: {why}")


def where(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that locate the files, as `hub.source` takes them."""
    token = first(token=given.get("token"), use_auth_token=given.get("use_auth_token"))
    return {name: given[name] for name in WHERE if name in given} | {"token": token}


def first(**spellings: Any) -> Any:
    """The one value that is given under several spellings of an option, or None; ValueError if two differ."""
    given = {name: value for name, value in spellings.items() if value is not None and value is not False}
    values = list(given.values())
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"{' and '.join(given)} mean the same and differ: pass one of them")
    return values[0] if values else None
