"""Processor files of an IDEFICS checkpoint, with letters for a vocabulary: enough to test every rule of a prompt."""

import json
import string
from pathlib import Path

import tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
IMAGE_SIZE = 24


def write_small(folder: Path, special: list[str] = SPECIAL) -> Path:
    """A checkpoint's processor files: letters as vocabulary, the normaliser of Llama's tokenizer.json."""
    letters = ["▁", "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    normalizers = tokenizers.normalizers
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(special)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    extra = {"additional_special_tokens": special[3:]}
    size = {"image_size": IMAGE_SIZE, "image_num_channels": 3}
    files = {
        "preprocessor_config.json": size | {"image_processor_type": "IdeficsImageProcessor"},
        "special_tokens_map.json": roles | extra,
        "tokenizer_config.json": roles
        | extra
        | {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "IdeficsProcessor", "padding_side": "left"},
    }
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return folder
