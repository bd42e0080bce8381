import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest

import store
from tests.store.examples import GOLDEN

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_is_what_the_commands_say(generate: ModuleType) -> None:
    assert generate.COMMANDS.read_text("utf-8") == generate.commands(), "run `make docs`"


def test_the_schema_is_that_of_the_manifests_types(generate: ModuleType) -> None:
    assert json.loads(generate.SCHEMA.read_text("utf-8")) == json.loads(generate.schema()), "run `make docs`"


@pytest.mark.parametrize("golden", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_manifests_follow_the_schema(golden: Path) -> None:
    schema = json.loads((ROOT / "docs" / "manifest.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    document = store.summarise(golden).manifest
    jsonschema.validate(document, schema)
    for field in schema["required"]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({name: value for name, value in document.items() if name != field}, schema)
    newer = document | {"format": document["format"] | {"major": 2}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(newer, schema)
    jsonschema.validate(document | {"format": document["format"] | {"minor": 7}, "future": 1}, schema)


def test_the_hex_dump_is_that_of_the_golden_file() -> None:
    golden = (GOLDEN / "format-1.safetensors").read_bytes()
    page = (ROOT / "docs" / "artifact-format.md").read_text("utf-8")
    lines = re.findall(r"^([0-9a-f]{8})  ((?:[0-9a-f]{2} +){16})\|(.{16})\|$", page, re.MULTILINE)
    assert len(lines) >= 10
    for offset, numbers, text in lines:
        found = golden[int(offset, 16) : int(offset, 16) + 16]
        assert bytes.fromhex(numbers) == found
        assert text == "".join(chr(byte) if 32 <= byte < 127 else "." for byte in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target
