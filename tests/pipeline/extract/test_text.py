"""Text embeddings of class names: what they are, where they are stored, and what is refused."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

import store
from pipeline.data import DataSettings
from pipeline.errors import PipelineError
from pipeline.extract import ExtractResult, ExtractSettings, extract
from pipeline.extract.teacher import Teacher, load_teacher
from tests.conftest import make_split
from tests.pipeline.extract.test_architectures import ARCHITECTURES, PICTURES, TINY, save

WORDS = (
    "<pad>",
    "<end>",
    "<start>",
    "<unknown>",
    "a",
    "photo",
    "of",
    "the",
    "sketch",
    "ant",
    "bee",
    "cat",
    "wild",
    ".",
)
TEXT = TINY | {"vocab_size": len(WORDS), "max_position_embeddings": 12}
NAMES = ("ant", "wild_bee", "Cat")
MAX_TOKENS = "Shorten --prompt or the class's name, or leave --class-text out."

Run = Callable[..., ExtractResult]


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words: <start> a photo … <end>."""
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>", unk_token="<unknown>"
    ).save_pretrained(folder)


def read_ids_only(folder: Path) -> None:
    """Let the tokenizer make no attention mask, as those of the published SigLIP models."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(settings | {"model_input_names": ["input_ids"]}), "utf-8")


def make_clip(folder: Path) -> Path:
    text = TEXT | {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=PICTURES, projection_dim=6)
    save(transformers.CLIPModel(config), folder)
    save_tokenizer(folder)
    return folder


def make_siglip(folder: Path) -> Path:
    text = TEXT | {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0, "projection_size": 8}
    save(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=PICTURES)), folder)
    save_tokenizer(folder)
    read_ids_only(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("teachers") / "clip")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("teachers") / "siglip")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "named"
    make_split(12, 0, NAMES).save_to_disk(str(folder))
    return folder


@pytest.fixture
def run(clip: Path, data: Path, tmp_path: Path) -> Run:
    def run_extract(**options: Any) -> ExtractResult:
        given: dict[str, Any] = {
            "teacher": str(clip),
            "data": {"dataset": str(data)},
            "out": tmp_path / "a.safetensors",
        }
        return extract(ExtractSettings(**(given | {"device": "cpu", "precision": "float32"} | options)))

    return run_extract


def refusal(run: Run, **options: Any) -> str:
    with pytest.raises(PipelineError) as refused:
        run(class_text=True, **options)
    return str(refused.value)


def text_of(result: ExtractResult) -> NDArray[np.float32]:
    with store.open_artifact(result.path) as artifact:
        return np.array(artifact["class/text"])


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = edit(safetensors.torch.load_file(folder / "model.safetensors"))
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def own_embedding(folder: Path, words: list[str], length: int | None = None) -> NDArray[np.float64]:
    """Embed one text, given as words of the vocabulary, without the pipeline; with `length`, padded and unmasked."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    numbers = [WORDS.index(word) for word in ("<start>", *words, "<end>")]
    numbers += [0] * ((length or 0) - len(numbers))
    with torch.no_grad():
        pooled = model.text_model(input_ids=torch.tensor([numbers])).pooler_output
        if hasattr(model, "text_projection"):
            pooled = pooled @ model.text_projection.weight.T
    embedding: NDArray[np.float64] = pooled[0].double().numpy()
    embedding /= np.linalg.norm(embedding)
    return embedding


# What is stored


def test_a_class_has_the_mean_of_its_prompts_embeddings_of_length_one(run: Run, clip: Path) -> None:
    result = run(class_text=True, prompts=("a photo of a {}.", "the {}"), batch_size=4)
    found = text_of(result)
    assert (found.shape, found.dtype.name) == ((3, 6), "float32")
    for row, name in enumerate((["ant"], ["wild", "bee"], ["<unknown>"])):
        texts = [["a", "photo", "of", "a", *name, "."], ["the", *name]]
        expected = np.mean([own_embedding(clip, text) for text in texts], axis=0)
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
        assert np.linalg.norm(expected) < 0.999


