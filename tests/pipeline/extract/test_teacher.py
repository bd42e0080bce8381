"""The teacher: which models are taken, how one embedding is made, and what is refused."""

import builtins
import hashlib
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.extract.config import Pooling
from pipeline.extract.teacher import Preprocess, Teacher, load_teacher
from tests.conftest import make_images

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGES = make_images(5, 3, size=20)
ADVICE = "It must be a transformers model with safetensors weights, by hub name or as a folder."
VIT_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
TINY_PICTURES = TINY | {"image_size": 16, "patch_size": 8}
TINY_TEXT = TINY | {"vocab_size": 20}


def load(
    folder: object, pooling: Pooling = "auto", precision: torch.dtype = torch.float32, revision: str | None = None
) -> Teacher:
    return load_teacher(str(folder), revision, pooling, torch.device("cpu"), precision)


def refusal(folder: object, pooling: Pooling = "auto") -> str:
    with pytest.raises(PipelineError) as error:
        load(folder, pooling)
    return str(error.value)


def assert_reason(message: str, start: str, end: str) -> None:
    """Check a message around a library's own words, of which we keep one line."""
    assert message.startswith(f"{start} (")
    assert message.endswith(f"). {end}")
    assert len(message) > len(f"{start} (). {end}")
    assert "\n" not in message


def save(model: Any, folder: Path, side_px: int = 16) -> Path:
    """Save a model with an image processor."""
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": side_px, "width": side_px}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    return folder


def make_vit(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(image_size=16, patch_size=8, **VIT_SIZES)
    return transformers.ViTModel(config, **options)


def make_clip() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_PICTURES, projection_dim=8)
    model = transformers.CLIPModel(config)
    with torch.no_grad():  # fresh norms do nearly nothing: a forgotten one would not be seen
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_()
    return model


def make_resnet() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def make_siglip() -> Any:
    torch.manual_seed(0)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_PICTURES))


def make_beit(use_mean_pooling: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        **(TINY_PICTURES | {"num_hidden_layers": 4, "use_mean_pooling": use_mean_pooling}), layer_scale_init_value=0.1
    )
    return transformers.BeitModel(config)


