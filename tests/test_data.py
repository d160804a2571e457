"""From COCO files to batches: what the published loader gives, what is refused or skipped, and the order of samples."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from fpd_accel.check.report import check_shards
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Augment
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.coco import COCO_SKIPPED, prepare_coco
from fpd_accel.data.shards import FORMAT, Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.errors import DataError
from fpd_accel.skeleton import COCO, Skeleton

CPU = torch.device("cpu")
SMALL = (32, 24)  # (height, width) of crops where their content does not matter

# --- against the published loader -------------------------------------------------------------------------------


# Those that every batch has.
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]


@pytest.fixture(scope="session")
def coco_sample(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """The sample of COCO 2017, prepared."""
    folder = shared / "data" / "coco_sample"
    return prepare_coco(folder / "images", folder / "person_keypoints.json", tmp_path_factory.mktemp("coco") / "shards")


@pytest.fixture(scope="session")
def published(shared: Path, coco_sample: Shards) -> tuple[Batch, Any]:
    """Twelve people as our stream gives them, in the order of the published loader's arrays, and those arrays."""
    listed = json.loads((shared / "reference" / "coco_val_inputs.json").read_bytes())
    batch = PoseStream(coco_sample, input_size=(256, 192), batch_size=1).batch(range(len(coco_sample)))
    people = coco_sample.people[batch.rows.numpy()]
    names = coco_sample.images.select_columns("file_name")[people["image_row"].tolist()]["file_name"]
    order = []
    for person in listed:
        same_image = [i for i, name in enumerate(names) if name == person["image"]]
        distances = [np.abs(batch.centers[i].numpy() - person["center"]).max() for i in same_image]
        assert min(distances) < 1e-3, f"nobody of {person['image']} is centred at {person['center']}"  # image pixels
        order.append(same_image[int(np.argmin(distances))])
    assert len(set(order)) == len(listed) == 12
    chosen = Batch(**{name: getattr(batch, name)[order] for name in FIELDS})
    sizes = np.array([person["scale"] for person in listed]) * 200  # the published scale is in units of 200 pixels
    np.testing.assert_allclose(chosen.sizes.numpy(), sizes, atol=1e-3)  # image pixels
    return chosen, np.load(shared / "reference" / "coco_val_inputs.npz")


def test_crops_are_the_published_ones(published: tuple[Batch, Any]) -> None:
    batch, expected = published
    difference = np.abs(batch.crops.numpy().astype(int) - expected["crops"])
    assert difference.mean(axis=(1, 2, 3)).max() < 1  # grey level, of the worst crop
    if int(cv2.__version__.partition(".")[0]) >= 5:  # which made them; before, coordinates were rounded to 1/32 pixel
        assert difference.max() <= 1  # grey level, of the worst pixel


def test_keypoints_and_visibility_are_the_published_ones(published: tuple[Batch, Any]) -> None:
    batch, expected = published
    visible = expected["joints_vis"][..., 0] > 0
    np.testing.assert_array_equal(batch.visible.numpy() > 0, visible)
    found = batch.keypoints.numpy()[visible]
    np.testing.assert_allclose(found, expected["joints"][..., :2][visible], atol=1e-3)  # crop pixels


def test_targets_are_the_published_ones(published: tuple[Batch, Any]) -> None:
    batch, expected = published
    codec = HeatmapCodec(input_size=(256, 192), heatmap_size=(64, 48), sigma=2.0)
    heatmaps, weight = codec.encode(batch.keypoints, batch.visible)
    np.testing.assert_array_equal(weight.numpy(), expected["weight"][..., 0])
    np.testing.assert_allclose(heatmaps.numpy(), expected["target"], atol=1e-5)  # of a peak of 1


def test_the_people_of_coco_are_counted_as_the_annotations_have_them(shared: Path, coco_sample: Shards) -> None:
    content = json.loads((shared / "data" / "coco_sample" / "person_keypoints.json").read_bytes())
    labelled = [a for a in content["annotations"] if a["num_keypoints"] and not a["iscrowd"]]
    crowds = [a for a in content["annotations"] if a["iscrowd"]]
    with_people = {a["image_id"] for a in content["annotations"]}
    counts = coco_sample.description["counts"]
    assert counts == {
        "images": len(with_people), "people": len(content["annotations"]), "usable": len(labelled)
    }  # fmt: skip
    assert coco_sample.description["exclude_reason"]["crowd"] == len(crowds)
    assert sum(coco_sample.description["exclude_reason"].values()) == len(content["annotations"]) - len(labelled)
    assert coco_sample.description["skipped"] == {"image_empty": len(content["images"]) - len(with_people)}
    assert set(coco_sample.people[coco_sample.usable]["id"].tolist()) == {a["id"] for a in labelled}