def test_one_prompt_gives_embeddings_of_length_one_in_the_space_of_the_images(run: Run, clip: Path) -> None:
    result = run(class_text=True)
    assert np.linalg.norm(text_of(result), axis=1) == pytest.approx(1)
    np.testing.assert_allclose(
        text_of(result)[0], own_embedding(clip, ["a", "photo", "of", "a", "ant", "."]), atol=1e-6
    )
    teacher = result.manifest.teacher
    assert (teacher.pooling, teacher.embed_dim, teacher.architecture) == ("projected", 6, "CLIPVisionModel")
    with store.open_artifact(result.path) as artifact:
        assert artifact["class/mean"].shape == (3, 6)


def test_siglip_reads_lower_case_padded_to_its_length_without_a_mask(run: Run, siglip: Path) -> None:
    found = text_of(run(teacher=str(siglip), class_text=True, prompts=("A photo of {}",), batch_size=2))
    for row, name in enumerate((["ant"], ["wild", "bee"], ["cat"])):
        expected = own_embedding(siglip, ["a", "photo", "of", *name], length=12)
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_the_record_names_prompts_and_weights(run: Run, clip: Path) -> None:
    text = run(class_text=True, prompts=("the {}", "{}")).manifest.text
    weights = safetensors.torch.load_file(clip / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if name.startswith("text_")):
        digest.update(f"{name}{list(weights[name].shape)}".encode() + weights[name].numpy().astype("<f4").tobytes())
    assert text == store.TextInfo(prompts=("the {}", "{}"), weights_sha256=digest.hexdigest())


def test_without_the_option_there_is_neither_text_nor_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    result = run()
    assert result.manifest.text is None
    assert "class/text" not in result.manifest.tensors
    assert result.manifest.teacher.pooling == "cls"
    assert '"text"' not in result.manifest.to_bytes().decode()


def test_the_rest_of_the_artifact_is_that_of_projected_pooling(run: Run, tmp_path: Path) -> None:
    one = run(class_text=True, samples=True)
    other = run(pooling="projected", samples=True, out=tmp_path / "b.safetensors")
    with store.open_artifact(one.path) as artifact, store.open_artifact(other.path) as plain:
        assert all(np.array_equal(artifact[name], plain[name]) for name in plain.manifest.tensors)
        assert {*artifact.manifest.tensors} - {*plain.manifest.tensors} == {"class/text"}


def test_the_same_command_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    contents = [run(class_text=True, out=tmp_path / f"{name}.h5").path.read_bytes() for name in ("a", "b")]
    assert contents[0] == contents[1]


def test_the_text_tower_runs_in_the_precision_of_the_images(run: Run) -> None:
    exact, rough = (text_of(run(class_text=True, precision=kind, overwrite=True)) for kind in ("float32", "bfloat16"))
    difference = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-5 < difference < 5e-2


