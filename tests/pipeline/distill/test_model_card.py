import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from click.testing import CliRunner
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

import cli
from pipeline.distill.model_card import model_card, write_model_card
from pipeline.distill.recipe import load_recipe
from pipeline.distill.student import save_student
from tests.pipeline.distill.examples import make_student, write_example
from tests.pipeline.distill.test_provenance import RECORD

CONFIG = {
    "architecture": "test_resnet",
    "label_names": ["ant", "bee", "cat"],
    "pretrained_cfg": {"input_size": [3, 8, 8]},
}
HOSTILE = "x`</code>\n---\n# own <script>alert(1)</script> ![a](http://b.c) | \"'$(rm -rf ~) \u202e\x1b[31m\ud800"

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([HOSTILE, "a/b", "51"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def changed(document: Any, change: Any) -> Any:
    """Replace all values of nested objects by what `change` makes of them."""
    if isinstance(document, dict):
        return {name: changed(value, change) for name, value in document.items()}
    return change(document)


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^- (.+?): `?(.*?)`?$", card, re.MULTILINE))


# What the hub reads


def test_the_front_matter_is_what_the_hub_knows() -> None:
    assert front_matter(model_card(CONFIG, RECORD)) == {
        "license": "unknown",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["clip-embed-kd", "image-classification", "knowledge-distillation", "timm"],
        "datasets": ["owner/images"],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": "test_resnet, trained on owner/images",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"type": "owner/images", "name": "owner/images", "split": "test"},
                        "metrics": [
                            {"type": "accuracy", "name": "top-1 accuracy", "value": 0.51234},
                            {"type": "accuracy", "name": "top-5 accuracy", "value": 0.8},
                        ],
                    }
                ],
            }
        ],
    }


def test_an_accuracy_of_almost_nothing_is_a_number() -> None:
    result = RECORD["result"] | {"top1": 0.001, "top5": 0}
    matter = front_matter(model_card(CONFIG, RECORD | {"result": result}))
    values = [metric["value"] for metric in matter["model-index"][0]["results"][0]["metrics"]]
    assert values == [1e-05, 0.0]
    assert {type(value) for value in values} == {float}


def test_the_hubs_own_library_reads_it() -> None:
    data: Any = ModelCard(model_card(CONFIG, RECORD)).data
    assert data.library_name == "timm"
    assert [(result.metric_name, result.metric_value, result.dataset_split) for result in data.eval_results] == [
        ("top-1 accuracy", 0.51234, "test"),
        ("top-5 accuracy", 0.8, "test"),
    ]


def test_a_local_data_set_is_no_data_set_of_the_hub() -> None:
    matter = front_matter(model_card(CONFIG, RECORD | {"data": {"name": "images"}}))
    assert "datasets" not in matter
    assert matter["model-index"][0]["results"][0]["dataset"]["name"] == "images"


# What people read


def test_it_names_data_teacher_and_training() -> None:
    found = rows(model_card(CONFIG, RECORD))
    assert found["split"] == "train"
    assert found["images"] == "50000"
    assert found["licence"] == "apache-2.0"  # the last of two: the teacher's
    assert found["embed dim"] == "1024"
    assert found["weights sha256"] == "a" * 64
    assert found["artifact"] == "a.h5"
    assert found["its digest"] == "c" * 64
    assert (found["recipe"], found["target"], found["init"]) == ("my own.toml", "class", "pretrained")
    assert found["steps"] == "156400"


