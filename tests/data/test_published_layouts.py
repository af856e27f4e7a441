"""Data sets in the layouts in which labeling tools export them open as they are."""

from __future__ import annotations

import json
import shutil
import unicodedata

import numpy as np
import pytest

from detdistill.data.inspect import inspect_data
from detdistill.data.loading import open_data, tell_format, usable_splits
from detdistill.errors import UserError
from detdistill.recipe import DataConfig


def _boxes(split):
    return {record.image_id: record.boxes_K4.tolist() for record in split.records}


def _labels(split):
    return {
        record.image_id: [split.classes[label] for label in record.labels_K.tolist()]
        for record in split.records
    }


# --- LabelImg --------------------------------------------------------------------------------------------

# As LabelImg 1.8 writes it: tabs, <path> of its machine, no XML declaration.
LABELIMG = """<annotation>
\t<folder>photos</folder>
\t<filename>{name}.jpg</filename>
\t<path>C:\\Users\\ann\\photos\\{name}.jpg</path>
\t<source>
\t\t<database>Unknown</database>
\t</source>
\t<size>
\t\t<width>64</width>
\t\t<height>48</height>
\t\t<depth>3</depth>
\t</size>
\t<segmented>0</segmented>
\t<object>
\t\t<name>{label}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>0</truncated>
\t\t<difficult>0</difficult>
\t\t<bndbox>
\t\t\t<xmin>11</xmin>
\t\t\t<ymin>6</ymin>
\t\t\t<xmax>20</xmax>
\t\t\t<ymax>30</ymax>
\t\t</bndbox>
\t</object>
</annotation>
"""


@pytest.fixture
def write_labelimg(write_image):
    """``write_labelimg(folder, {"a": "dog"})``: an image and its XML file in one folder."""

    def write(folder, labels):
        for name, label in labels.items():
            write_image(folder / f"{name}.jpg")
            (folder / f"{name}.xml").write_text(LABELIMG.format(name=name, label=label), encoding="utf-8")
        return folder

    return write


def test_labelimg_writes_xml_files_next_to_the_images(tmp_path, write_labelimg, write_image):
    write_labelimg(tmp_path, {"a": "dog", "b": "cat"})
    write_image(tmp_path / "not looked at yet.jpg")
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert _labels(split) == {"a": ["dog"], "b": ["cat"]}
    assert _boxes(split)["a"] == [[10, 5, 20, 30]]
    (finding,) = split.findings
    assert "1 images have no XML file and are left out" in str(finding)
    assert "not looked at yet.jpg" in str(finding)


def test_a_share_of_labelimgs_folder_is_held_out(tmp_path, write_labelimg):
    write_labelimg(tmp_path, {f"{i}": "dog" for i in range(20)})
    with pytest.raises(UserError, match=r"no split 'val'; set data\.val, perhaps to 20%"):
        usable_splits(DataConfig(root=tmp_path), ["train", "val"])
    splits = usable_splits(DataConfig(root=tmp_path, val="20%"), ["train", "val"])
    assert sum(map(len, splits.values())) == 20
    assert len(splits["val"]) > 0


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "valid"), ("images/train", "images/test")])
def test_parts_of_labelimgs_files_are_folders(tmp_path, write_labelimg, parts):
    for part, label in zip(parts, ("dog", "dog"), strict=True):
        write_labelimg(tmp_path / part, {part.replace("/", "-"): label})
    splits = open_data(DataConfig(root=tmp_path))
    assert [len(split) for split in splits.values()] == [1, 1]
    assert not any(split.findings for split in splits.values())
    renamed = tmp_path / "night"
    shutil.move(tmp_path / parts[1], renamed)
    assert len(open_data(DataConfig(root=tmp_path, val="night"))["val"]) == 1
    with pytest.raises(UserError, match=r"no folder 'nigth' with VOC's XML files.* holds .*night/"):
        open_data(DataConfig(root=tmp_path, val="nigth"))


