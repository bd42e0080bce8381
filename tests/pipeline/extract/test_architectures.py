"""One tiny random teacher of each architecture: the embedding is what the architecture's authors mean.

What is expected is computed beside the pipeline, from the outputs of the model's own parts.
"""

import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import Tensor
from torch.nn.functional import layer_norm

from pipeline.errors import PipelineError
from pipeline.extract.config import Pooling
from pipeline.extract.teacher import Teacher, load_teacher
from tests.conftest import make_images

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
PICTURES = TINY | {"image_size": 16, "patch_size": 8}
DINO = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16, "patch_size": 8}
TEXT = TINY | {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
STAGES = {"hidden_sizes": [4, 8], "depths": [1, 1]}
DUAL = {"text_config": TEXT, "vision_config": PICTURES}

Parts = dict[str, Tensor]
Expected = Callable[[Any, Parts], Tensor]


def load(folder: object, pooling: Pooling = "auto", precision: torch.dtype = torch.float32) -> Teacher:
    return load_teacher(str(folder), None, pooling, torch.device("cpu"), precision)


def randomise(model: torch.nn.Module) -> None:
    """Fill weights and statistics with noise: fresh norms and tokens are ones and zeros, and would not be missed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim >= 2:
                torch.nn.init.kaiming_normal_(tensor)
            elif "running_var" in name:
                tensor.uniform_(0.2, 0.6)
            elif tensor.is_floating_point():
                tensor.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.3)


def save(model: Any, folder: Path, side_px: int = 16) -> Path:
    randomise(model)
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": side_px, "width": side_px}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    return folder


def parts_of(model: Any, pixels: Tensor) -> Parts:
    """Run a model and keep the output of each of its modules, by name."""
    parts: Parts = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            if isinstance(found, Tensor):
                parts[name] = found

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(pixels)
    for handle in handles:
        handle.remove()
    return parts


def norm(values: Tensor, module: Any) -> Tensor:
    return layer_norm(values, values.shape[-1:], module.weight, module.bias, module.eps)


def token(part: str, index: int = 0) -> Expected:
    return lambda model, parts: parts[part][:, index]


def tokens(part: str, first: int, last: int | None = None) -> Expected:
    return lambda model, parts: parts[part][:, first:last].mean(dim=1)


def positions(part: str) -> Expected:
    return lambda model, parts: parts[part].mean(dim=(2, 3))


def own(part: str) -> Expected:
    return lambda model, parts: parts[part].flatten(1)


def clip_cls(model: Any, parts: Parts) -> Tensor:
    return norm(parts["encoder.layers.0"][:, 0], model.post_layernorm)


def after_norm(part: str) -> Expected:
    """Mean over positions, then the last norm."""
    return lambda model, parts: norm(parts[part].mean(dim=(2, 3)), model.layernorm)


def beit_mean(model: Any, parts: Parts) -> Tensor:
    return norm(parts["layers.3"][:, 1:].mean(dim=1), model.pooler.layernorm)


@dataclass(frozen=True)
class Architecture:
    """How to make one, what `auto` means for it, and what is expected of each pooling that fits."""

    make: Callable[[], Any]
    auto: str
    expected: dict[str, Expected]
    side_px: int = 16


def beit(use_mean_pooling: bool) -> Any:
    sizes = PICTURES | {"num_hidden_layers": 4, "use_mean_pooling": use_mean_pooling}
    return transformers.BeitModel(transformers.BeitConfig(**sizes))


ARCHITECTURES = {
    "vit": Architecture(
        lambda: transformers.ViTModel(transformers.ViTConfig(**PICTURES)),
        "cls",
        {"cls": token("layernorm"), "mean": tokens("layernorm", 1), "pooled": own("pooler")},
    ),
    "deit": Architecture(
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**PICTURES)),
        "distilled",
        {
            "distilled": lambda model, parts: (parts["layernorm"][:, 0] + parts["layernorm"][:, 1]) / 2,
            "cls": token("layernorm"),
            "mean": tokens("layernorm", 2),
        },
    ),
    "deit-one-head": Architecture(
        lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**PICTURES)),
        "cls",
        {"cls": token("layernorm"), "distilled": tokens("layernorm", 0, 2), "mean": tokens("layernorm", 2)},
    ),
    "beit": Architecture(
        lambda: beit(use_mean_pooling=True),
        "pooled",
        {"pooled": beit_mean, "cls": token("layers.3"), "mean": tokens("layers.3", 1)},
    ),
    "beit-cls": Architecture(
        lambda: beit(use_mean_pooling=False),
        "cls",
        {"cls": token("layernorm"), "pooled": token("layernorm"), "mean": tokens("layernorm", 1)},
    ),
    "dinov2": Architecture(
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO, mlp_ratio=2)),
        "cls",
        {"cls": token("layernorm"), "pooled": token("layernorm"), "mean": tokens("layernorm", 1)},
    ),
    "dinov2-registers": Architecture(
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=3)
        ),
        "cls",
        {"cls": token("layernorm"), "pooled": token("layernorm"), "mean": tokens("layernorm", 4)},
    ),
    "dinov3": Architecture(
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**PICTURES, num_register_tokens=3)),
        "cls",
        {"cls": token("norm"), "pooled": token("norm"), "mean": tokens("norm", 4)},
    ),
    "dinov3-convnext": Architecture(
        lambda: transformers.DINOv3ConvNextModel(
            transformers.DINOv3ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], image_size=64)
        ),
        "pooled",
        {"pooled": token("layer_norm"), "mean": tokens("layer_norm", 1)},
        side_px=64,
    ),
    "clip": Architecture(
        lambda: transformers.CLIPModel(transformers.CLIPConfig(**DUAL, projection_dim=6)),
        "cls",
        {
            "cls": clip_cls,
            "pooled": clip_cls,
            "mean": tokens("encoder.layers.0", 1),
            "projected": lambda model, parts: clip_cls(model.vision_model, parts) @ model.visual_projection.weight.T,
        },
    ),
    "clip-vision": Architecture(
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PICTURES)),
        "cls",
        {"cls": clip_cls, "pooled": clip_cls, "mean": tokens("encoder.layers.0", 1)},
    ),
    "clip-vision-projected": Architecture(
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**PICTURES, projection_dim=6)),
        "cls",
        {
            "cls": clip_cls,
            "projected": lambda model, parts: clip_cls(model.vision_model, parts) @ model.visual_projection.weight.T,
        },
    ),
    "chinese-clip": Architecture(
        lambda: transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**DUAL, projection_dim=6)),
        "cls",
        {
            "cls": clip_cls,
            "projected": lambda model, parts: clip_cls(model.vision_model, parts) @ model.visual_projection.weight.T,
        },
    ),
    "siglip": Architecture(
        lambda: transformers.SiglipModel(transformers.SiglipConfig(**DUAL)),
        "pooled",
        {
            "pooled": own("head"),
            "projected": own("head"),
            "mean": lambda model, parts: norm(parts["encoder.layers.0"], model.post_layernorm).mean(dim=1),
        },
    ),
    "siglip-vision": Architecture(
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PICTURES)),
        "pooled",
        {"pooled": own("head"), "projected": own("head"), "mean": tokens("post_layernorm", 0)},
    ),
    "aimv2": Architecture(  # its head has a token that is no token of the sequence
        lambda: transformers.Aimv2Model(transformers.Aimv2Config(**DUAL, projection_dim=6)),
        "pooled",
        {"pooled": own("head"), "mean": tokens("rms_norm", 0)},
    ),
    "i-jepa": Architecture(
        lambda: transformers.IJepaModel(transformers.IJepaConfig(**PICTURES)),
        "mean",
        {"mean": tokens("layernorm", 0)},
    ),
    "cvt": Architecture(  # keeps [CLS] apart from its positions
        lambda: transformers.CvtModel(
            transformers.CvtConfig(embed_dim=[4, 8, 8], num_heads=[1, 1, 1], depth=[1, 2, 3])
        ),
        "cls",
        {"cls": token("encoder.stages.2.layers.2"), "mean": tokens("encoder.stages.2.layers.2", 1)},
        side_px=64,
    ),
    "swin": Architecture(
        lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN)),
        "pooled",
        {"pooled": tokens("layernorm", 0), "mean": tokens("layernorm", 0)},
    ),
    "swinv2": Architecture(
        lambda: transformers.Swinv2Model(transformers.Swinv2Config(**SWIN)),
        "pooled",
        {"pooled": tokens("layernorm", 0), "mean": tokens("layernorm", 0)},
    ),
    "convnext": Architecture(
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**STAGES, num_stages=2)),
        "pooled",
        {"pooled": after_norm("encoder"), "mean": positions("encoder")},
        side_px=32,
    ),
    "convnextv2": Architecture(
        lambda: transformers.ConvNextV2Model(transformers.ConvNextV2Config(**STAGES, num_stages=2)),
        "pooled",
        {"pooled": after_norm("encoder"), "mean": positions("encoder")},
        side_px=32,
    ),
    "efficientnet": Architecture(
        lambda: transformers.EfficientNetModel(
            transformers.EfficientNetConfig(
                image_size=32,
                width_coefficient=0.1,
                depth_coefficient=0.1,
                hidden_dim=128,
                out_channels=[8] * 7,
                in_channels=[8] * 7,
                strides=[1] * 7,
                depthwise_padding=[],
            )
        ),
        "pooled",
        {"pooled": positions("encoder"), "mean": positions("encoder")},
        side_px=32,
    ),
    "mobilenet-v1": Architecture(
        lambda: transformers.MobileNetV1Model(
            transformers.MobileNetV1Config(image_size=64, depth_multiplier=0.02, min_depth=4)
        ),
        "pooled",
        {"pooled": positions("layer.25"), "mean": positions("layer.25")},
        side_px=64,
    ),
    "mobilenet-v2": Architecture(
        lambda: transformers.MobileNetV2Model(
            transformers.MobileNetV2Config(image_size=64, depth_multiplier=0.05, min_depth=4, depth_divisible_by=4)
        ),
        "pooled",
        {"pooled": positions("conv_1x1"), "mean": positions("conv_1x1")},
        side_px=64,
    ),
    "resnet": Architecture(
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(**STAGES, embedding_size=4, layer_type="basic")
        ),
        "pooled",
        {"pooled": positions("encoder"), "mean": positions("encoder")},
        side_px=32,
    ),
    "regnet": Architecture(
        lambda: transformers.RegNetModel(transformers.RegNetConfig(**STAGES, embedding_size=4, groups_width=2)),
        "pooled",
        {"pooled": positions("encoder"), "mean": positions("encoder")},
        side_px=32,
    ),
}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def inner(model: Any) -> Any:
    """Return the image encoder within a model."""
    if "ForImageClassification" in type(model).__name__:
        return getattr(model, model.base_model_prefix)
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_embedding_is_what_the_authors_of_the_architecture_mean(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make().eval()
    folder = save(model, tmp_path / name, architecture.side_px)
    auto = load(folder)
    assert auto.info.pooling == architecture.auto
    assert auto.info.architecture == type(inner(model)).__name__
    pixels = auto.preprocess(make_images(3, 0, size=40))
    parts = parts_of(inner(model), pixels)
    found = {}
    for pooling, expected in architecture.expected.items():
        teacher = auto if pooling == architecture.auto else load(folder, pooling)  # type: ignore[arg-type]
        with torch.no_grad():
            wanted = expected(model if pooling == "projected" else inner(model), parts)
        found[pooling] = teacher.embed(pixels)
        assert teacher.info.embed_dim == wanted.shape[1]
        assert wanted.std(dim=0).norm() > 1e-3 * wanted.norm(), "the images are not told apart: nothing is tested"
        assert_close(found[pooling], wanted)
    assert load(folder, precision=torch.bfloat16).embed(pixels).isfinite().all()


# Models of timm


def save_timm(name: str, folder: Path, **arguments: Any) -> torch.nn.Module:
    """Save a model as timm's own repositories have it: bare weights, and one config.json for everything."""
    model: torch.nn.Module = timm.create_model(name, num_classes=5, **arguments).eval()
    randomise(model)
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    kept = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "license", "classifier")
    settings: Any = model.pretrained_cfg
    side_px = arguments.get("img_size", 0)
    given = {"input_size": (3, side_px, side_px)} if side_px else {}
    config = {
        "architecture": name,
        "num_classes": 5,
        "pretrained_cfg": {key: settings[key] for key in kept if key in settings} | given,
        "model_args": arguments,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


TIMM_VIT = {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 32}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TIMM_VIT),
    "deit": ("deit_tiny_distilled_patch16_224", TIMM_VIT),
    "beit": ("beitv2_base_patch16_224", TIMM_VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", TIMM_VIT | {"img_size": 28, "patch_size": 14}),
    "siglip": ("vit_base_patch16_siglip_224", TIMM_VIT),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "img_size": 56}),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_a_model_of_timm_gives_its_own_pooled_output(kind: str, tmp_path: Path) -> None:
    name, arguments = TIMM[kind]
    model: Any = save_timm(name, tmp_path / kind, **arguments)
    teacher = load(tmp_path / kind)
    assert (teacher.info.pooling, teacher.info.architecture) == ("pooled", f"TimmWrapperModel {name}")
    images = make_images(3, 0, size=300)
    pixels = teacher.preprocess(images)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(json.loads((tmp_path / kind / "config.json").read_text())["pretrained_cfg"])
    )
    assert torch.equal(pixels, torch.stack([transform(image) for image in images]))
    with torch.no_grad():
        features = model.forward_features(pixels)
        expected = model.forward_head(features, pre_logits=True)
    assert expected.std(dim=0).norm() > 1e-3 * expected.norm()
    assert_close(teacher.embed(pixels), expected)
    num_special = {"vit": 1, "deit": 2, "beit": 1, "dinov2": 5}.get(kind, 0)
    axes = {"swin": (1, 2)}.get(kind, (2, 3))  # timm's Swin has its channels last
    mean = features[:, num_special:].mean(dim=1) if features.ndim == 3 else features.mean(dim=axes)
    assert_close(load(tmp_path / kind, "mean").embed(pixels), mean)
    if num_special:
        assert_close(load(tmp_path / kind, "cls").embed(pixels), features[:, 0])