def test_its_recipe_can_be_used_again(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", model_card(CONFIG, RECORD), re.DOTALL)
    (tmp_path / "again.toml").write_text(text, "utf-8")
    assert load_recipe(str(tmp_path / "again.toml")).model_dump() == RECORD["recipe"]


def test_it_says_how_good_the_student_is_and_on_what() -> None:
    card = model_card(CONFIG, RECORD)
    assert "Top-1 51.23 %, top-5 80.00 %, on 10,000 images of `owner/images`, `split test`." in card
    assert (
        "An image classifier of 4,794,468 parameters (timm's `test_resnet`) for 3 classes, on images of 8 × 8" in card
    )
    assert "Classes: `ant`, `bee`, `cat`." in card
    assert "teacher `apache-2.0`, data `cc-by-4.0`. Where" in card
    assert "made with `clip-embed-kd 0.1.0`, `torch 2.15.0`, on `system Linux`, `device cpu`." in card


def test_of_many_classes_ten_are_named() -> None:
    card = model_card(CONFIG | {"label_names": [f"class {number}" for number in range(21_843)]}, RECORD)
    assert "for 21,843 classes" in card
    assert "`class 8`, `class 9`, …." in card
    assert "class 10" not in card


def test_a_student_that_learnt_from_labels_alone_is_not_called_distilled() -> None:
    assert "It learnt from labels and from the stored embeddings" in model_card(CONFIG, RECORD)
    plain = RECORD["recipe"] | {"alpha2": 0}
    assert "It learnt from labels alone" in model_card(CONFIG, RECORD | {"recipe": plain})
    regressing = plain | {"cosine_weight": 1}
    assert "It learnt from labels and from the stored" in model_card(CONFIG, RECORD | {"recipe": regressing})


def test_what_is_not_recorded_is_said() -> None:
    card = model_card({}, {})
    assert "Top-1 not recorded, top-5 not recorded, on not recorded images" in card
    assert rows(card)["revision"] == "not recorded"
    assert "model-index" not in front_matter(card)


def test_its_code_opens_the_student(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_student(make_student("test_vit", 32), tmp_path / "run" / "student")
    (tmp_path / "run" / "run.json").write_text(json.dumps(RECORD))
    write_model_card(tmp_path / "run")
    card = (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    (code, _) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {"image": Image.new("RGB", (40, 50), (9, 200, 77))}
    exec(code.replace('"run/student"', repr(str(tmp_path / "run" / "student"))), names)
    assert names["logits"].shape == (1, 3)
    assert isinstance(names["logits"], torch.Tensor)


# Text of strangers


def render(card: str) -> list[Any]:
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    return [token for outer in tokens for token in (outer, *(outer.children or ()))]


def test_hostile_names_stay_names() -> None:
    hostile = changed(RECORD, lambda value: HOSTILE if isinstance(value, str) else value)
    config = CONFIG | {"architecture": HOSTILE, "label_names": [HOSTILE, "# heading", "<b>"]}
    card = model_card(config, hostile)
    plain = render(model_card(CONFIG, RECORD))
    found = render(card)
    assert [token.tag for token in found if token.tag in ("h1", "h2")] == [
        token.tag for token in plain if token.tag in ("h1", "h2")
    ]
    assert {token.type for token in found} == {token.type for token in plain}
    assert [token.attrs for token in found if token.type == "link_open"] == [
        token.attrs for token in plain if token.type == "link_open"
    ]
    assert not set(card) & {"\x1b", "\u202e", "\ud800"}
    matter = front_matter(card)
    assert list(matter) == [name for name in front_matter(model_card(CONFIG, RECORD)) if name != "datasets"]
    assert "/home" not in card


def test_long_names_are_cut() -> None:
    card = model_card(CONFIG | {"label_names": ["x" * 1_000_000]}, RECORD)
    assert "x" * 199 + "…`" in card
    assert len(card) < 10_000


@given(config=JSON_VALUES, values=st.data())
@settings(max_examples=40, deadline=None)
def test_any_json_makes_a_card_whose_front_matter_can_be_read(config: Any, values: st.DataObject) -> None:
    card = model_card(config, changed(RECORD, lambda value: values.draw(JSON_VALUES | st.just(value))))
    assert front_matter(card)["license"] == "unknown"
    assert card.encode()


# The end of a run


def test_a_run_ends_with_a_card(saved_data: Path, tmp_path: Path) -> None:
    write_example(tmp_path / "a.safetensors")
    arguments = ["--artifact", tmp_path / "a.safetensors", "--dataset", saved_data, "--out", tmp_path / "run"]
    quick = ["--student", "test_resnet", "--image-size", 8, "--max-steps", 1, "--batch-size", 8]
    CliRunner().invoke(cli.cli, ["distill", *map(str, [*arguments, *quick])], catch_exceptions=False)
    card = (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    assert rows(card)["images"] == "30"
    assert str(tmp_path) not in card