def test_labelimgs_yolo_files_are_next_to_the_images_too(tmp_path, write_image):
    for name in "ab":
        write_image(tmp_path / f"{name}.jpg")
    (tmp_path / "a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert _labels(split) == {"a": ["dog"], "b": []}
    assert not split.findings


def test_classes_files_of_two_folders_have_to_agree(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5"}, "val": {"b": "0 .5 .5 .5 .5"}})
    (tmp_path / "labels" / "train" / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "labels" / "val" / "classes.txt").write_text("cat\n")  # it had not seen a dog yet
    assert open_data(DataConfig(root=tmp_path))["val"].classes == ("cat", "dog")
    (tmp_path / "labels" / "val" / "classes.txt").write_text("dog\n")
    with pytest.raises(UserError, match=r"val/classes\.txt: numbers the classes in another way than"):
        open_data(DataConfig(root=tmp_path))


# --- VOC -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotations", "images"),
    [("Annotations", "JPEGImages"), ("annotations", "images"), ("ANNOTATIONS", "IMAGES"), ("xmls", "Images")],
)
def test_voc_without_image_sets_in_any_case(tmp_path, write_labelimg, annotations, images):
    write_labelimg(tmp_path / images, {"a": "dog", "b": "cat"})
    (tmp_path / annotations).mkdir()
    for file in (tmp_path / images).glob("*.xml"):
        shutil.move(file, tmp_path / annotations)
    assert tell_format(DataConfig(root=tmp_path)) == "voc"
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert _labels(split) == {"a": ["dog"], "b": ["cat"]}
    assert not split.findings


def test_image_sets_in_any_case(tmp_path, write_voc, voc_object):
    write_voc(tmp_path, {"train": {"a": voc_object("dog", 1, 1, 9, 9)}})
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "a.JPG")
    for name in ("ImageSets/Main", "ImageSets", "JPEGImages", "Annotations"):
        (tmp_path / name).rename((tmp_path / name).with_name((tmp_path / name).name.lower()))
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert _labels(split) == {"a": ["dog"]}
    assert not split.findings


def test_xml_files_of_another_kind_are_not_taken_for_voc(tmp_path, write_image):
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / "annotations.xml").write_text("<annotations><version>1.1</version></annotations>")  # CVAT's own
    with pytest.raises(UserError, match=r"no dataset is recognized here\. Seen: annotations\.xml, images/"):
        open_data(DataConfig(root=tmp_path))


def test_a_wrong_size_names_the_xml_file(tmp_path, write_labelimg, write_image):
    write_labelimg(tmp_path, {"a": "dog"})
    write_image(tmp_path / "a.jpg", 100, 80)
    (error,) = inspect_data(DataConfig(root=tmp_path)).errors
    assert f"is 100×80, but {tmp_path / 'a.xml'} says 64×48" in str(error)


# --- CVAT ------------------------------------------------------------------------------------------------


@pytest.fixture
def write_cvat(write_image):
    """``write_cvat(root, ("train", "valid"))``: CVAT's YOLO 1.1 export, with images."""

    def write(root, subsets):
        for subset in subsets:
            folder = root / f"obj_{subset}_data"
            write_image(folder / "frame_000000.png")
            write_image(folder / "street" / "frame_000001.png")
            (folder / "frame_000000.txt").write_text("1 0.500000 0.500000 0.500000 0.500000\n")
            (folder / "street" / "frame_000001.txt").write_text("")
            names = ("frame_000000.png", "street/frame_000001.png")
            (root / f"{subset}.txt").write_text("".join(f"data/obj_{subset}_data/{name}\n" for name in names))
        (root / "obj.names").write_text("cat\ndog\n")
        lists = "".join(f"{subset} = data/{subset}.txt\n" for subset in subsets)
        (root / "obj.data").write_text(f"classes = 2\n{lists}names = data/obj.names\nbackup = backup/\n")
        return root

    return write


@pytest.mark.parametrize("subsets", [("train", "valid"), ("Train", "Validation"), ("train", "Test")])
def test_cvats_yolo_export(tmp_path, write_cvat, subsets):
    write_cvat(tmp_path, subsets)
    splits = open_data(DataConfig(root=tmp_path))
    for name, subset in zip(("train", "val"), subsets, strict=True):
        assert _labels(splits[name]) == {"frame_000000": ["dog"], "frame_000001": []}
        assert splits[name].records[0].path == tmp_path / f"obj_{subset}_data" / "frame_000000.png"
        assert _boxes(splits[name])["frame_000000"] == [[16, 12, 48, 36]]
        assert not splits[name].findings


def test_cvats_export_in_a_folder_named_images(tmp_path, write_cvat):
    root = write_cvat(tmp_path / "images" / "export", ("train",))
    (tmp_path / "labels").mkdir()
    assert _labels(open_data(DataConfig(root=root))["train"])["frame_000000"] == ["dog"]


def test_cvats_export_without_images_is_an_error_that_says_so(tmp_path, write_cvat):
    write_cvat(tmp_path, ("train",))
    for image in tmp_path.rglob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"its image data/obj_train_data/frame_000000\.png does not exist"):
        usable_splits(DataConfig(root=tmp_path), ["train"])