def test_the_two_tokens_of_a_distilled_model_of_timm_can_be_asked_for(tmp_path: Path) -> None:
    name, arguments = TIMM["deit"]
    save_timm(name, tmp_path / "deit", **arguments)
    teacher = load(tmp_path / "deit", "distilled")
    pixels = teacher.preprocess(make_images(2, 0))
    assert_close(teacher.embed(pixels), load(tmp_path / "deit").embed(pixels))


def test_the_preprocessing_of_timm_is_described_and_travels_to_other_processes(tmp_path: Path) -> None:
    save_timm("test_resnet", tmp_path / "resnet")
    preprocess = load(tmp_path / "resnet").preprocess
    settings = preprocess.describe()
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["image_processor_type"], settings["backend"]) == ("TimmWrapperImageProcessor", "timm")
    assert settings["architecture"] == "test_resnet"
    assert settings["data_config"]["input_size"] == [3, 160, 160]
    assert settings["data_config"]["interpolation"] == "bilinear"
    images = make_images(2, 0)
    assert torch.equal(pickle.loads(pickle.dumps(preprocess))(images), preprocess(images))


# What is said and recorded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", None),
        ("clip", None),
        ("deit", "DeiTModel was distilled through a token of its own: its mean with [CLS] is the embedding."),
        ("beit", "BeitModel was made to be pooled over patches, and is."),
        ("siglip", "SiglipVisionModel has no [CLS] token: its own pooled output is the embedding."),
        ("i-jepa", "IJepaModel has no pooled output: the mean of its tokens is the embedding."),
    ],
)
def test_why_another_pooling_than_the_class_token_was_chosen_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, message: str | None
) -> None:
    folder = save(ARCHITECTURES[name].make(), tmp_path / name)
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        load(folder)
    assert caplog.messages[-1:] == ([message] if message else [])