def test_how_many_names_were_embedded_is_said(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clip_embed_kd"):
        run(class_text=True)
    assert "The names of 3 classes were embedded with 1 prompt(s)." in caplog.messages
    assert any("its own pooled output in the space that it shares with text, 6 values" in m for m in caplog.messages)


def test_prompts_do_not_decide_whether_an_interrupted_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"class_text": True, "per_class": "all", "batch_size": 1}
    monkeypatch.setattr("pipeline.extract.embed._CHUNK_IMAGES", 4)
    embed, calls = Teacher.embed, iter(range(1_000))

    def stop(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        if next(calls) == 2 + 9:
            raise KeyboardInterrupt
        return embed(self, pixels)

    monkeypatch.setattr(Teacher, "embed", stop)
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    monkeypatch.setattr(Teacher, "embed", embed)
    result = run(**settings, prompts=("the {}",))
    assert result.num_resumed == 9
    assert result.manifest.text is not None
    assert result.manifest.text.prompts == ("the {}",)


# Refusals, all before the first image is embedded


@pytest.fixture
def copy(clip: Path, tmp_path: Path) -> Path:
    """A copy of the tiny CLIP, to be damaged."""
    return Path(shutil.copytree(clip, tmp_path / "copy"))


def test_a_teacher_without_text_is_refused(run: Run, tiny_teacher: Path) -> None:
    assert refusal(run, teacher=str(tiny_teacher)) == (
        f"{tiny_teacher}: ViTModel has no projection into a space that it shares with a text tower, which --class-text "
        "and --pooling projected need. Pass --pooling cls or mean."
    )


@pytest.mark.parametrize("name", ["clip-vision-projected", "siglip-vision"])
def test_an_image_tower_alone_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    folder = save(ARCHITECTURES[name].make(), tmp_path / "tower")
    kind = type(ARCHITECTURES[name].make()).__name__
    assert refusal(run, teacher=str(folder)) == (
        f"{folder}: {kind} has no text tower, which --class-text needs. "
        "Leave it out, or take the whole of a model like CLIP."
    )


def test_a_text_tower_that_is_not_whole_is_refused(run: Run, copy: Path) -> None:
    edit_weights(copy, lambda weights: {name: weights[name] for name in weights if name != "text_projection.weight"})
    assert refusal(run, teacher=str(copy)) == (
        f"{copy}: 1 of the text tower's weights are not in its checkpoint (text_projection.weight…). "
        "They would be random: take a checkpoint that fits its config.json."
    )


def test_a_tokenizer_that_is_not_there_is_refused(run: Run, copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.write_text("{")
    message = refusal(run, teacher=str(copy))
    assert message.startswith(f"{copy}: the tokenizer for --class-text cannot be loaded (")
    assert message.endswith("). It must lie beside the teacher's weights.")
    assert "\n" not in message


def test_a_tokenizer_that_does_not_fit_is_refused(run: Run, copy: Path) -> None:
    settings = json.loads((copy / "tokenizer.json").read_text())
    settings["model"]["vocab"]["ant"] = 500
    (copy / "tokenizer.json").write_text(json.dumps(settings))
    message = refusal(run, teacher=str(copy))
    assert message.startswith(f"{copy}: the text tower cannot embed the class names (")
    assert message.endswith("). Do its config.json and its tokenizer belong together?")
    assert "\n" not in message


def test_a_text_that_is_too_long_is_refused(run: Run, clip: Path) -> None:
    prompt = "a photo of the sketch of the photo of {}"
    assert refusal(run, prompts=(prompt,)) == (
        f"{clip}: 'a photo of the sketch of the photo of wild bee' has 13 tokens, the text tower reads 12. {MAX_TOKENS}"
    )


def test_text_and_images_of_different_lengths_are_refused(run: Run, tmp_path: Path) -> None:
    text = TEXT | {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0, "projection_size": 5}
    config = transformers.SiglipConfig(text_config=text, vision_config=PICTURES)
    folder = save(transformers.SiglipModel(config), tmp_path / "uneven")
    save_tokenizer(folder)
    assert refusal(run, teacher=str(folder)) == (
        f"{folder}: a text embedding has 5 values, an image's 8. They are not of one space: leave --class-text out."
    )


def test_a_text_embedding_that_is_not_finite_is_refused(run: Run, copy: Path) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["text_model.embeddings.token_embedding.weight"][WORDS.index("wild")] = float("nan")
        return weights

    edit_weights(copy, damage)
    assert refusal(run, teacher=str(copy)) == (
        f"{copy}: the text embedding of class 'wild_bee' has values that are not finite. "
        "Try --precision float32; if that does not help, the text tower's weights are damaged."
    )


def test_texts_that_do_not_fit_into_memory_give_advice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(transformers.CLIPModel, "get_text_features", exhaust)
    assert refusal(run, batch_size=8) == "out of memory: the text tower at batch size 8. Try --batch-size 4."


def test_classes_without_names_are_refused_before_the_teacher_is_loaded(run: Run, tmp_path: Path) -> None:
    numbers = make_split(6, 0).cast_column("label", datasets.Value("int64"))
    numbers.save_to_disk(str(tmp_path / "numbers"))
    given = DataSettings(dataset=str(tmp_path / "numbers"))
    assert refusal(run, teacher="./nowhere", data=given) == (
        "numbers: its labels are numbers without names, and --class-text embeds names. "
        "Leave it out, or choose a --label-column with class names."
    )


def test_a_text_tower_is_not_loaded_with_the_images(clip: Path) -> None:
    teacher = load_teacher(str(clip), None, "projected", torch.device("cpu"), torch.float32)
    assert not any("text" in name for name, _ in teacher.model.named_modules())