def test_cvats_ultralytics_export(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5"}, "val": {"b": "0 .5 .5 .5 .5"}})
    for part, name in (("train", "a"), ("val", "b")):
        (tmp_path / f"{part}.txt").write_text(f"data/images/{part}/{name}.jpg\n")
    (tmp_path / "data.yaml").write_text("names:\n  0: cat\npath: .\ntrain: train.txt\nval: val.txt\n")
    splits = open_data(DataConfig(root=tmp_path))
    assert [_labels(split) for split in splits.values()] == [{"a": ["cat"]}, {"b": ["cat"]}]


# --- Label Studio ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 300])
def test_label_studios_yolo_export(tmp_path, write_image, classes):
    for name in ("0a1b2c3d-street", "4e5f6a7b-yard"):
        write_image(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0a1b2c3d-street.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    (tmp_path / "labels" / "4e5f6a7b-yard.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    names = ["Car", "Plane", *(f"Class {i}" for i in range(classes - 2))]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    notes = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "info": {"year": 2024, "version": "1.0", "contributor": "Label Studio"},
    }
    (tmp_path / "notes.json").write_text(json.dumps(notes, indent=2))
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert _labels(split) == {"0a1b2c3d-street": ["Plane"], "4e5f6a7b-yard": ["Car"]}
    assert not split.findings
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"images: holds no images, and .*labels has 2 label files; export"):
        open_data(DataConfig(root=tmp_path))


# --- YOLO from elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels"), [("IMAGES", "LABELS"), ("Images", "labels"), ("images", "Labels")]
)
def test_yolo_folders_in_any_case(tmp_path, write_yolo, images, labels):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5"}, "val": {"b": "0 .5 .5 .5 .5"}})
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "TRAIN")
    (tmp_path / "images").rename(tmp_path / images)
    (tmp_path / "labels").rename(tmp_path / labels)
    (tmp_path / "Classes.txt").write_text("cat\n")
    splits = open_data(DataConfig(root=tmp_path))
    assert [_labels(split) for split in splits.values()] == [{"a": ["cat"]}, {"b": ["cat"]}]
    assert not any(split.findings for split in splits.values())


@pytest.mark.parametrize("name", ["classes.txt", "obj.names", "labels.txt", "labels/classes.txt"])
def test_files_that_name_the_classes(tmp_path, write_yolo, name):
    write_yolo(tmp_path, {"train": {"a": "1 .5 .5 .5 .5"}})
    (tmp_path / name).write_text("02146\nnull\n")
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert _labels(split) == {"a": ["null"]}
    assert not split.findings
    (tmp_path / name).write_text("null\nnull\n")
    with pytest.raises(UserError, match=rf"{name}: classes 0 and 1 have the same name 'null'"):
        open_data(DataConfig(root=tmp_path))


def test_data_classes_name_what_no_file_names(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": {"a": "1 .5 .5 .5 .5"}})
    assert _labels(open_data(DataConfig(root=tmp_path, classes=("cat", "dog")))["train"]) == {"a": ["dog"]}
    with pytest.raises(UserError, match=r"holds images/, labels/; add classes\.txt .*or set data\.classes"):
        open_data(DataConfig(root=tmp_path))


@pytest.mark.parametrize(
    "entry",
    [
        "/home/ann/boards/images/train/a.jpg",
        "C:\\boards\\images\\train\\a.jpg",
        "images\\train\\a.jpg",
        "somewhere/else/a.jpg",
        "./images/train/a.jpg",
        "IMAGES/TRAIN/A.JPG",
        "a.jpg",
    ],
)
def test_a_list_may_have_the_paths_of_another_machine(tmp_path, write_yolo, entry):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5", "b": ""}})
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "mine.txt").write_text(f"{entry}\n")
    split = open_data(DataConfig(root=tmp_path, train="mine.txt"))["train"]
    assert _labels(split) == {"a": ["cat"]}
    assert split.records[0].path == tmp_path / "images" / "train" / "a.jpg"
    assert not split.findings


def test_an_image_that_is_not_where_the_list_says_is_not_another_parts(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": {"b": ""}, "val": {"a": "0 .5 .5 .5 .5"}})
    (tmp_path / "classes.txt").write_text("cat\n")
    for entry in ("images/train/a.jpg", "data/images/train/a.jpg", "/home/ann/images/train/a.jpg"):
        (tmp_path / "train.txt").write_text(f"{entry}\n")
        split = open_data(DataConfig(root=tmp_path, train="train.txt"))["train"]
        assert [finding.kind for finding in split.errors] == ["missing image", "empty split"]
        assert "data.images" not in str(split.errors[0])


def test_of_several_images_of_a_name_the_folders_decide(tmp_path, write_image):
    for camera in ("left", "right"):
        write_image(tmp_path / "raw" / camera / "1.jpg")
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "raw" / "left" / "1.txt").write_text("0 .5 .5 .5 .5\n")
    (tmp_path / "train.txt").write_text("/home/ann/left/1.jpg\n")
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert split.records[0].path == tmp_path / "raw" / "left" / "1.jpg"
    (tmp_path / "train.txt").write_text("/home/ann/middle/1.jpg\n")
    (error, *_) = open_data(DataConfig(root=tmp_path))["train"].errors
    assert "no single 1.jpg is in" in str(error)


