import hashlib
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import store
from store.manifest import Manifest, parse_manifest
from store.strict_json import parse_json
from tests.store.examples import SEARCH, class_tensors, document_of, encode, make_manifest

CANONICAL = (
    '{"classes":["a","é"],"data_set":{"classes_named":true,"config":null,"image_column":"image",'
    '"label_column":"label","licence":null,"name":"owner/images","revision":null,"rows":10,"split":"train"},'
    '"format":{"major":1,"minor":0,"name":"clip-embed-kd"},"preprocessing":{"a":[1,0.5],"b":2},'
    '"sampling":{"batch_size":4,"images_sha256":null,"limit":null,"per_class":null,"seed":0,'
    '"short_classes":0,"skipped_images":0,"view_size":null,"views":1,"views_version":null},'
    '"software":{"clip-embed-kd":"0.1.0"},"teacher":{"architecture":"vit","embed_dim":3,"licence":null,'
    '"name":"owner/teacher","pooling":"cls","precision":"float32","revision":null,"weights_sha256":"'
    + "a" * 64
    + '"},"tensors":{"class/mean":{"dtype":"float32","sha256":"' + "0" * 64 + '","shape":[2,3]}}}'
)  # fmt: skip


def example() -> dict[str, Any]:
    return document_of(class_tensors())


def parse(document: object) -> Manifest:
    raw = encode(document)
    return parse_manifest(raw, hashlib.sha256(raw).hexdigest(), "file")


def refusal(raw: bytes) -> str:
    with pytest.raises(store.ArtifactFormatError) as caught:
        parse_json(raw, "file")
    return str(caught.value)


def test_bytes_are_sorted_compact_utf8_json() -> None:
    manifest = make_manifest(
        embed_dim=3,
        views=1,
        classes=("a", "é"),
        preprocessing={"b": 2, "a": (1, 0.5)},
        tensors={"class/mean": store.TensorInfo(dtype="float32", shape=(2, 3))},
    )
    assert manifest.to_bytes() == CANONICAL.encode()


def test_head_text_and_sources_stand_in_the_bytes_only_where_there_are_any() -> None:
    plain = make_manifest()
    head = store.HeadInfo(penalty=1.0, loo_error=0.5, loo_accuracy=0.25)
    source = store.SourceInfo(manifest_sha256="c" * 64, data_set=plain.data_set, sampling=plain.sampling)
    text = store.TextInfo(prompts=("a {}.", "{}"), weights_sha256="d" * 64)
    manifest = make_manifest(head=head, sources=(source,), text=text)
    document = json.loads(manifest.to_bytes())
    assert document.pop("head") == {"penalty": 1.0, "loo_error": 0.5, "loo_accuracy": 0.25}
    assert document.pop("text") == {"prompts": ["a {}.", "{}"], "weights_sha256": "d" * 64}
    (found,) = document.pop("sources")
    assert found == {"manifest_sha256": "c" * 64, "data_set": document["data_set"], "sampling": document["sampling"]}
    assert document == json.loads(plain.to_bytes())
    assert parse_manifest(manifest.to_bytes(), manifest.sha256(), "file") == manifest


def test_sha256_is_that_of_the_bytes() -> None:
    manifest = make_manifest()
    assert manifest.sha256() == hashlib.sha256(manifest.to_bytes()).hexdigest()


def test_bytes_do_not_depend_on_the_order_of_mappings() -> None:
    one = make_manifest(preprocessing={"a": 1, "b": {"c": 2, "d": 3}}, software={"x": "1", "y": "2"})
    other = make_manifest(preprocessing={"b": {"d": 3, "c": 2}, "a": 1}, software={"y": "2", "x": "1"})
    assert one.to_bytes() == other.to_bytes()