def test_that_a_model_of_timm_pools_by_itself_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_timm("test_resnet", tmp_path / "resnet")
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        load(tmp_path / "resnet")
    assert caplog.messages == [
        "TimmWrapperModel test_resnet is a model of timm: its own pooled output is the embedding."
    ]


def test_the_projection_is_hashed_where_it_makes_the_embedding(tmp_path: Path) -> None:
    folder = save(ARCHITECTURES["clip"].make(), tmp_path / "clip")
    before = {pooling: load(folder, pooling).info.weights_sha256 for pooling in ("cls", "projected")}
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    after = {pooling: load(folder, pooling).info.weights_sha256 for pooling in ("cls", "projected")}
    assert len({*before.values(), *after.values()}) == 3
    assert before["cls"] == after["cls"]


# Refusals


NO_SPACE = (
    "has no projection into a space that it shares with a text tower, which --class-text and --pooling projected need."
)


@pytest.mark.parametrize(
    ("name", "pooling", "message"),
    [
        ("vit", "projected", f"ViTModel {NO_SPACE} Pass --pooling cls, pooled or mean."),
        ("vit", "distilled", "ViTModel has no distillation token. Pass --pooling cls, pooled or mean."),
        ("clip-vision", "projected", f"CLIPVisionModel {NO_SPACE} Pass --pooling cls, pooled or mean."),
        ("siglip", "cls", "SiglipVisionModel has no [CLS] token. Pass --pooling pooled, mean or projected."),
        ("aimv2", "cls", "Aimv2VisionModel has no [CLS] token. Pass --pooling pooled, mean or projected."),
        (
            "deit",
            "pooled",
            "the checkpoint has no weights for the pooler. Pass --pooling cls, distilled or mean.",
        ),
        ("resnet", "projected", f"ResNetModel {NO_SPACE} Pass --pooling pooled or mean."),
    ],
)
def test_a_pooling_that_does_not_fit_is_refused(tmp_path: Path, name: str, pooling: Pooling, message: str) -> None:
    folder = save(ARCHITECTURES[name].make(), tmp_path / name, ARCHITECTURES[name].side_px)
    with pytest.raises(PipelineError) as refused:
        load(folder, pooling)
    assert str(refused.value) == f"{folder}: {message}"


def test_a_projection_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    folder = save(ARCHITECTURES["clip"].make(), tmp_path / "clip")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PipelineError) as refused:
        load(folder, "projected")
    assert str(refused.value) == f"{folder}: CLIPVisionModel {NO_SPACE} Pass --pooling cls, pooled or mean."
    assert load(folder, "pooled").info.pooling == "pooled"


def test_a_siglip_tower_without_its_pooling_head_is_averaged(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(**PICTURES, vision_use_head=False)
    folder = save(transformers.SiglipVisionModel(config), tmp_path / "siglip")
    assert load(folder).info.pooling == "mean"
    with pytest.raises(PipelineError, match="SiglipVisionModel has no projection"):
        load(folder, "projected")


def test_a_teacher_of_images_of_any_size_is_refused(tmp_path: Path) -> None:
    vision = TINY | {"patch_size": 8, "num_patches": 4}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))
    folder = save(model, tmp_path / "naflex")
    with pytest.raises(PipelineError) as refused:
        load(folder)
    assert str(refused.value) == (
        f"{folder}: Siglip2VisionModel takes images of any size as lists of patches (NaFlex), which is not supported. "
        "Take a checkpoint of one size, e.g. google/siglip2-base-patch16-224."
    )
