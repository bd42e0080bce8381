"""The model card: `README.md` in a student's folder, made from its configuration and the run record.

Names of teachers, data and classes come from strangers' files. In the front matter they stand as JSON, which is YAML;
in the text as code spans, in which neither Markdown nor HTML means anything.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from pydantic import ValidationError

from pipeline.distill.provenance import UNKNOWN, base_name, plain, read_json, recorded, training_command
from pipeline.distill.recipe import Recipe, recipe_as_toml
from pipeline.errors import PipelineError
from pipeline.output import write_atomically

_CLASSES_SHOWN = 10
_LOSS_WEIGHTS = {name for name in Recipe.model_fields if name.endswith("_weight")}
_TEXT = Path(__file__).parent / "model_card.md"


def write_model_card(run_directory: Path) -> None:
    """Write the model card of a finished run into its student's folder.

    Args:
        run_directory: with `run.json` and `student/config.json`.

    Raises:
        PipelineError: one of them cannot be read, or the card not be written.
    """
    folder = run_directory / "student"
    card = model_card(read_json(folder / "config.json"), read_json(run_directory / "run.json"))
    try:
        write_atomically(folder / "README.md", card.encode())
    except OSError as error:
        raise PipelineError(f"{folder / 'README.md'}: cannot be written ({error.strerror or error}).") from None


def model_card(student_config: Any, run_record: Any) -> str:
    """Say what a student is, where it comes from, how good it is and how to use it.

    Args:
        student_config: what `config.json` of the student's folder holds.
        run_record: what `run.json` holds; what is missing in it is called not recorded.

    Returns:
        Markdown with a front matter as the Hugging Face hub reads it.
    """
    record, teacher = run_record, recorded(run_record, "artifact", "teacher")
    classes, size = recorded(student_config, "label_names"), recorded(student_config, "pretrained_cfg", "input_size")
    classes = classes if isinstance(classes, list) else []
    recipe = _recipe(record)
    text = Template(_TEXT.read_text("utf-8")).substitute(
        title=_title(record),
        parameters=_number(recorded(record, "result", "num_parameters")),
        method=_method(recipe),
        architecture=_code(recorded(student_config, "architecture")),
        num_classes=f"{len(classes):,}",
        side=_number(size[1] if isinstance(size, list) and len(size) > 1 else None),
        classes=", ".join(map(_code, classes[:_CLASSES_SHOWN])) + (", …" if len(classes) > _CLASSES_SHOWN else ""),
        accuracy=_accuracy(record),
        data=_data(record),
        teacher=_teacher(record),
        training=_training(record),
        recipe=recipe_as_toml(recipe).rstrip() if recipe else f"# {UNKNOWN}",
        command=training_command(record),
        software=_listed(recorded(record, "software")),
        machine=_listed(recorded(record, "machine")),
        teacher_licence=_code(recorded(teacher, "licence")),
        data_licence=_code(recorded(record, "data", "licence")),
    )
    return _front_matter(record) + "\n" + text


def _front_matter(record: Any) -> str:
    name, split = recorded(record, "data", "name"), recorded(record, "data", "evaluated_on")
    on_hub = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII)
    metrics = [
        {"type": "accuracy", "name": label, "value": round(value / 100, 6)}
        for key, label in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy"))
        if (value := _finite(recorded(record, "result", key))) is not None
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": plain(name), "name": plain(name), "split": plain(split).removeprefix("split ")},
        "metrics": metrics,
    }
    # Not `base_model`: the hub would call the student a fine-tuned teacher, and it has none of the teacher's weights.
    fields = {
        "license": "unknown",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["clip-embed-kd", "image-classification", "knowledge-distillation", "timm"],
        "datasets": [name] if on_hub else [],
        "metrics": ["accuracy"],
        "model-index": [{"name": _title(record).replace("`", ""), "results": [result]}] if metrics else [],
    }
    lines = [f"{key}: {_yaml(value)}" for key, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"]) + "\n"


def _yaml(value: Any) -> str:
    """Write JSON, which is YAML but for small numbers: a reader of YAML 1.1 takes 1e-05 for a word."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return f"{value:.6f}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _title(record: Any) -> str:
    return f"{_code(recorded(record, 'settings', 'student'))}, trained on {_code(recorded(record, 'data', 'name'))}"


def _method(recipe: Recipe | None) -> str:
    method = "[CLIP-Embed-KD](https://arxiv.org/abs/2404.06170)"
    if recipe and not recipe.alpha2 and not any(recipe.model_dump(include=_LOSS_WEIGHTS).values()):
        return f"It learnt from labels alone: this is {method} at α₂ = 0, where the teacher below has no part."
    return f"It learnt from labels and from the stored embeddings of a larger model, its teacher, by {method}."


def _accuracy(record: Any) -> str:
    data = recorded(record, "data")
    top1, top5 = (_number(recorded(record, "result", key), " %") for key in ("top1", "top5"))
    return (
        f"Top-1 {top1}, top-5 {top5}, on {_number(recorded(data, 'num_evaluation_images'))} images of "
        f"{_code(recorded(data, 'name'))}, {_code(recorded(data, 'evaluated_on'))}. This is the student of the last "
        "epoch: none was chosen by its accuracy."
    )


def _data(record: Any) -> str:
    rows = {
        "name": recorded(record, "data", "name"),
        "revision": recorded(record, "data", "revision"),
        "split": recorded(record, "settings", "data", "split"),
        "images": recorded(record, "data", "join", "num_images"),
        "licence": recorded(record, "data", "licence"),
    }
    return _rows(rows)


def _teacher(record: Any) -> str:
    teacher = recorded(record, "artifact", "teacher")
    names = ("name", "revision", "architecture", "pooling", "embed_dim", "precision", "licence", "weights_sha256")
    labels = {"artifact": "file", "its digest": "manifest_sha256"}
    artifact = {label: recorded(record, "artifact", key) for label, key in labels.items()}
    return _rows({name: recorded(teacher, name) for name in names} | artifact)


def _recipe(record: Any) -> Recipe | None:
    try:
        return Recipe.model_validate(recorded(record, "recipe"))
    except ValidationError:
        return None


def _training(record: Any) -> str:
    settings = recorded(record, "settings")
    rows = {name: base_name(recorded(settings, name)) for name in ("recipe", "target", "init")}
    return _rows(rows | {"steps": recorded(record, "result", "num_steps")})


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_code(value)}" for name, value in values.items())


def _listed(values: Any) -> str:
    known = values.items() if isinstance(values, Mapping) else ()
    return ", ".join(_code(f"{name} {value}") for name, value in known if value is not None) or UNKNOWN


def _code(value: Any) -> str:
    return UNKNOWN if value is None else f"`{plain(value).replace('`', 'ˋ') or ' '}`"


def _number(value: Any, unit: str = "") -> str:
    number = _finite(value)
    return UNKNOWN if number is None else f"{number:,.2f}{unit}" if unit else f"{number:,.0f}"


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e15 else None  # NaN is not below