def test_data_yaml_of_another_machine(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5"}, "val": {"b": "0 .5 .5 .5 .5"}})
    text = "path: /content/boards\nnames: [cat]\ntrain: /content/boards/images/train\nval: images/val\n"
    (tmp_path / "data.yaml").write_text(text)
    assert {name: len(split) for name, split in open_data(DataConfig(root=tmp_path)).items()} == {
        "train": 1, "val": 1,
    }  # fmt: skip
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: ../test/images\n")
    with pytest.raises(
        UserError, match=r"no such images '\.\./test/images' in .*\(data\.yaml, images/, labels/\)"
    ):
        open_data(DataConfig(root=tmp_path))


def test_labels_that_are_elsewhere_are_not_taken_for_background(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5", "b": None}})
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "labels" / "train" / "a.txt").rename(tmp_path / "labels" / "train" / "a_boxes.txt")
    (error,) = open_data(DataConfig(root=tmp_path))["train"].errors
    assert "none of its 2 images has a label file: that of a.jpg would be" in str(error)
    assert "holds a_boxes.txt" in str(error)


# --- names in two Unicode forms --------------------------------------------------------------------------


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_names_meet(
    tmp_path, write_image, write_yolo, write_coco, write_labelimg, forms
):
    here, there = (unicodedata.normalize(form, "Äpfel") for form in forms)
    assert here != there
    write_yolo(tmp_path / "yolo", {"train": {here: "0 .5 .5 .5 .5"}})
    labels = tmp_path / "yolo" / "labels" / "train"
    (labels / f"{here}.txt").rename(labels / f"{there}.txt")
    (tmp_path / "yolo" / "classes.txt").write_text("a\n")
    (tmp_path / "yolo" / "list.txt").write_text(f"images/train/{there}.jpg\n")
    write_labelimg(tmp_path / "voc", {here: "a"})
    (tmp_path / "voc" / f"{here}.xml").rename(tmp_path / "voc" / f"{there}.xml")
    write_coco(tmp_path / "coco" / "train.json", tmp_path / "coco" / "train", images=1)
    (tmp_path / "coco" / "train" / "1.png").rename(tmp_path / "coco" / "train" / f"{here}.png")
    text = (tmp_path / "coco" / "train.json").read_text().replace("1.png", f"{there}.png")
    (tmp_path / "coco" / "train.json").write_text(text)
    for config in (
        DataConfig(root=tmp_path / "yolo"),
        DataConfig(root=tmp_path / "yolo", train="list.txt"),
        DataConfig(root=tmp_path / "voc"),
        DataConfig(root=tmp_path / "coco"),
    ):
        split = open_data(config)["train"]
        assert not split.errors
        assert [len(record.labels_K) for record in split.records] == [1]
        assert split.records[0].path.is_file()


# --- messages --------------------------------------------------------------------------------------------


def test_a_key_that_does_nothing_is_refused(tmp_path, write_yolo, write_labelimg):
    write_yolo(tmp_path / "yolo", {"train": {"a": "0 .5 .5 .5 .5"}})
    write_labelimg(tmp_path / "voc", {"a": "dog"})
    for root in ("yolo", "voc"):
        with pytest.raises(UserError, match=r"data\.images is not for"):
            open_data(DataConfig(root=tmp_path / root, images="images"))


def test_numbers_of_boxes_are_the_same_in_all_layouts(tmp_path, write_labelimg, write_cvat):
    """The same box, 32 by 24 pixels in the middle, as VOC counts pixels and as YOLO does."""
    write_labelimg(tmp_path / "voc", {"frame_000000": "dog"})
    text = (tmp_path / "voc" / "frame_000000.xml").read_text()
    for old, new in ((">11<", ">17<"), (">6<", ">13<"), (">20<", ">48<"), (">30<", ">36<")):
        text = text.replace(old, new)
    (tmp_path / "voc" / "frame_000000.xml").write_text(text)
    write_cvat(tmp_path / "cvat", ("train",))
    of_voc, of_cvat = (
        _boxes(open_data(DataConfig(root=tmp_path / name))["train"])["frame_000000"] for name in ("voc", "cvat")
    )
    np.testing.assert_allclose(of_voc, of_cvat)