@SEARCH
@given(
    classes=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, unique=True),
    preprocessing=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    ),
)
def test_any_manifest_survives_its_bytes(classes: list[str], preprocessing: dict[str, Any]) -> None:
    manifest = make_manifest(classes=classes, preprocessing=preprocessing)
    parsed = parse_manifest(manifest.to_bytes(), manifest.sha256(), "file")
    assert parsed == manifest
    assert parsed.to_bytes() == manifest.to_bytes()


def test_fields_of_a_newer_minor_version_are_kept() -> None:
    document = example()
    document["format"]["minor"] = 7
    for record in (document, document["teacher"], document["tensors"]["class/mean"]):
        record["future"] = {"a": [1]}
    assert json.loads(parse(document).to_bytes()) == document


def test_a_manifest_cannot_be_changed() -> None:
    manifest = make_manifest()
    with pytest.raises(ValidationError, match="Instance is frozen"):
        manifest.classes = ("other",)  # type: ignore[misc]


def test_another_digest_is_refused() -> None:
    raw = make_manifest().to_bytes()
    found = hashlib.sha256(raw).hexdigest()
    with pytest.raises(store.ArtifactDigestError) as caught:
        parse_manifest(raw, "0123456789abcdef" * 4, "file")
    assert str(caught.value) == (
        f"file: manifest has SHA-256 {found[:12]}…, '0123456789ab'… is stored beside it. "
        "The file is damaged: extract it again."
    )


@pytest.mark.parametrize("version", [None, "clip-embed-kd", {}, {"major": 1}])
def test_a_manifest_without_a_format_name_is_refused(version: object) -> None:
    with pytest.raises(store.ArtifactVersionError) as caught:
        parse(example() | {"format": version})
    assert str(caught.value) == "file: manifest format is None, expected 'clip-embed-kd'."


def test_another_format_is_refused() -> None:
    with pytest.raises(store.ArtifactVersionError) as caught:
        parse(example() | {"format": {"name": "other", "major": 1, "minor": 0}})
    assert str(caught.value) == "file: manifest format is 'other', expected 'clip-embed-kd'."


@pytest.mark.parametrize("major", [0, 2, None])
def test_another_major_version_is_refused(major: object) -> None:
    with pytest.raises(store.ArtifactVersionError) as caught:
        parse(example() | {"format": {"name": "clip-embed-kd", "major": major, "minor": 0}})
    assert str(caught.value) == (
        f"file: artifact format {major}, this program reads format 1. Update clip-embed-kd, or extract again."
    )


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("format.minor", True, "Input should be a valid integer"),
        ("format.minor", -1, "Input should be greater than or equal to 0"),
        ("teacher.embed_dim", 0, "Input should be greater than or equal to 1"),
        ("teacher.embed_dim", 4.0, "Input should be a valid integer"),
        ("teacher.weights_sha256", "A" * 64, "String should match pattern '^[0-9a-f]{64}$'"),
        ("teacher.name", 1, "Input should be a valid string"),
        ("data_set.rows", "10", "Input should be a valid integer"),
        ("data_set.classes_named", 1, "Input should be a valid boolean"),
        ("sampling.seed", -1, "Input should be greater than or equal to 0"),
        *(
            (place, number, f"Input should be less than {2**63}")
            for number in (2**63, 10**4299)
            for place in (
                "format.minor",
                "teacher.embed_dim",
                "data_set.rows",
                "sampling.per_class",
                "sampling.limit",
                "sampling.seed",
                "sampling.batch_size",
                "sampling.views",
                "sampling.views_version",
                "sampling.short_classes",
                "sampling.skipped_images",
            )
        ),
        ("sampling.view_size", 4097, "Input should be less than or equal to 4096"),
        ("sampling.views", 0, "Input should be greater than or equal to 1"),
        ("sampling.images_sha256", "x", "String should match pattern '^[0-9a-f]{64}$'"),
        ("head", 1, "Input should be a valid dictionary or instance of HeadInfo"),
        ("text", "x", "Input should be a valid dictionary or instance of TextInfo"),
        ("sources", {}, "Input should be a valid tuple"),
        ("classes", [], "Tuple should have at least 1 item after validation, not 0"),
        ("classes", ["x", "a", "a"], "Value error, class name 'a' stands twice"),
        ("classes", "abc", "Input should be a valid tuple"),
        ("tensors.class/mean.shape", "34", "Input should be a valid tuple"),
        ("tensors.class/mean.sha256", "0" * 63, "String should match pattern '^[0-9a-f]{64}$'"),
        ("software", [], "Input should be a valid dictionary"),
    ],
)
def test_a_wrong_field_is_refused(place: str, value: object, problem: str) -> None:
    document = example()
    record = document
    *parents, field = place.split(".")
    for parent in parents:
        record = record[parent]
    record[field] = value
    with pytest.raises(store.ArtifactFormatError) as caught:
        parse(document)
    assert str(caught.value) == (f"file: manifest field {place}: {problem}. The file is damaged: extract it again.")


