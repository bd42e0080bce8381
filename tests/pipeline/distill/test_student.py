import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.distill.images import fit_to
from pipeline.distill.recipe import load_recipe
from pipeline.distill.student import (
    Student,
    StudentConfig,
    build_student,
    load_student,
    save_student,
    student_config,
)
from pipeline.errors import PipelineError
from pipeline.pixels import to_rgb
from tests.conftest import CLASS_NAMES
from tests.pipeline.distill.examples import equal_weights, file_names, make_student, weights_of

Document = dict[str, Any]
HUNDRED = tuple(f"class {index}" for index in range(100))
ANY_LANGUAGE = ("ant", "Käfer, grün", "猫")


def config_of(name: str, image_size: int = 32, class_names: tuple[str, ...] = CLASS_NAMES) -> StudentConfig:
    return student_config(name, image_size, class_names, load_recipe("paper"))


def build_refusal(name: str, image_size: int = 32) -> str:
    with pytest.raises(PipelineError) as caught:
        build_student(config_of(name, image_size))
    return str(caught.value)


def load_refusal(folder: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        load_student(folder)
    return str(caught.value)


def change_config(folder: Path, change: Callable[[Document], object]) -> None:
    document = json.loads((folder / "config.json").read_text("utf-8"))
    change(document)
    (folder / "config.json").write_text(json.dumps(document), "utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    save_student(make_student("test_vit", 32), folder)
    return folder


@pytest.fixture(scope="module")
def base() -> Student:
    return make_student("base", 32, ANY_LANGUAGE)


# What students are


@pytest.mark.parametrize(("name", "depth", "width"), [("base", 6, 256), ("large", 10, 512)])
def test_students_of_table_one_have_its_sizes(name: str, depth: int, width: int) -> None:
    config = config_of(name, 32, HUNDRED)
    with torch.device("meta"):  # sizes without memory
        model = timm.create_model(config.architecture, num_classes=100, **config.model_args)
    tokens, patch = 8 * 8 + 1, 3 * 4 * 4
    mlp = 4 * width
    attention = width * 3 * width + 3 * width + width * width + width
    block = 2 * width + attention + 2 * width + width * mlp + mlp + mlp * width + width
    # Bias-free patches, [CLS], positions, the norm before the blocks, the blocks, the last norm, the classifier.
    expected = patch * width + width + tokens * width + 2 * width + depth * block + 2 * width + width * 100 + 100
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert expected == {"base": 4_794_468, "large": 31_635_556}[name]
    assert len(model.blocks) == depth
    assert {block.attn.num_heads for block in model.blocks} == {8}
    assert {block.mlp.fc1.out_features for block in model.blocks} == {mlp}
    assert mlp == {"base": 1024, "large": 2048}[name]


def test_base_is_a_clip_style_transformer(base: Student) -> None:
    model = cast(Any, base.model)
    assert model.patch_embed.patch_size == (4, 4)
    assert model.patch_embed.proj.bias is None
    assert isinstance(model.norm_pre, nn.LayerNorm)
    assert isinstance(model.norm, nn.LayerNorm)
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.1}
    values = torch.linspace(-3, 3, 7)
    assert torch.allclose(model.blocks[0].mlp.act(values), values * torch.sigmoid(1.702 * values))  # QuickGELU


@pytest.mark.parametrize("name", ["base", "test_vit"])
def test_stochastic_depth_grows_towards_the_last_block(name: str, tmp_path: Path) -> None:
    recipe = load_recipe("paper", {"stochastic_depth": 0.2, "attention_dropout": 0.0})
    student = build_student(student_config(name, 32, CLASS_NAMES, recipe))
    blocks = cast(Any, student.model).blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.2 * place / (len(blocks) - 1) for place in range(len(blocks))])
    assert {block.attn.attn_drop.p for block in blocks} == {0.0}
    save_student(student, tmp_path / "student")
    assert load_student(tmp_path / "student").config == student.config


