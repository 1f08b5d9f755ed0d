"""Images of others are pinned where a registry serves them, and named by tag alone where they may have been loaded."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.charts import CENTRE, Object, pods, render, values_of

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"
PINNED = re.compile(r"[a-z0-9./-]+:[0-9][\w.-]*@sha256:[0-9a-f]{64}")


def images_of_others(objects: list[Object]) -> Iterator[str]:
    for _owner, _metadata, spec in pods(objects):
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            if "/fedmesh" not in f"/{container['image']}":
                yield container["image"]
    for item in objects:
        if item["kind"] == "Cluster":
            yield item["spec"]["imageName"]


def test_every_image_is_built_on_one_base_of_a_tag_and_a_digest() -> None:
    """A build argument takes another base."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)
    assert PINNED.fullmatch(base)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    outside = {source for source, _ in stages} - {name for _, name in stages}
    assert outside == {"${PYTHON_IMAGE}"}


def test_production_pins_what_it_does_not_build() -> None:
    images = set(images_of_others(render(CENTRE, values_of(CENTRE / "values-production.yaml"))))
    assert {image.split(":")[0].rsplit("/", 1)[1] for image in images} == {"postgresql", "valkey"}
    assert all(PINNED.fullmatch(image) for image in images), images


@pytest.mark.parametrize("files", [[], ["values-kind.yaml"]], ids=["defaults", "kind"])
def test_a_trial_names_images_by_tag(files: list[str]) -> None:
    """An image that `kind load` brought has no digest of a registry: asked for by one, the node would pull it."""
    images = set(images_of_others(render(CENTRE, values_of(*[CENTRE / file for file in files]))))
    assert {image.split(":")[0].rsplit("/", 1)[1] for image in images} == {"postgres", "valkey"}
    assert not [image for image in images if "@" in image]
