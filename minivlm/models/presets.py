"""The configurations of the released checkpoints: their sizes can be read, and models built, without a download."""

from typing import Any

from minivlm.checkpoint.config_file import read_decoder
from minivlm.models.idefics import IdeficsConfig
from minivlm.models.idefics2 import TEXT, Idefics2Config
from minivlm.models.llava_next import LlavaNextConfig


def _idefics2(vocab_size: int) -> Idefics2Config:
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 980,
        "patch_size": 14,
    }
    return Idefics2Config(vision_config=vision, text_config={**TEXT, "vocab_size": vocab_size}, dtype="float32")


IDEFICS2 = {
    "HuggingFaceM4/idefics2-8b": _idefics2(32003),
    "HuggingFaceM4/idefics2-8b-chatty": _idefics2(32003),
    "HuggingFaceM4/idefics2-8b-base": _idefics2(32002),  # without <end_of_utterance>
}


def _llava_next(image_token: int, **text: Any) -> LlavaNextConfig:
    return LlavaNextConfig(text_config=read_decoder(text), image_token_index=image_token, dtype="float16")


_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32064,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
}
_VICUNA = {
    "model_type": "llama",
    "vocab_size": 32064,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
_VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_YI_34B = {
    "model_type": "llama",
    "vocab_size": 64064,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 5e6,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
_LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128320,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
_QWEN = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "rope_theta": 1e6,
    "max_window_layers": 70,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

LLAVA_NEXT = {
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava_next(32000, **_MISTRAL),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next(32000, **_VICUNA),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _llava_next(32000, **_VICUNA, **_VICUNA_13B),
    "llava-hf/llava-v1.6-34b-hf": _llava_next(64000, **_YI_34B),
    "llava-hf/llama3-llava-next-8b-hf": _llava_next(128256, **_LLAMA_3_8B),
    "llava-hf/llava-next-72b-hf": _llava_next(151646, **_QWEN, intermediate_size=24576, num_key_value_heads=64),
    "llava-hf/llava-next-110b-hf": _llava_next(151646, **_QWEN, intermediate_size=49152, num_key_value_heads=8),
}


def _idefics(added: int, **text: Any) -> IdeficsConfig:
    return IdeficsConfig(
        vision_config={"embed_dim": 1280},
        perceiver_config={"qk_layer_norms_perceiver": True},
        use_resampler=True,
        cross_layer_interval=4,
        qk_layer_norms=True,
        additional_vocab_size=added,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        dtype="bfloat16",
        **text,
    )


_80B = {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "rms_norm_eps": 1e-5,
}

IDEFICS = {
    "HuggingFaceM4/idefics-9b": _idefics(2),  # <fake_token_around_image>, <image>
    "HuggingFaceM4/idefics-9b-instruct": _idefics(3),  # and <end_of_utterance>
    "HuggingFaceM4/idefics-80b": _idefics(2, **_80B),
    "HuggingFaceM4/idefics-80b-instruct": _idefics(3, **_80B),
}