def test_without_stochastic_depth_a_model_is_not_asked_for_it() -> None:
    assert "drop_path_rate" not in config_of("base").model_args
    assert "drop_path_rate" not in config_of("test_vit").model_args


def test_a_model_without_stochastic_depth_is_refused_where_that_is_asked_for() -> None:
    recipe = load_recipe("paper", {"stochastic_depth": 0.1})
    with pytest.raises(PipelineError) as caught:
        build_student(student_config("vgg11", 32, CLASS_NAMES, recipe))
    assert str(caught.value) == "student vgg11: has no stochastic depth. Pass --set stochastic_depth=0."


def test_the_embedding_is_the_class_token_after_the_last_norm(base: Student) -> None:
    model = cast(Any, base.model)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embedding, logits = base(pixels)
        assert torch.equal(embedding, model.forward_features(pixels)[:, 0])
        assert torch.equal(logits, model(pixels))
    assert embedding.shape == (2, base.embed_dim) == (2, 256)
    assert logits.shape == (2, 3)


def test_pixels_are_normalised_by_mean_and_deviation_of_each_colour() -> None:
    student = make_student("test_efficientnet", 8)
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    pixels[0, 2, 5] = torch.tensor([255, 51, 0], dtype=torch.uint8)
    found = student.normalise(pixels)
    expected = [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    assert found.shape == (1, 3, 8, 8)
    assert found[0, :, 2, 5].tolist() == pytest.approx(expected)
    assert found[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)


def test_a_convolutional_student_has_pooled_features_as_embedding() -> None:
    student = make_student("test_resnet", 8)
    model = cast(Any, student.model)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        embedding, logits = student(pixels)
        assert torch.allclose(embedding, model.forward_features(pixels).mean(dim=(2, 3)), atol=1e-6)
        assert torch.equal(logits, student.classifier(embedding))


def test_a_timm_student_keeps_its_own_normalisation() -> None:
    config = config_of("test_efficientnet", 8)
    assert config.mean == (0.485, 0.456, 0.406)
    assert config.std == (0.229, 0.224, 0.225)
    assert config.model_args == {}
    assert config_of("test_vit").model_args == {"img_size": 32}  # positions are for one size


def test_a_model_without_pretrained_weights_has_clips_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    config = config_of("test_resnet")
    assert (config.mean, config.std) == (config_of("base").mean, config_of("base").std)


# What students are refused


def test_an_unknown_student_is_refused_with_similar_names() -> None:
    with pytest.raises(PipelineError) as caught:
        config_of("test_resne")
    assert str(caught.value) == ("student 'test_resne' is neither base, large nor a timm model. Similar: test_resnet.")
    with pytest.raises(PipelineError) as caught:
        config_of("hf-hub:owner/model")
    assert str(caught.value) == "student 'hf-hub:owner/model' is neither base, large nor a timm model."


def test_an_unknown_pretrained_tag_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"^student 'test_vit\.nonsense'"):
        config_of("test_vit.nonsense")


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        (
            "base",
            30,
            "student vit_tiny_patch16_224: image size 30 is not divisible by its patch size 4. "
            "Pass --image-size 28 or 32.",
        ),
        (
            "test_vit",
            8,
            "student test_vit: image size 8 is not divisible by its patch size 16. Pass --image-size 16.",
        ),
    ],
)
def test_a_size_that_patches_do_not_divide_is_refused(name: str, image_size: int, message: str) -> None:
    assert build_refusal(name, image_size) == message


def test_a_size_too_small_for_a_student_is_refused() -> None:
    message = build_refusal("test_convnext", 8)
    assert message.startswith("student test_convnext: does not work on images of 8×8 pixels (")


def test_a_student_with_two_classifiers_is_refused() -> None:
    assert build_refusal("deit_tiny_distilled_patch16_224") == (
        "student deit_tiny_distilled_patch16_224: its classifier is not one linear layer. Choose another timm model."
    )