def own_output(folder: Path) -> Any:
    """Run a folder's image encoder without the pipeline."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels)


def embed(teacher: Teacher) -> torch.Tensor:
    embeddings = teacher.embed(teacher.preprocess(IMAGES))
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (len(IMAGES), teacher.info.embed_dim)
    return embeddings


# Embeddings


def test_the_embedding_is_the_class_token_after_the_last_norm(tiny_teacher: Path) -> None:
    teacher = load(tiny_teacher)
    assert (teacher.info.pooling, teacher.info.embed_dim) == ("cls", 24)
    assert torch.equal(embed(teacher), own_output(tiny_teacher).last_hidden_state[:, 0])
    assert torch.equal(embed(load(tiny_teacher, "cls")), embed(teacher))


def test_mean_pooling_leaves_the_class_token_out(tiny_teacher: Path) -> None:
    teacher = load(tiny_teacher, "mean")
    assert teacher.info.pooling == "mean"
    assert torch.equal(embed(teacher), own_output(tiny_teacher).last_hidden_state[:, 1:].mean(dim=1))


def test_a_pooler_that_the_checkpoint_has_can_be_asked_for(tmp_path: Path) -> None:
    folder = save(make_vit(), tmp_path / "vit")
    teacher = load(folder, "pooled")
    assert teacher.info.pooling == "pooled"
    assert torch.equal(embed(teacher), own_output(folder).pooler_output)


def test_the_teacher_is_in_evaluation_mode(tiny_teacher: Path) -> None:
    teacher = load(tiny_teacher)
    assert not teacher.model.training
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    assert not embed(teacher).requires_grad


def test_a_dual_encoder_gives_its_image_tower(tmp_path: Path) -> None:
    folder = save(make_clip(), tmp_path / "clip")
    output = own_output(folder)
    teacher = load(folder)
    assert teacher.info.pooling == "cls"
    # CLIP's last norm stands behind `last_hidden_state`.
    assert torch.equal(embed(teacher), output.pooler_output)
    assert not torch.allclose(embed(teacher), output.last_hidden_state[:, 0])


def test_a_dual_encoder_needs_no_text_tower(tmp_path: Path) -> None:
    folder = save(make_clip(), tmp_path / "clip")
    whole = load(folder)
    edit_weights(folder, lambda weights: {name: weights[name] for name in weights if name.startswith("vision_model.")})
    teacher = load(folder)
    assert torch.equal(embed(teacher), embed(whole))
    assert teacher.info.weights_sha256 == whole.info.weights_sha256


def test_a_convolutional_teacher_gives_its_own_pooled_output(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(make_resnet(), tmp_path / "resnet", side_px=32)
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        teacher = load(folder)
    assert caplog.messages == ["ResNetModel has no [CLS] token: its own pooled output is the embedding."]
    assert (teacher.info.pooling, teacher.info.embed_dim) == ("pooled", 8)
    output = own_output(folder)
    assert torch.equal(embed(teacher), output.pooler_output.flatten(1))
    assert torch.allclose(embed(load(folder, "mean")), output.last_hidden_state.mean(dim=(2, 3)))


def test_a_transformer_without_class_token_is_averaged_over_all_tokens(tmp_path: Path) -> None:
    folder = save(make_siglip(), tmp_path / "siglip")
    output = own_output(folder)
    assert torch.equal(embed(load(folder)), output.pooler_output)
    assert torch.equal(embed(load(folder, "mean")), output.last_hidden_state.mean(dim=1))


def test_a_teacher_without_pooled_output_is_averaged_over_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.PoolFormerConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])
    folder = save(transformers.PoolFormerModel(config), tmp_path / "poolformer", side_px=64)
    output = own_output(folder)
    assert not hasattr(output, "pooler_output")
    assert torch.equal(embed(load(folder, "pooled")), output.last_hidden_state.mean(dim=(2, 3)))


def test_a_teacher_made_to_be_pooled_over_patches_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(make_beit(use_mean_pooling=True), tmp_path / "beit")
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        teacher = load(folder)
    assert caplog.messages == ["BeitModel was made to be pooled over patches, and is."]
    assert teacher.info.pooling == "pooled"
    assert torch.equal(embed(teacher), own_output(folder).pooler_output)
    assert load(folder, "cls").info.pooling == "cls"


def test_a_teacher_of_the_same_kin_made_for_its_class_token_gives_that(tmp_path: Path) -> None:
    folder = save(make_beit(use_mean_pooling=False), tmp_path / "beit")
    teacher = load(folder)
    assert teacher.info.pooling == "cls"
    assert torch.equal(embed(teacher), own_output(folder).last_hidden_state[:, 0])


def test_the_forward_pass_runs_in_the_precision_asked_for(tiny_teacher: Path) -> None:
    exact, rough = load(tiny_teacher), load(tiny_teacher, precision=torch.bfloat16)
    assert (exact.info.precision, rough.info.precision) == ("float32", "bfloat16")
    assert rough.model.dtype == torch.bfloat16
    assert exact.info.weights_sha256 == rough.info.weights_sha256
    difference = (embed(rough) - embed(exact)).norm() / embed(exact).norm()
    assert 1e-5 < difference < 2e-2


# Preprocessing


def test_images_of_any_size_are_resized_by_the_teachers_own_processor(tiny_teacher: Path) -> None:
    preprocess = load(tiny_teacher).preprocess
    pixels = preprocess([Image.new("RGB", size, "white") for size in ((3, 50), (16, 16))])
    assert (pixels.shape, pixels.dtype) == ((2, 3, 16, 16), torch.float32)
    assert torch.allclose(pixels, torch.ones(()))  # (1 − 0.5) / 0.5


def test_the_processor_is_described_in_plain_json(tiny_teacher: Path) -> None:
    settings = load(tiny_teacher).preprocess.describe()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["size"] == {"height": 16, "width": 16}
    assert settings["image_mean"] == [0.5, 0.5, 0.5]
    assert settings["backend"] in ("torchvision", "pil")
    assert None not in settings.values()
    assert str(tiny_teacher) not in json.dumps(settings)


def test_a_processor_that_names_no_backend_is_described_too() -> None:
    processor = SimpleNamespace(to_dict=lambda: {"kind": Path("x"), "size": (4, 4), "nothing": None})
    assert Preprocess(processor).describe() == {"kind": "x", "size": [4, 4], "backend": "unknown"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": {"shortest_edge": 224}}, 224),
        ({"size": {"height": 224, "width": 224}}, None),
        ({"size": 224}, None),
        ({}, None),
        ({"data_config": {"input_size": [3, 256, 256]}}, 256),
    ],
)
def test_it_is_known_what_the_shorter_side_is_resized_to(settings: dict[str, Any], expected: int | None) -> None:
    assert Preprocess(SimpleNamespace(to_dict=lambda: settings)).shortest_edge == expected


# Who the teacher is


def test_a_folder_is_known_by_its_base_name(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_teacher)
    for name in (tiny_teacher, f"{tiny_teacher}/", "."):
        info = load(name).info
        assert (info.name, info.revision, info.architecture) == ("tiny-vit", None, "ViTModel")


@pytest.fixture
def hub(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub model that was downloaded before: its name, found offline."""
    model = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_teacher, model / "snapshots" / COMMIT)
    (model / "snapshots" / COMMIT / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "org/tiny"


def test_a_hub_model_is_known_by_its_name(hub: str, tiny_teacher: Path) -> None:
    teacher = load(hub)
    assert (teacher.info.name, teacher.info.licence) == ("org/tiny", "apache-2.0")
    assert torch.equal(embed(teacher), embed(load(tiny_teacher)))


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_model_has_the_commit_it_was_loaded_from(hub: str, revision: str | None) -> None:
    assert load(hub, revision=revision).info.revision == COMMIT


def test_the_weights_are_hashed_by_name_shape_and_value(tiny_teacher: Path) -> None:
    digest = hashlib.sha256()
    weights = transformers.AutoModel.from_pretrained(tiny_teacher).state_dict()
    for name in sorted(weights):
        if not name.startswith("pooler."):  # random: the checkpoint has none
            digest.update(f"{name}{list(weights[name].shape)}".encode())
            digest.update(weights[name].numpy().astype("<f4").tobytes())
    assert load(tiny_teacher).info.weights_sha256 == digest.hexdigest()


def test_the_hash_of_the_weights_is_the_same_however_they_are_filed(tmp_path: Path) -> None:
    one, many = save(make_vit(), tmp_path / "one"), save(make_vit(), tmp_path / "many")
    (many / "model.safetensors").unlink()
    make_vit().save_pretrained(many, max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 1
    assert load(one).info.weights_sha256 == load(many).info.weights_sha256


def test_the_hash_of_the_weights_knows_every_weight(tmp_path: Path) -> None:
    folder = save(make_vit(), tmp_path / "vit")
    before = load(folder).info.weights_sha256

    def nudge(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bias = weights["layernorm.bias"]
        bias[3] = np.nextafter(np.float32(bias[3].item()), np.float32(1)).item()
        return weights

    edit_weights(folder, nudge)
    assert load(folder).info.weights_sha256 != before


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: cc-by-4.0\ntags:\n- vision\n---\n# A card", "cc-by-4.0"),
        ("---\ntags:\n- vision\n---\n# A card", None),
        ("# A card without front matter", None),
        ("---\n- no\n- mapping\n---\n", None),
        ("\xff", None),
    ],
    ids=["licence", "no-licence", "no-front-matter", "no-mapping", "no-utf-8"],
)
def test_the_licence_is_what_the_model_card_says(
    tiny_teacher: Path, tmp_path: Path, card: str, licence: str | None
) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(tiny_teacher, folder)
    assert load(folder).info.licence is None
    (folder / "README.md").write_bytes(card.encode("latin-1"))
    assert load(folder).info.licence == licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense:\n- mit\n- bsd-3-clause\n---\n", "mit, bsd-3-clause"),
        ("---\nlicense: 1.0\n---\n", "1.0"),
        ('---\nlicense: "mit\n---\n', None),
    ],
    ids=["list", "number", "damaged"],
)
def test_an_odd_model_card_does_not_stop_the_teacher(
    tiny_teacher: Path, tmp_path: Path, card: str, licence: str | None
) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(tiny_teacher, folder)
    (folder / "README.md").write_text(card)
    assert load(folder).info.licence == licence