@pytest.mark.parametrize(("place", "value"), [("sampling.rows", [0, 2**63]), ("tensors.class/mean.shape", [3, 2**63])])
def test_a_wrong_member_is_refused(place: str, value: object) -> None:
    document = record = example()
    *parents, field = place.split(".")
    for parent in parents:
        record = record[parent]
    record[field] = value
    with pytest.raises(store.ArtifactFormatError) as caught:
        parse(document)
    assert str(caught.value) == (
        f"file: manifest field {place}.1: Input should be less than {2**63}. The file is damaged: extract it again."
    )


@pytest.mark.parametrize("field", ["teacher", "data_set", "preprocessing", "sampling", "classes"])
def test_a_missing_field_is_refused(field: str) -> None:
    document = example()
    del document[field]
    with pytest.raises(store.ArtifactFormatError) as caught:
        parse(document)
    assert str(caught.value) == (
        f"file: manifest field {field}: Field required. The file is damaged: extract it again."
    )


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"{} {}", "Extra data: line 1 column 4 (char 3)"),
        (b"\xff{}", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b'{"a":1,"a":1}', "a key stands twice"),
        (b'{"a":{"b":1,"b":2}}', "a key stands twice"),
        (b'{"a":NaN}', "NaN is not a number"),
        (b'{"a":[-Infinity]}', "-Infinity is not a number"),
    ],
)
def test_bytes_that_are_not_strict_json_are_refused(raw: bytes, problem: str) -> None:
    assert refusal(raw) == (f"file: header is not valid JSON ({problem}). The file is damaged or not an artifact.")


@pytest.mark.parametrize("raw", [b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"1" * 10_000 + b"}"])
def test_json_of_unreasonable_depth_or_length_is_refused(raw: bytes) -> None:
    message = refusal(raw)
    assert message.startswith("file: header is not valid JSON (")
    assert message.endswith("). The file is damaged or not an artifact.")


@pytest.mark.parametrize(("raw", "kind"), [(b"[]", "list"), (b'"a"', "str"), (b"1", "int"), (b"null", "NoneType")])
def test_json_that_is_not_an_object_is_refused(raw: bytes, kind: str) -> None:
    assert refusal(raw) == f"file: header is a JSON {kind}, expected an object."


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_refused_in_preprocessing(number: float) -> None:
    with pytest.raises(ValueError, match=r"JSON|finite"):
        make_manifest(preprocessing={"mean": [number]}).to_bytes()


@pytest.mark.parametrize("preprocessing", [rb'"\ud800"', b"1e999", b"[" * 300 + b"]" * 300])
def test_a_manifest_is_refused_or_can_be_copied(preprocessing: bytes) -> None:
    raw = encode(example() | {"preprocessing": {"x": "@"}}).replace(b'"@"', preprocessing)
    with suppress(store.ArtifactFormatError):
        assert parse_manifest(raw, hashlib.sha256(raw).hexdigest(), "file").to_bytes() == raw