class Crooked(nn.Module):
    """Its logits are twice what its classifier makes of its embedding, or its embedding is no vector."""

    def __init__(self, scale: float, embedding_ndim: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.scale, self.embedding_ndim = scale, embedding_ndim

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward_features(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features if self.embedding_ndim == 2 else features[:, None, :]

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.forward_features(pixels) + 1) * self.scale
        return logits


def test_a_student_whose_logits_do_not_follow_from_its_embedding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Crooked(2, 2))
    assert build_refusal("test_resnet") == (
        "student test_resnet: its logits are not a linear function of its embedding. Choose another model."
    )


# Three ways to open one folder


def our_logits(folder: Path, image: Image.Image) -> Tensor:
    student = load_student(folder)
    pixels = torch.from_numpy(np.array(fit_to(student.config.image_size)(to_rgb(image))))[None]
    logits: Tensor = student(student.normalise(pixels))[1]
    return logits


def timm_logits(folder: Path, image: Image.Image) -> Tensor:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    logits: Tensor = model(transform(image)[None])
    return logits


def transformers_logits(folder: Path, image: Image.Image) -> Tensor:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits: Tensor = model(**processor(image, return_tensors="pt")).logits
    return logits


@pytest.mark.parametrize("name", ["base", "test_resnet", "test_vit.r160_in1k", "test_efficientnet"])
def test_timm_transformers_and_we_compute_equal_logits_from_one_image(name: str, base: Student, tmp_path: Path) -> None:
    student = base if name == "base" else make_student(name, 32, ANY_LANGUAGE)
    save_student(student, tmp_path / "student")
    random = np.random.default_rng(0)
    for height, width in ((32, 32), (50, 37), (20, 90)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        with torch.no_grad():
            ours = our_logits(tmp_path / "student", image)
            assert torch.equal(timm_logits(tmp_path / "student", image), ours), (height, width)
            assert torch.equal(transformers_logits(tmp_path / "student", image), ours), (height, width)


def test_transformers_knows_the_class_names(saved: Path) -> None:
    from transformers import AutoConfig

    save_student(make_student("test_vit", 32, ANY_LANGUAGE), saved)
    config = AutoConfig.from_pretrained(saved)
    assert config.id2label == dict(enumerate(ANY_LANGUAGE))
    assert config.label2id == {name: index for index, name in enumerate(ANY_LANGUAGE)}
    assert config.num_labels == 3


# The folder


def test_a_saved_student_is_loaded_as_it_was(tmp_path: Path) -> None:
    student = make_student("test_resnet", 8, ANY_LANGUAGE).train()
    save_student(student, tmp_path / "student")
    assert file_names(tmp_path / "student") == ["config.json", "model.safetensors"]
    loaded = load_student(tmp_path / "student")
    assert not loaded.training
    assert loaded.config == student.config
    assert loaded.config.class_names == ANY_LANGUAGE
    assert equal_weights(weights_of(loaded), weights_of(student))
    assert equal_weights(load_file(tmp_path / "student" / "model.safetensors"), weights_of(student))


def test_a_run_directory_opens_as_its_student(saved: Path) -> None:
    assert equal_weights(weights_of(load_student(saved.parent)), weights_of(load_student(saved)))


def test_an_older_student_is_replaced(saved: Path) -> None:
    newer = make_student("test_resnet", 8, seed=1)
    save_student(newer, saved)
    assert file_names(saved) == ["config.json", "model.safetensors"]
    assert equal_weights(weights_of(load_student(saved)), weights_of(newer))


def test_weights_are_aligned_for_readers_that_map_the_file(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 64 == 0
    del header["__metadata__"]
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
    begins = [start + entry["data_offsets"][0] for entry in header.values()]
    whole = [begin for begin, size in zip(begins, sizes, strict=True) if size % 64 == 0]
    assert len(whole) > 10
    assert all(begin % 64 == 0 for begin in whole)
    assert start + sum(sizes) == len(content)


# Folders of strangers


def load_checkpoint(document: Document) -> None:
    document["model_args"]["checkpoint_path"] = "weights.pth"


def name_the_hub(document: Document) -> None:
    document["architecture"] = "hf-hub:owner/model"


def name_a_folder(document: Document) -> None:
    document["architecture"] = "local-dir:elsewhere"


def name_a_number(document: Document) -> None:
    document["architecture"] = 5


@pytest.mark.parametrize("change", [load_checkpoint, name_the_hub, name_a_folder, name_a_number])
def test_a_configuration_that_would_load_something_else_is_refused(
    change: Callable[[Document], None], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(saved, change)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("a model was made"))
    assert load_refusal(saved) == f"{saved}: config.json does not describe a student of this program."


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_layer", "nonsense"),
        ("act_layer", ["gelu"]),
        ("patch_size", 0),
        ("num_heads", 0),
        ("num_heads", 7),
        ("embed_dim", 0),
        ("depth", -1),
        ("depth", "six"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_arguments_that_make_no_model_are_refused(field: str, value: object, saved: Path) -> None:
    change_config(saved, lambda document: document["model_args"].update({field: value}))
    message = load_refusal(saved)
    assert message.startswith("student test_vit: ")
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, -16, 40, float("inf"), "large", None])
def test_an_image_size_that_cannot_be_is_refused(size: object, saved: Path) -> None:
    change_config(saved, lambda document: document["pretrained_cfg"].update(input_size=[3, size, size]))
    assert load_refusal(saved)


NO_STUDENT = "config.json does not describe a student of this program"
NO_FIT = "model.safetensors does not fit config.json"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_names", "abc", f"{NO_STUDENT}: label_names is no list of names."),
        ("label_names", ["ant", "bee", 3], f"{NO_STUDENT}: label_names is no list of names."),
        ("label_names", ["ant", "bee", "ant"], f"{NO_STUDENT}: a name stands twice in label_names."),
        ("input_size", [3, 0, 0], f"{NO_STUDENT}: input_size is 0, expected 1 to 4096."),
        ("input_size", [3, 4097, 4097], f"{NO_STUDENT}: input_size is 4097, expected 1 to 4096."),
        ("input_size", [3, 64, 64], f"{NO_STUDENT}: img_size is 32, input_size 64."),
        ("mean", [0, float("nan"), 0], f"{NO_STUDENT}: mean is [0.0, nan, 0.0], expected three numbers."),
        ("mean", [0], f"{NO_STUDENT}: mean is [0.0], expected three numbers."),
        ("std", [1, 0, 1], f"{NO_STUDENT}: std is [1.0, 0.0, 1.0], expected three numbers above 0."),
        ("std", [1, 1, float("inf")], f"{NO_STUDENT}: std is [1.0, 1.0, inf], expected three numbers above 0."),
        ("label_names", [str(name) for name in range(5_000)], f"{NO_FIT} (number of label_names is 5000, "),
        ("depth", 10_000_000, f"{NO_FIT} (depth is 10000000, tensors there are 80)."),
        ("embed_dim", 6_400, f"{NO_FIT} (embed_dim is 6400, longest side of a tensor "),
        ("patch_size", 10**30, f"{NO_FIT} (patch_size is {10**30}, longest side of a tensor "),
        ("mlp_ratio", 1e9, f"{NO_FIT} (Error(s) in loading state_dict for VisionTransformer: "),
        ("embed_dim", 128, f"{NO_FIT} (Error(s) in loading state_dict for VisionTransformer: "),
    ],
)
def test_what_a_stranger_asks_for_is_refused_before_it_takes_memory(
    field: str, value: object, message: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(document: Document) -> None:
        among_args = field in ("depth", "embed_dim", "patch_size", "mlp_ratio")
        part = document["model_args" if among_args else "pretrained_cfg"]
        (document if field == "label_names" else part)[field] = value

    change_config(saved, change)
    monkeypatch.setattr("pipeline.distill.student.build_student", lambda config: pytest.fail("memory was taken"))
    assert load_refusal(saved).startswith(f"{saved}: {message}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depth", 1e7, "depth is 10000000.0, expected a whole number."),
        ("embed_dim", [64], "embed_dim is [64], expected a whole number."),
        ("num_heads", True, "num_heads is True, expected a whole number."),
        ("mlp_ratio", "4", "mlp_ratio is '4', expected a number."),
        ("pre_norm", 1, "pre_norm is 1, expected true or false."),
    ],
)
def test_an_argument_of_another_type_is_refused(field: str, value: object, message: str, saved: Path) -> None:
    change_config(saved, lambda document: document["model_args"].update({field: value}))
    assert load_refusal(saved) == f"student test_vit: {message}"