# Refusals


def edit_weights(folder: Path, edit: Any) -> None:
    file = folder / "model.safetensors"
    weights = edit(safetensors.torch.load_file(file))
    safetensors.torch.save_file(weights, file, {"format": "pt"})


@pytest.fixture
def copy(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher, to be damaged."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["./nowhere", "{tmp_path}/nowhere", "~/no-such-folder-at-all"])
def test_a_missing_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = name.format(tmp_path=tmp_path)
    assert refusal(teacher) == f"{teacher}: no such teacher folder. Check --teacher."


def test_a_hub_model_that_cannot_be_reached_is_refused() -> None:
    assert_reason(refusal("org/never-downloaded"), "org/never-downloaded: the teacher cannot be loaded", ADVICE)


def test_a_folder_without_a_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert_reason(refusal(copy), f"{copy}: the teacher cannot be loaded", ADVICE)


def test_a_folder_with_a_damaged_config_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert_reason(refusal(copy), f"{copy}: the teacher cannot be loaded", ADVICE)


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert_reason(refusal(copy), f"{copy}: the teacher cannot be loaded", ADVICE)


def test_truncated_weights_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_reason(refusal(copy), f"{copy}: the teacher cannot be loaded", ADVICE)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    file = copy / "model.safetensors"
    torch.save(safetensors.torch.load_file(file), copy / "pytorch_model.bin")
    file.unlink()
    assert_reason(refusal(copy), f"{copy}: the teacher cannot be loaded", ADVICE)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    edit_weights(copy, lambda weights: weights | {"vit.embeddings.cls_token": torch.zeros(1, 1, 25)})
    assert_reason(refusal(copy), f"{copy}: the teacher cannot be loaded", ADVICE)


def test_a_folder_without_an_image_processor_is_refused(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    start = f"{copy}: the teacher's image processor cannot be loaded"
    assert_reason(refusal(copy), start, "Its folder needs preprocessor_config.json.")


def test_a_damaged_image_processor_is_refused(copy: Path) -> None:
    (copy / "preprocessor_config.json").write_text("{")
    start = f"{copy}: the teacher's image processor cannot be loaded"
    assert_reason(refusal(copy), start, "Its folder needs preprocessor_config.json.")


def test_an_image_processor_that_does_not_fit_is_refused(copy: Path) -> None:
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 24, "width": 24}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    start = f"{copy}: the teacher cannot embed an image"
    assert_reason(refusal(copy), start, "Do its config.json and preprocessor_config.json belong together?")


def test_a_teacher_that_does_not_fit_its_device_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(transformers.ViTModel, "to", exhaust)
    assert refusal(copy) == "out of memory: the teacher at batch size 1. A smaller model is needed."


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(**TINY_TEXT)).save_pretrained(folder)
    assert refusal(folder) == f"{folder}: BertModel is not an image encoder."