# --- prepare ----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 80, 60


def annotation(number: int, image: int, **changes: Any) -> dict[str, Any]:
    keypoints = [value for k in range(17) for value in (20 + k, 10 + 2 * k, 2)]
    person = {
        "id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "bbox": [10, 5, 40, 50], "area": 1000,
        "keypoints": keypoints, "num_keypoints": 17,
    }  # fmt: skip
    return {**person, **changes}


def smooth_image(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), 6)
    return cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


class Source:
    """Three images and four people on disk, to be spoiled and prepared."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        self.annotations, self.output = folder / "people.json", folder / "shards"
        self.images.mkdir()
        for seed, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
            cv2.imwrite(str(self.images / name), smooth_image(seed))
        self.content: dict[str, Any] = {
            "images": [
                {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
                for number, name in enumerate(("a.jpg", "b.jpg", "c.jpg"), start=1)
            ],
            "annotations": [annotation(10, 1), annotation(11, 1), annotation(12, 2), annotation(13, 3)],
            "categories": [{"id": 1, "name": "person", "keypoints": list(COCO.keypoints)}],
        }

    def prepare(self, **options: Any) -> Shards:
        self.annotations.write_text(json.dumps(self.content), encoding="utf-8")
        return prepare_coco(self.images, self.annotations, self.output, **options)

    def refusal(self, **options: Any) -> str:
        """The message of a refusal that left nothing behind."""
        self.annotations.write_text(json.dumps(self.content), encoding="utf-8")
        return self.refusal_as_it_is(**options)

    def refusal_as_it_is(self, **options: Any) -> str:
        before = sorted(self.folder.rglob("*"))
        with pytest.raises(DataError) as caught:
            prepare_coco(self.images, self.annotations, self.output, **options)
        assert sorted(self.folder.rglob("*")) == before
        return str(caught.value)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_shards_hold_the_bytes_of_the_images_and_every_number_of_the_people(source: Source) -> None:
    source.content["annotations"][0] |= {"bbox": [1.5, 2.25, 30.5, 40.125], "area": 345.5}
    shards = source.prepare()
    assert shards.description["counts"] == {"images": 3, "people": 4, "usable": 4}
    assert shards.description["skipped"] == shards.description["exclude_reason"] == {}
    assert shards.skeleton == COCO
    assert len(shards) == 4
    assert [row["bytes"] for row in shards.images] == [
        (source.images / name).read_bytes() for name in ("a.jpg", "b.jpg", "c.jpg")
    ]
    people = shards.people[:]
    assert people["id"].tolist() == [10, 11, 12, 13]
    assert people["image_id"].tolist() == [1, 1, 2, 3]
    assert people["image_row"].tolist() == [0, 0, 1, 2]
    assert people["box"][0].tolist() == [1.5, 2.25, 30.5, 40.125]
    assert people["area"].tolist() == [345.5, 1000, 1000, 1000]
    assert people["score"].tolist() == [1, 1, 1, 1]
    assert people["keypoints"][3].tolist() == source.content["annotations"][3]["keypoints"]
    assert sorted(path.name for path in source.folder.iterdir()) == ["images", "people.json", "shards"]
    assert sorted(path.name for path in source.output.iterdir()) == ["dataset.json", "images", "people", "usable.npy"]


def test_the_same_source_has_the_same_fingerprint_and_another_does_not(source: Source) -> None:
    first = source.prepare().fingerprint
    source.output.rename(source.folder / "elsewhere")
    assert source.prepare().fingerprint == first
    shutil.rmtree(source.output)
    source.content["annotations"][0]["keypoints"][0] += 1
    second = source.prepare().fingerprint
    shutil.rmtree(source.output)
    shutil.copy(source.images / "b.jpg", source.images / "a.jpg")
    assert len({first, second, source.prepare().fingerprint}) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


Spoil = Callable[[Source], Any]
SPOILED: dict[str, tuple[Spoil, dict[str, int], dict[str, int], dict[str, int]]] = {
    # name: change to the source, then expected counts, skipped and excluded
    "an image that is missing": (
        lambda s: (s.images / "a.jpg").unlink(),
        {"images": 2, "people": 2, "usable": 2},
        {"image_missing": 1, "person_of_skipped_image": 2},
        {},
    ),
    "an image of other bytes": (
        lambda s: (s.images / "a.jpg").write_bytes(b"no image"),
        {"images": 2, "people": 2, "usable": 2},
        {"image_corrupt": 1, "person_of_skipped_image": 2},
        {},
    ),
    "an image without a byte": (
        lambda s: (s.images / "b.jpg").write_bytes(b""),
        {"images": 2, "people": 3, "usable": 3},
        {"image_corrupt": 1, "person_of_skipped_image": 1},
        {},
    ),
    "an image cut off on the way": (
        lambda s: truncate(s.images / "b.jpg"),
        {"images": 2, "people": 3, "usable": 3},
        {"image_corrupt": 1, "person_of_skipped_image": 1},
        {},
    ),
    "an image of another size": (
        lambda s: s.content["images"][1].update(width=WIDTH + 1),
        {"images": 2, "people": 3, "usable": 3},
        {"image_size": 1, "person_of_skipped_image": 1},
        {},
    ),
    "an image lying on its side": (
        lambda s: s.content["images"][1].update(width=HEIGHT, height=WIDTH),
        {"images": 2, "people": 3, "usable": 3},
        {"image_size": 1, "person_of_skipped_image": 1},
        {},
    ),
    "an image without a person": (
        lambda s: s.content["annotations"].pop(),
        {"images": 2, "people": 3, "usable": 3},
        {"image_empty": 1},
        {},
    ),
    "an annotation id that came before": (
        lambda s: s.content["annotations"][2].update(id=10),
        {"images": 2, "people": 3, "usable": 3},
        {"image_empty": 1, "duplicate_id": 1},
        {},
    ),
    "an unknown category": (
        lambda s: s.content["annotations"][0].update(category_id=7),
        {"images": 3, "people": 3, "usable": 3},
        {"unknown_category": 1},
        {},
    ),
    "an unknown image": (
        lambda s: s.content["annotations"][0].update(image_id=7),
        {"images": 3, "people": 3, "usable": 3},
        {"unknown_image": 1},
        {},
    ),
    "a box without width": (
        lambda s: s.content["annotations"][0].update(bbox=[10, 5, 0, 50]),
        {"images": 3, "people": 4, "usable": 3},
        {},
        {"no_area": 1},
    ),
    "a box outside the image": (
        lambda s: s.content["annotations"][0].update(bbox=[WIDTH + 5, 5, 10, 10]),
        {"images": 3, "people": 4, "usable": 3},
        {},
        {"no_area": 1},
    ),
    "a person without keypoints": (
        lambda s: s.content["annotations"][0].update(keypoints=[0] * 51, num_keypoints=0),
        {"images": 3, "people": 4, "usable": 3},
        {},
        {"no_keypoints": 1},
    ),
    "a crowd": (
        lambda s: s.content["annotations"][0].update(iscrowd=1),
        {"images": 3, "people": 4, "usable": 3},
        {},
        {"crowd": 1},
    ),
    "another category": (
        lambda s: (
            s.content["categories"].append({"id": 2, "name": "horse"}),
            s.content["annotations"][0].update(category_id=2, keypoints=None),
        ),
        {"images": 3, "people": 3, "usable": 3},
        {},
        {},
    ),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_cannot_be_used_is_skipped_and_counted(source: Source, spoiled: str) -> None:
    spoil, counts, skipped, excluded = SPOILED[spoiled]
    spoil(source)
    shards = source.prepare()
    assert shards.description["counts"] == counts
    assert shards.description["skipped"] == skipped
    assert shards.description["exclude_reason"] == excluded
    assert len(shards) == len(shards.usable) == counts["usable"]
    assert len(shards.people) == counts["people"]
    assert skipped.keys() <= COCO_SKIPPED.keys()
    rows = PoseStream(shards, input_size=SMALL, batch_size=1).batch(range(len(shards))).rows
    assert set(shards.people[rows.numpy()]["exclude_reason"]) == {""}


def set_entry(section: str, number: int, **entries: Any) -> Spoil:
    return lambda source: source.content[section][number].update(entries)


def replace_section(section: str, value: Any) -> Spoil:
    return lambda source: source.content.update({section: value})


def remove_entry(section: str, number: int, entry: str) -> Spoil:
    return lambda source: source.content[section][number].pop(entry)


NAMES = list(COCO.keypoints)
REFUSED: dict[str, tuple[Spoil, str]] = {
    "no list of images": (lambda s: s.content.pop("images"), "it has no list 'images'"),
    "annotations that are no list": (replace_section("annotations", {}), "it has no list 'annotations'"),
    "annotations that are no objects": (replace_section("annotations", [1]), "annotation"),
    "categories that are no objects": (replace_section("categories", ["person"]), "categor"),
    "no categories": (replace_section("categories", []), "categories"),
    "a category without an id": (remove_entry("categories", 0, "id"), "'id'"),
    "a category whose keypoints are no list": (set_entry("categories", 0, keypoints=None), "keypoints"),
    "an image without a file name": (remove_entry("images", 1, "file_name"), "'file_name' is missing or not str"),
    "an image whose id is a word": (set_entry("images", 1, id="b"), "'id' is missing or not int"),
    "an image id that appears twice": (set_entry("images", 1, id=1), "1 image ids appear twice, 1 among them"),
    "sixteen keypoints": (set_entry("categories", 0, keypoints=NAMES[:16]), "16 keypoints, but skeleton 'coco' has 17"),
    "keypoints in another order": (
        set_entry("categories", 0, keypoints=[NAMES[0], NAMES[2], NAMES[1], *NAMES[3:]]),
        "keypoint 'right_eye' stands where skeleton 'coco' has 'left_eye'",
    ),
    "a person with sixteen keypoints": (
        set_entry("annotations", 1, keypoints=[1, 1, 2] * 16),
        "annotation 11: 'keypoints' holds 48 numbers, not 51",
    ),
    "a person without a list of keypoints": (remove_entry("annotations", 1, "keypoints"), "has no 'keypoints'"),
    "a person without a box": (remove_entry("annotations", 1, "bbox"), "annotation 11: has no 'bbox'"),
    "a box of three numbers": (set_entry("annotations", 1, bbox=[1, 2, 3]), "'bbox' holds 3 numbers, not 4"),
    "a box that is no number": (set_entry("annotations", 1, bbox=[1, float("nan"), 3, 4]), "not a finite number"),
    "a box that is infinite": (set_entry("annotations", 1, bbox=[1, float("inf"), 3, 4]), "not a finite number"),
    "a box beyond single precision": (set_entry("annotations", 1, bbox=[1, 2, 3, 1e39]), "not a finite number"),
    "a keypoint of 400 digits": (set_entry("annotations", 1, keypoints=[10**400] * 51), "not a finite number"),
    "a keypoint that is no number": (
        set_entry("annotations", 1, keypoints=[float("nan")] * 51),
        "annotation 11: 'keypoints' has a value that is not a finite number",
    ),
    "a keypoint that is a word": (set_entry("annotations", 1, keypoints=["x"] * 51), "not a finite number"),
    "an area that is no number": (set_entry("annotations", 1, area=float("nan")), "annotation 11: 'area'"),
    "an area that is null": (set_entry("annotations", 1, area=None), "annotation 11: 'area'"),
    "a score that is a word": (set_entry("annotations", 1, score="high"), "annotation 11: 'score'"),
    "an annotation whose id is a word": (set_entry("annotations", 1, id="x"), "annotation x: has no integer 'id'"),
    "nobody with keypoints": (
        lambda s: [a.update(keypoints=[0] * 51) for a in s.content["annotations"]],
        "no person that can be used; left out: {'no_keypoints': 4}",
    ),
    "nobody at all": (replace_section("annotations", []), "no image of"),
    "no images at all": (replace_section("images", []), "no image of"),
    "a folder without these images": (
        lambda s: [path.rename(path.with_suffix(".png")) for path in list(s.images.iterdir())],
        "images/a.jpg",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_right_is_refused_and_nothing_is_written(source: Source, mistake: str) -> None:
    spoil, words = REFUSED[mistake]
    spoil(source)
    assert words in source.refusal()


def test_a_file_that_is_no_json_is_refused(source: Source) -> None:
    for content in (b'{"images": [', b"\xff\xfe\x00", b"", b"[" * 10**6, b'{"images": ' + b"9" * 5000 + b"}"):
        source.annotations.write_bytes(content)
        assert "people.json: not readable as JSON" in source.refusal_as_it_is()
    source.annotations.write_text("[]", encoding="utf-8")
    assert "not a COCO annotation file" in source.refusal_as_it_is()
    source.annotations.unlink()
    assert "people.json: no such annotation file" in source.refusal_as_it_is()


def test_an_image_folder_that_does_not_exist_is_refused(source: Source) -> None:
    source.images = source.folder / "imagse"
    assert "imagse: no such image folder" in source.refusal()
    source.images = source.annotations  # a file
    assert "no such image folder" in source.refusal()


def test_an_output_that_exists_is_refused_and_kept(source: Source) -> None:
    source.prepare()
    before = (source.output / "dataset.json").read_bytes()
    assert "shards: exists; remove it or choose another output" in source.refusal()
    assert (source.output / "dataset.json").read_bytes() == before


def test_an_output_that_cannot_be_made_is_refused(source: Source) -> None:
    source.output = source.annotations / "shards"
    assert "people.json/shards: cannot be made: Not a directory" in source.refusal()


def test_an_output_that_appears_meanwhile_is_kept(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def taken(path: Path) -> bytes:
        if path.name == "b.jpg":
            source.output.mkdir()
            (source.output / "another").touch()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", taken)
    with pytest.raises(DataError, match="shards: cannot be made: Directory not empty"):
        source.prepare()
    assert sorted(path.name for path in source.folder.iterdir()) == ["images", "people.json", "shards"]
    assert [path.name for path in source.output.iterdir()] == ["another"]


def test_a_failure_on_the_way_leaves_nothing_behind(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def interrupted(path: Path) -> bytes:
        if path.name == "b.jpg":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.prepare()
    assert sorted(path.name for path in source.folder.iterdir()) == ["images", "people.json"]


def test_a_category_is_chosen_by_name_where_several_have_keypoints(source: Source) -> None:
    source.content["categories"].append({"id": 2, "name": "dancer", "keypoints": NAMES})
    source.content["annotations"][3]["category_id"] = 2
    assert "2 categories with keypoints, not one; categories here: 'person', 'dancer'" in source.refusal()
    assert "no category 'horse'" in source.refusal(category="horse")
    assert source.prepare(category="dancer").people[:]["id"].tolist() == [13]


def test_another_skeleton_is_prepared_as_well(source: Source) -> None:
    stick = Skeleton(name="stick", keypoints=("top", "bottom"), sigmas=(0.1, 0.1))
    source.content["categories"][0]["keypoints"] = ["top", "bottom"]
    for person in source.content["annotations"]:
        person["keypoints"] = [20, 10, 2, 30, 50, 1]
    shards = source.prepare(skeleton=stick)
    assert shards.skeleton == stick
    batch = PoseStream(shards, input_size=SMALL, batch_size=4).batch(range(4))
    assert batch.keypoints.shape == (4, 2, 2)
    assert batch.visible.tolist() == [[1, 1]] * 4  # hidden counts as labelled


# --- shards -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "copied"))


def test_a_folder_that_is_no_dataset_is_refused_with_advice(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"not a prepared dataset \(no dataset\.json\).*fpd-accel prepare"):
            Shards(path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[]", b"3", b"{}", b'{"format": 1, "skeleton": {}}'])
def test_a_damaged_description_is_refused(copied: Path, content: bytes) -> None:
    (copied / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json: damaged"):
        Shards(copied)


def test_a_dataset_of_another_format_is_refused_by_number(copied: Path) -> None:
    description = json.loads((copied / "dataset.json").read_bytes())
    description["format"] = FORMAT + 1
    description["skeleton"]["something new"] = True
    (copied / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(DataError, match=rf"format {FORMAT + 1}, but this version reads 1 to {FORMAT}"):
        Shards(copied)


def test_a_dataset_of_format_2_is_the_same_under_its_old_column_name(coco_sample: Shards, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(coco_sample.path, tmp_path / "old"))
    description = json.loads((folder / "dataset.json").read_bytes()) | {"format": 2}
    description["unused"] = description.pop("exclude_reason")
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    shutil.rmtree(folder / "people")
    coco_sample.people.rename_column("exclude_reason", "unused").save_to_disk(str(folder / "people"))
    (folder / "usable.npy").unlink()
    old = Shards(folder)
    assert old.fingerprint == coco_sample.fingerprint
    assert old.description["exclude_reason"] == coco_sample.description["exclude_reason"]
    assert old.usable.tolist() == coco_sample.usable.tolist()
    reasons = [shards.columns(["exclude_reason"])["exclude_reason"].tolist() for shards in (old, coco_sample)]
    assert reasons[0] == reasons[1]
    assert [finding.check for finding in check_shards(old).findings] == [
        finding.check for finding in check_shards(coco_sample).findings
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("part", ["images", "people"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: cut(next(folder.glob("*.arrow"))),
    ],
    ids=["removed", "without its state", "cut off"],
)
def test_a_part_that_cannot_be_opened_is_named(copied: Path, part: str, damage: Callable[[Path], Any]) -> None:
    damage(copied / part)
    with pytest.raises(DataError, match=rf"copied/{part}: cannot be opened"):
        getattr(Shards(copied), part)


def test_an_image_that_no_longer_decodes_is_named(source: Source) -> None:
    shards = source.prepare()
    arrow = next((source.output / "images").glob("*.arrow"))
    stored = (source.images / "b.jpg").read_bytes()
    arrow.write_bytes(arrow.read_bytes().replace(stored, b"\x00" * len(stored)))
    with pytest.raises(DataError, match=r"image b\.jpg no longer decodes"):
        PoseStream(Shards(shards.path), input_size=SMALL, batch_size=4).batch(range(4))


def test_opened_shards_can_be_sent_to_a_worker(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    rows, first = shards.people[:]["id"].tolist(), shards.images[0]
    again = pickle.loads(pickle.dumps(shards))
    assert again.people[:]["id"].tolist() == rows
    assert again.images[0] == first
    assert len(pickle.dumps(shards)) < 20_000  # bytes: the path and the description, no data


# --- the order of samples ---------------------------------------------------------------------------------------


def stream(shards: Path, batch_size: int, **options: Any) -> PoseStream:
    return PoseStream(Shards(shards), input_size=SMALL, batch_size=batch_size, **options)


def joined(batches: Iterable[Batch]) -> Batch:
    kept = list(batches)
    return Batch(**{name: torch.cat([getattr(b, name) for b in kept]) for name in FIELDS})


def assert_same(found: Batch, expected: Batch) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


GLOBAL_BATCH, SAMPLES = 4, 48  # 34 people: into the second epoch


@pytest.fixture(scope="module")
def sequence(tiny_shards: Path) -> Batch:
    """The samples of training, drawn one after the other."""
    return stream(tiny_shards, 1, augment=Augment(), seed=5).batch(range(SAMPLES))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.faults
def test_samples_and_pixels_are_the_same_for_any_number_of_ranks_and_workers(
    tiny_shards: Path, sequence: Batch, ranks: int, workers: int
) -> None:
    options = {"augment": Augment(), "seed": 5, "ranks": ranks, "stop": SAMPLES}
    per_rank = []
    for rank in range(ranks):
        own = stream(tiny_shards, GLOBAL_BATCH // ranks, rank=rank, **options)
        batches = list(make_loader(own, workers, CPU))
        assert len(batches) == len(own) == SAMPLES // GLOBAL_BATCH
        per_rank.append(batches)
    assert_same(joined(batch for step in zip(*per_rank, strict=True) for batch in step), sequence)


@pytest.mark.parametrize("start", [0, 1, 7, 33, 34, 40])
def test_training_goes_on_from_any_sample(tiny_shards: Path, sequence: Batch, start: int) -> None:
    resumed = stream(tiny_shards, 1, augment=Augment(), seed=5, start=start, stop=SAMPLES)
    expected = Batch(**{name: getattr(sequence, name)[start:] for name in FIELDS})
    assert_same(joined(resumed), expected)


def test_a_jump_back_gives_the_samples_of_then(tiny_shards: Path, sequence: Batch) -> None:
    own = stream(tiny_shards, 1, augment=Augment(), seed=5)
    for sample in (40, 3, 39, 2):  # from the second epoch into the first and back
        assert own.batch(range(sample, sample + 1)).rows.item() == sequence.rows[sample]


def test_every_person_comes_exactly_once_per_epoch_and_epochs_differ(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    people = len(shards)
    rows = stream(tiny_shards, 1, augment=Augment(), seed=1).batch(range(3 * people)).rows.tolist()
    epochs = [rows[epoch * people : (epoch + 1) * people] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == shards.usable.tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])
    other = stream(tiny_shards, 1, augment=Augment(), seed=2).batch(range(people)).rows.tolist()
    assert other != epochs[0]


def test_a_person_is_augmented_anew_in_every_epoch(tiny_shards: Path) -> None:
    people = len(Shards(tiny_shards))
    batch = stream(tiny_shards, 1, augment=Augment(half_body=0), seed=1).batch(range(2 * people))
    widths = [dict(zip(b.rows.tolist(), b.sizes[:, 0].tolist(), strict=True)) for b in halves(batch)]
    changed = [row for row in widths[0] if widths[0][row] != widths[1][row]]
    assert len(changed) > people / 2  # a third of the draws sit on two bounds, so some repeat


def halves(batch: Batch) -> list[Batch]:
    middle = len(batch) // 2
    parts = (slice(0, middle), slice(middle, None))
    return [Batch(**{name: getattr(batch, name)[part] for name in FIELDS}) for part in parts]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 4), (3, 5), (4, 16)])
def test_evaluation_covers_everybody_in_order_with_as_many_batches_on_every_rank(
    tiny_valid: Path, ranks: int, batch_size: int
) -> None:
    usable = Shards(tiny_valid).usable.tolist()
    per_rank = [list(stream(tiny_valid, batch_size, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert {len(batch) for batches in per_rank for batch in batches} == {batch_size}
    rows = [row for step in zip(*per_rank, strict=True) for batch in step for row in batch.rows.tolist()]
    assert rows[: len(usable)] == usable
    assert set(rows) == set(usable)  # what repeats to fill the last batches is known
    assert len(rows) - len(usable) < ranks * batch_size


@pytest.mark.parametrize("start", [0, 30, 33, 10**9])
def test_going_on_draws_one_order_however_far_it_has_got(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    drawn = []
    order = Shards.order

    def counted(shards: Shards, seed: int, epoch: int, *, source: int) -> np.ndarray:
        drawn.append(epoch)
        return order(shards, seed, epoch, source=source)

    monkeypatch.setattr(Shards, "order", counted)
    next(iter(stream(tiny_shards, 1, augment=Augment(), start=start, stop=start + 1)))
    assert drawn == [start // len(Shards(tiny_shards))]


def test_an_order_is_the_generators_permutation_in_half_the_memory(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    for seed, epoch, source in ((0, 0, 0), (7, 2, 1)):
        found = shards.order(seed, epoch, source=source)
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, source]))
        assert found.tolist() == generator.permutation(len(shards)).tolist()
        assert found.dtype == np.int32


def test_workers_find_the_files_open(tiny_shards: Path) -> None:
    own = stream(tiny_shards, 1)
    assert "images" not in vars(own.sources[0].shards)
    make_loader(own, 0, CPU)
    assert {"images", "people", "usable"} <= vars(own.sources[0].shards).keys()


def test_an_interval_without_samples_is_an_empty_stream(tiny_shards: Path) -> None:
    for start in (10, 11):
        empty = stream(tiny_shards, 4, start=start, stop=10)
        assert len(empty) == 0
        assert list(empty) == []


# --- batches ----------------------------------------------------------------------------------------------------


def test_a_mirrored_sample_is_the_sample_of_the_mirrored_image(source: Source) -> None:
    """Lossless images, and a box whose middle pixel is mirrored onto that of its mirror image's box."""
    image, box = smooth_image(9), [12, 6, 31, 45]
    cv2.imwrite(str(source.images / "a.png"), image)
    cv2.imwrite(str(source.images / "b.png"), image[:, ::-1])
    source.content["images"] = [
        {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
    ]
    points = np.random.default_rng(0).uniform([12, 6], [43, 51], (17, 2))
    seen = np.array([2, 0, 1, 2, 0, 1, 2, 2, 2, 0, 1, 2, 2, 2, 2, 0, 2.0])
    partners = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    mirrored = np.column_stack([WIDTH - 1 - points[:, 0], points[:, 1]])[partners]
    source.content["annotations"] = [
        annotation(1, 1, bbox=box, keypoints=np.column_stack([points, seen]).ravel().tolist()),
        annotation(
            2, 2, bbox=[WIDTH - 12 - 31, 6, 31, 45],
            keypoints=np.column_stack([mirrored, seen[partners]]).ravel().tolist(),
        ),
    ]  # fmt: skip
    shards = source.prepare()
    options: dict[str, Any] = {"scale": 0, "rotation": 0, "half_body": 0}
    flipped, straight = (
        PoseStream(shards, input_size=(64, 48), batch_size=2, augment=Augment(flip=flip, **options)).batch(range(2))
        for flip in (1, 0)
    )
    first, second = (batch.rows.tolist() for batch in (flipped, straight))
    a, b = first.index(0), second.index(1)
    assert np.abs(flipped.crops[a].numpy().astype(int) - straight.crops[b].numpy()).max() <= 1  # grey level
    assert straight.crops[b].numpy().std() > 20  # grey levels
    assert torch.equal(flipped.visible[a], straight.visible[b])
    kept = straight.visible[b] > 0
    torch.testing.assert_close(
        flipped.keypoints[a][kept], straight.keypoints[b][kept], atol=1e-4, rtol=0
    )  # crop pixels


def test_augmented_keypoints_stay_on_what_they_mark(source: Source) -> None:
    """A bright dot at a keypoint is where the stream says the keypoint is, turned, scaled and mirrored."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.circle(image, (30, 28), 3, (255, 255, 255), -1)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        cv2.imwrite(str(source.images / name), image)
    for person in source.content["annotations"]:
        person["keypoints"] = [30, 28, 2] + [0] * 48
    shards = source.prepare()
    batch = PoseStream(shards, input_size=(128, 96), batch_size=1, augment=Augment(half_body=0)).batch(range(24))
    assert batch.visible.sum(dim=1).tolist() == [1] * 24
    for crop, keypoints in zip(batch.crops.numpy(), batch.keypoints.numpy(), strict=True):
        brightness = crop.mean(axis=2)
        rows, columns = np.mgrid[: crop.shape[0], : crop.shape[1]]
        middle = [(brightness * axis).sum() / brightness.sum() for axis in (columns, rows)]
        np.testing.assert_allclose(keypoints[0], middle, atol=0.5)  # crop pixels


def test_a_batch_says_what_it_holds(tiny_shards: Path) -> None:
    batch = stream(tiny_shards, 3, augment=Augment()).batch(range(3))
    assert len(batch) == 3
    assert batch.crops.shape == (3, *SMALL, 3)
    assert batch.crops.dtype == torch.uint8
    assert batch.keypoints.dtype == batch.visible.dtype == batch.centers.dtype == batch.sizes.dtype == torch.float32
    torch.testing.assert_close(batch.sizes[:, 0] / batch.sizes[:, 1], torch.full((3,), SMALL[1] / SMALL[0]))
    assert set(batch.visible.unique().tolist()) <= {0.0, 1.0}
    assert_same(batch.to("cpu"), batch)


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_pixels_are_normalised_by_the_mean_and_deviation_of_each_channel(color: str) -> None:
    crops = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Normalization(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), color=color)(crops)  # type: ignore[arg-type]
    pixels = crops.numpy()[..., ::-1] if color == "bgr" else crops.numpy()
    expected = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)  # standard deviations
    assert images.dtype == torch.float32


def test_usable_people_are_read_from_their_own_file(tiny_shards: Path, tmp_path: Path) -> None:
    written = Shards(tiny_shards).usable
    copy = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    (copy / "usable.npy").unlink()
    np.testing.assert_array_equal(Shards(copy).usable, written)  # told by the people themselves
    np.save(copy / "usable.npy", written[:-1])
    with pytest.raises(DataError, match=r"usable\.npy: damaged"):
        len(Shards(copy))
    (copy / "usable.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"usable\.npy: damaged"):
        len(Shards(copy))
