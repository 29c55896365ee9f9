"""The families of networks that the sweep judges: by name, with random weights and an example of their inputs.

Packages other than torch and torchvision are imported when a family is used; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from neurosurgeon.models.names import ZOO, Catalogue, input_size, torchvision_names
from neurosurgeon.models.torchvision_compat import import_torchvision
from tests.models.hard import HARD
from tests.models.hard.table import RIGHT, RIGHT_OR_REFUSED, Hard, features, image

LARGEST = 100e6  # parameters of a network of timm
DETECTION = r"depend|data|control flow|size|nms"
FIRST_SIZES = (  # words of timm's names, the smallest networks first
    *"test atto femto pico zepto nano xxs xxt 0.5 050 xxsmall xsmall xs tiny mini s0 small b0 18 26 base b1".split(),
    "",
)


@dataclass(frozen=True)
class Family:
    """Names of networks, and a function that returns the network of a name."""

    names: Callable[[], list[str]]
    network: Callable[[str], Hard]


def find(family: str, name: str) -> Hard:
    """Return a network of a family."""
    return FAMILIES[family].network(name)


def _table(rows: Mapping[str, Hard]) -> Family:
    return Family(lambda: list(rows), rows.__getitem__)


# ---------------------------------------------------------------- torchvision

INCEPTION = {"inception_v3": 299}
VIDEO_FRAMES = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}
DETECTION_MODULES = ("segmentation", "video", "detection")


def _torchvision_names() -> list[str]:
    models = import_torchvision()
    detection = [getattr(models, module) for module in DETECTION_MODULES]
    return [name for module in (models, *detection) for name in models.list_models(module=module)]


def _torchvision(name: str) -> Hard:
    models = import_torchvision()
    names = {module: models.list_models(module=getattr(models, module)) for module in DETECTION_MODULES}
    settings: dict[str, Any] = {"weights": None}
    if name in names["segmentation"] or name in names["detection"]:
        settings["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": False}
    size = INCEPTION.get(name, 224)
    build = partial(models.get_model, name, **settings)
    if name in names["video"]:
        frames, side = VIDEO_FRAMES.get(name, (8, 112))
        return Hard(name, build, features(1, 3, frames, side, side))
    if name in names["detection"]:
        return Hard(name, build, ([image(160, 160)[0]],), RIGHT_OR_REFUSED, DETECTION)
    return Hard(name, build, image(size, size))


def _known_names() -> list[str]:
    return [*ZOO, *torchvision_names()]


def _known(name: str) -> Hard:
    """Return a network that the engine knows by name; its module has the weights that the engine gives it."""
    from neurosurgeon.engine.torch_engine import TorchEngine

    open_once = cache(lambda: TorchEngine().open(name))
    size = input_size(Catalogue().canonical_name(name))
    return Hard(name, lambda: open_once().build(), image(size, size))


# ---------------------------------------------------------------- timm


def _timm_names() -> list[str]:
    import_torchvision()
    import timm

    chosen: list[str] = []
    for module in timm.list_modules():
        names = sorted(timm.list_models(module=module), key=_size_rank)
        chosen += dict.fromkeys([*names[:1], *names[len(names) // 4 :][:1]])
    return chosen


def _size_rank(name: str) -> tuple[int, int, str]:
    return next(index for index, word in enumerate(FIRST_SIZES) if word in name), len(name), name


def _timm(name: str) -> Hard:
    import_torchvision()
    import timm

    size = timm.get_pretrained_cfg(name).input_size if timm.get_pretrained_cfg(name) else (3, 224, 224)

    def build() -> nn.Module:
        module: nn.Module = timm.create_model(name, pretrained=False)
        if sum(parameter.numel() for parameter in module.parameters()) > LARGEST:
            raise TooLargeError(name)
        return module

    return Hard(name, build, image(*size[1:], channels=size[0]))


class TooLargeError(Exception):
    """The network has more parameters than the sweep takes."""


# ---------------------------------------------------------------- transformers

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
SEQ2SEQ = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 100},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "use_cache": False},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
}
VISION = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"image_size": 64, "patch_size": 16},
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "image_size": 64}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "image_size": 64, "window_size": 2}
SPEECH = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4], "num_feat_extract_layers": 3},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32},
}
TOKENS = torch.randint(3, 99, (1, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 10 + [0] * 2])
IDS = {"input_ids": TOKENS, "attention_mask": MASK}
PIXELS = {"pixel_values": image(64, 64)}
WAVES = {"input_values": features(1, 3200)}
BOTH = {"input_ids": TOKENS, "attention_mask": MASK, "decoder_input_ids": TOKENS[:, :5]}
WHISPER = {"input_features": features(1, 80, 60), "decoder_input_ids": TOKENS[:, :5]}

# By name: the type of the configuration, its settings, and the inputs; the name may be longer than the type.
TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    **dict.fromkeys(
        "bert roberta electra camembert mpnet ernie nystromformer roformer megatron-bert xlm-roberta".split(),
        (TEXT, IDS),
    ),
    "distilbert": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100}, IDS),
    "albert": ({**TEXT, "embedding_size": 16}, IDS),
    "deberta-v2": ({**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, IDS),
    "convbert": ({**TEXT, "embedding_size": 32}, IDS),
    "squeezebert": ({**TEXT, "embedding_size": 32}, IDS),
    "mobilebert": ({**TEXT, "embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32}, IDS),
    "modernbert": ({**TEXT, "pad_token_id": 0}, IDS),
    "xlnet": ({"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 100}, IDS),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100, "use_cache": False}, IDS),
    "gpt2 with its cache": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100}, IDS),
    **dict.fromkeys("llama mistral qwen2 qwen3 phi gpt_neox stablelm olmo".split(), (DECODER, IDS)),
    "gemma": ({**DECODER, "head_dim": 8}, IDS),
    "opt": ({**DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32}, IDS),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "use_cache": False}, IDS),
    "mamba": ({**TEXT, "state_size": 4, "use_cache": False}, {"input_ids": TOKENS}),
    "mixtral": ({**DECODER, "num_local_experts": 2}, IDS),
    "t5": (
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "use_cache": False},
        BOTH,
    ),
    "bart": (SEQ2SEQ, BOTH),
    "marian": (SEQ2SEQ, BOTH),
    "pegasus": (SEQ2SEQ, BOTH),
    **dict.fromkeys("vit deit vit_msn dinov2 ijepa audio-spectrogram-transformer-as-image".split(), (VISION, PIXELS)),
    "beit": ({**VISION, "use_relative_position_bias": True}, PIXELS),
    "yolos": ({**VISION, "image_size": [64, 64], "num_detection_tokens": 5}, PIXELS),
    "swin": (SWIN, PIXELS),
    "swinv2": (SWIN, PIXELS),
    "convnext": (STAGES, PIXELS),
    "convnextv2": (STAGES, PIXELS),
    "resnet": ({**STAGES, "embedding_size": 8, "layer_type": "basic"}, PIXELS),
    "regnet": ({**STAGES, "embedding_size": 8, "groups_width": 8}, PIXELS),
    "segformer": ({**STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}, PIXELS),
    "poolformer": (STAGES, PIXELS),
    "mobilevit": (
        {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 32, 40, 64], "image_size": 64},
        PIXELS,
    ),
    "mobilenet_v2": ({"image_size": 64}, PIXELS),
    "efficientnet": ({"image_size": 64, "width_coefficient": 0.3, "depth_coefficient": 0.3, "hidden_dim": 384}, PIXELS),
    "cvt": ({}, PIXELS),
    "levit": ({"image_size": 64, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1]}, PIXELS),
    **dict.fromkeys("wav2vec2 hubert wavlm unispeech data2vec-audio".split(), (SPEECH, WAVES)),
    "sew": ({**SPEECH, "squeeze_factor": 2}, WAVES),
    "whisper": ({**SEQ2SEQ, "num_mel_bins": 80, "max_source_positions": 30, "max_target_positions": 20}, WHISPER),
    "clip": ({}, {**PIXELS, **IDS}),
    "siglip": ({}, {**PIXELS, "input_ids": TOKENS}),
}
TRANSFORMERS.pop("audio-spectrogram-transformer-as-image")
TWO_TOWERS = {"text_config": TEXT, "vision_config": VISION}


def _transformers(name: str) -> Hard:
    settings, inputs = TRANSFORMERS[name]

    def build() -> nn.Module:
        import_torchvision()
        _import_torchaudio()  # which transformers imports if it is installed
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(name.split()[0], **(settings or (TWO_TOWERS if "input_ids" in inputs else {})))
        module: nn.Module = AutoModel.from_config(config)
        return module

    return Hard(
        name, build, inputs, RIGHT if " with its cache" not in name else RIGHT_OR_REFUSED, r"cache|return|output"
    )


def _import_torchaudio() -> ModuleType:
    """Return the models of torchaudio, whose compiled operators do not load with a CPU build of torch."""
    try:
        from torchaudio import models
    except OSError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        with mock.patch("pathlib.Path.glob", return_value=[]):  # so that it finds no such operators
            from torchaudio import models
    return cast(ModuleType, models)


# ---------------------------------------------------------------- ultralytics, segmentation, sound

TASKS = {"": "DetectionModel", "-seg": "SegmentationModel", "-cls": "ClassificationModel"}
YOLO = [
    f"yolo{version}{scale}{task}"
    for version in ("v8", "v10", "11", "12")
    for scale in "ns"
    for task in TASKS
    if not (version == "v10" and task)
]


def _ultralytics(name: str) -> Hard:
    task = next(task for task in ("-seg", "-cls", "") if name.endswith(task))

    def build() -> nn.Module:
        os.environ |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": tempfile.gettempdir(), "YOLO_AUTOINSTALL": "false"}
        import_torchvision()
        from ultralytics.nn import tasks

        module: nn.Module = getattr(tasks, TASKS[task])(f"{name}.yaml", verbose=False)
        return module

    return Hard(name, build, image(224, 224) if task == "-cls" else image(320, 320))


DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer DPT".split()
ENCODERS = ("resnet18", "mobilenet_v2", "timm-efficientnet-b0", "mit_b0")


def _segmentation_names() -> list[str]:
    pairs = [(decoder, encoder) for decoder in DECODERS[:-1] for encoder in ENCODERS]
    left_out = {("UnetPlusPlus", "mit_b0"), ("Linknet", "mit_b0"), ("PAN", "mit_b0"), ("DeepLabV3", "mit_b0")}
    return [f"{decoder} {encoder}" for decoder, encoder in pairs if (decoder, encoder) not in left_out] + ["DPT"]


def _segmentation(name: str) -> Hard:
    decoder, _, encoder = name.partition(" ")
    settings = {"encoder_name": encoder} if encoder else {"encoder_name": "tu-vit_tiny_patch16_224"}

    def build() -> nn.Module:
        import_torchvision()
        import segmentation_models_pytorch as smp

        module: nn.Module = getattr(smp, decoder)(encoder_weights=None, classes=3, **settings)
        return module

    return Hard(name, build, image(128, 128) if encoder else image(224, 224))


SOUND: dict[str, tuple[str, dict[str, Any], Any]] = {
    "wav2vec2_base": ("wav2vec2_base", {}, features(1, 8000)),
    "hubert_base": ("hubert_base", {}, features(1, 8000)),
    "wavlm_base": ("wavlm_base", {}, features(1, 8000)),
    "conformer": (
        "Conformer",
        {"input_dim": 80, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "depthwise_conv_kernel_size": 31},
        (features(1, 40, 80), torch.tensor([40])),
    ),
    "conv_tasnet": ("ConvTasNet", {}, features(1, 1, 8000)),
    "deepspeech": ("DeepSpeech", {"n_feature": 40, "n_hidden": 64}, features(1, 1, 20, 40)),
    "emformer": (
        "Emformer",
        {
            "input_dim": 64,
            "num_heads": 4,
            "ffn_dim": 64,
            "num_layers": 2,
            "segment_length": 4,
            "right_context_length": 1,
        },
        (features(1, 17, 64), torch.tensor([17])),
    ),
    "hdemucs_low": ("hdemucs_low", {"sources": ["voice", "rest"]}, features(1, 2, 16384)),
    "wav2letter": ("Wav2Letter", {"num_features": 1}, features(1, 1, 16000)),
    "wavernn": (
        "WaveRNN",
        {"upsample_scales": [2, 2, 3], "n_classes": 16, "hop_length": 12, "n_res_block": 2, "n_rnn": 32, "n_fc": 32},
        (features(1, 1, 12 * 6), features(1, 1, 128, 10)),
    ),
}


def _sound(name: str) -> Hard:
    function, settings, inputs = SOUND[name]

    def build() -> nn.Module:
        module: nn.Module = getattr(_import_torchaudio(), function)(**settings)
        return module

    return Hard(name, build, inputs)


FAMILIES: dict[str, Family] = {
    "hard": _table({row.name: row for row in HARD}),
    "by name": Family(_known_names, _known),
    "torchvision": Family(_torchvision_names, _torchvision),
    "timm": Family(_timm_names, _timm),
    "transformers": Family(lambda: list(TRANSFORMERS), _transformers),
    "ultralytics": Family(lambda: YOLO, _ultralytics),
    "segmentation": Family(_segmentation_names, _segmentation),
    "torchaudio": Family(lambda: list(SOUND), _sound),
}