def test_weights_that_are_not_finite_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert load_refusal(saved) == f"{saved}: the student is damaged: {name} has values that are not finite."


def test_a_large_configuration_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.distill.provenance._MAX_BYTES", 100)
    assert load_refusal(saved) == f"{saved}: the student is damaged (ValueError: larger than 100 bytes)."


def test_a_model_that_has_no_outline_without_memory_is_loaded_all_the_same(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def fail_without_memory(*args: Any, **kwargs: Any) -> Any:
        if torch.empty(0).is_meta:
            raise NotImplementedError("no such kernel")
        return create(*args, **kwargs)

    expected = weights_of(load_student(saved))
    monkeypatch.setattr(timm, "create_model", fail_without_memory)
    assert equal_weights(weights_of(load_student(saved)), expected)


def test_memory_that_runs_out_is_no_fault_of_the_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(timm, "create_model", fail)
    assert build_refusal("test_resnet") == (
        "out of memory: student test_resnet at batch size 2. A smaller model is needed."
    )


def test_no_student_is_made_that_could_not_be_loaded() -> None:
    assert config_of("test_resnet", 4096).image_size == 4096
    with pytest.raises(PipelineError) as caught:
        config_of("test_resnet", 4097)
    assert str(caught.value) == "student 'test_resnet': image size 4097 is above 4096. Pass a smaller --image-size."


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(file: str, saved: Path) -> None:
    (saved / file).unlink()
    assert load_refusal(saved) == f"{saved}: no student here ({file} is missing). Pass a run directory."


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    assert load_refusal(folder) == f"{folder}: no student here (config.json is missing). Pass a run directory."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "JSONDecodeError: "),
        (b"[]", "TypeError: "),
        (b"{}", "KeyError: 'pretrained_cfg'"),
        (b"\xff", "UnicodeDecodeError: "),
        (b"[" * 100_000, "RecursionError: "),
    ],
    ids=["cut", "list", "empty", "not text", "deep"],
)
def test_a_damaged_configuration_is_refused(content: bytes, reason: str, saved: Path) -> None:
    (saved / "config.json").write_bytes(content)
    assert load_refusal(saved).startswith(f"{saved}: the student is damaged ({reason}")


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_truncated_weights_are_refused(kept: int, saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert load_refusal(saved).startswith(f"{saved}: the student is damaged (SafetensorError: ")


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    change_config(saved, lambda document: document.update(label_names=["ant", "bee"]))
    message = load_refusal(saved)
    assert message.startswith(f"{saved}: model.safetensors does not fit config.json (Error(s) in loading state_dict")
    assert "size mismatch for head.weight" in message
    assert "\n" not in message


def test_weights_that_lack_a_tensor_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["head.bias"]
    save_file(weights, saved / "model.safetensors")
    assert 'Missing key(s) in state_dict: "head.bias"' in load_refusal(saved)


def test_a_model_of_which_layers_share_their_weights_is_refused_before_it_is_trained() -> None:
    assert build_refusal("coat_lite_tiny", 32) == (
        "student coat_lite_tiny: has layers that share their weights. Choose another model."
    )


def test_a_model_with_weights_of_other_types_is_refused_before_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def with_odd_buffer(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        model.register_buffer("odd", torch.zeros(1, dtype=torch.float16))
        return model

    monkeypatch.setattr(timm, "create_model", with_odd_buffer)
    with pytest.raises(PipelineError) as refused:
        build_student(config_of("test_resnet", 32, ("a", "b")))
    assert str(refused.value) == (
        "student test_resnet: has weights of other types than float32 and int64. Choose another model."
    )