def test_weights_that_the_checkpoint_lacks_are_refused(copy: Path) -> None:
    edit_weights(copy, lambda weights: {name: weights[name] for name in weights if "vit.layernorm" not in name})
    assert refusal(copy) == (
        f"{copy}: 2 of the teacher's weights are not in its checkpoint (layernorm.bias, layernorm.weight…). "
        "They would be random: take a checkpoint that fits its config.json."
    )


def test_a_dual_encoder_without_its_image_tower_is_refused(tmp_path: Path) -> None:
    folder = save(make_clip(), tmp_path / "clip")
    edit_weights(folder, lambda weights: {name: weights[name] for name in weights if "post_layernorm" not in name})
    assert refusal(folder) == (
        f"{folder}: 2 of the teacher's weights are not in its checkpoint (post_layernorm.bias, post_layernorm.weight…)"
        ". They would be random: take a checkpoint that fits its config.json."
    )


def test_a_pooler_that_the_checkpoint_lacks_is_refused(tiny_teacher: Path) -> None:
    assert refusal(tiny_teacher, "pooled") == (
        f"{tiny_teacher}: the checkpoint has no weights for the pooler. Pass --pooling cls or mean."
    )


def test_a_class_token_that_the_teacher_lacks_is_refused(tmp_path: Path) -> None:
    folder = save(make_resnet(), tmp_path / "resnet", side_px=32)
    assert refusal(folder, "cls") == f"{folder}: ResNetModel has no [CLS] token. Pass --pooling pooled or mean."


@pytest.mark.parametrize(
    "file",
    ["config.json", "preprocessor_config.json"],
)
def test_a_teachers_own_code_is_refused_without_a_question(
    copy: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    kind = {"model_type": "strange", "image_processor_type": "Strange"}
    remote = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoImageProcessor": "code.Processor"}
    settings = json.loads((copy / file).read_text())
    settings = {key: kind.get(key, value) for key, value in settings.items()} | {"auto_map": remote}
    (copy / file).write_text(json.dumps(settings))
    (copy / "code.py").write_text("raise SystemExit('ran')\n")
    questions: list[object] = []

    def answer_no(prompt: object = "") -> str:
        questions.append(prompt)
        return "n"

    monkeypatch.setattr(builtins, "input", answer_no)
    assert " cannot be loaded (" in refusal(copy)
    assert questions == []


def test_a_teacher_that_gives_another_embedding_each_time_is_refused(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = Teacher.embed

    def mask_at_random(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        embeddings = embed(self, pixels)
        return embeddings * torch.rand_like(embeddings)

    monkeypatch.setattr(Teacher, "embed", mask_at_random)
    with pytest.raises(PipelineError) as refused:
        load_teacher(str(tiny_teacher), None, "auto", torch.device("cpu"), torch.float32)
    assert str(refused.value) == (
        f"{tiny_teacher}: the teacher gives another embedding each time (random masking?). Choose another."
    )
