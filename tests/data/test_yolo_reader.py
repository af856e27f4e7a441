"""YOLO folders, in the layouts of Ultralytics and Roboflow."""

from __future__ import annotations

import pytest

from detdistill.data.formats.yolo import read_yolo
from detdistill.data.loading import open_data
from detdistill.data.masks import decode_mask
from detdistill.errors import UserError
from detdistill.recipe import DataConfig


def test_rows_become_boxes_and_polygons_masks(tmp_path, write_yolo):
    rows = "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"
    write_yolo(tmp_path, {"train": {"a": rows, "b": None, "c": "0 .1 .1 .5 .1 .5 .5\n"}})
    split = read_yolo(tmp_path / "images" / "train", "train", ["cat", "dog"])
    first, background, _ = split.records
    assert first.boxes_K4.tolist() == [[24, 12, 40, 36], [16, 12, 48, 36]]
    assert first.labels_K.tolist() == [1, 0]
    assert first.masks is not None
    mask = decode_mask(first.masks[1], 48, 64)
    assert mask.sum() == 32 * 24
    assert mask[12:36, 16:48].all()
    assert len(background.labels_K) == 0
    assert split.warning_counts() == {"missing mask": 1}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("0 0.5 0.5 0.1", "malformed row"),
        ("0 0.5 0.5 0.1 0.1 0.9", "malformed row"),
        ("0 a b c d", "malformed row"),
        ("0 320 200 50 50", "malformed row"),
        ("2 0.5 0.5 0.1 0.1", "unknown class"),
        ("-1 0.5 0.5 0.1 0.1", "unknown class"),
        ("0.5 0.5 0.5 0.1 0.1", "unknown class"),
        ("nan 0.5 0.5 0.1 0.1", "unknown class"),
        ("0 0.5 0.5 nan 0.1", "box not finite"),
        ("0 0.5 0.5 0 0.1", "zero-size box"),
        ("0 1.3 0.5 0.1 0.1", "box outside image"),
    ],
)
def test_a_bad_row_is_dropped_and_counted(tmp_path, write_yolo, row, kind):
    write_yolo(tmp_path, {"train": {"a": f"0 .5 .5 .1 .1\n{row}\n"}})
    split = read_yolo(tmp_path / "images" / "train", "train", ["cat", "dog"])
    assert split.warning_counts() == {kind: 1}
    assert len(split.records[0].labels_K) == 1
    assert "a.txt" in str(split.findings[0])


@pytest.mark.parametrize(
    ("rows", "boxes"),
    [
        (["0 .5 .5 .2 .2 .91", "1 .3 .4 .1 .1 .45"], None),
        (["0 .5 .5 .2 .2 .91 1", "1 .3 .4 .1 .1 .45 12"], None),
        (["0 .5 .5 .2 .2 1", "1 .3 .4 .1 .1 12"], None),  # of a tracker without scores
        (["0 .5 .5 .2 .2 .91 1", "1 .3 .4 .1 .1 .45"], None),
        (["0 .5 .5 .2 .2 .91", "1 .3 .4 .1 .1"], 1),  # one row alone is dropped
        (["0 .1 .1 .9 .1 .5 1", "0 .1 .1 .9 .1 .5 0"], 2),  # triangles: the boxes would leave the image
        (["0 .5 .5 .2 .2 .9 1", "0 .5 .5 .2 .2 .9 .5"], 2),  # no track id
        (["0 .5 .5 .2 .2 .9 1", "0 .5 .5 .2 .2 1.2 1"], 2),  # no score
    ],
)
def test_predictions_are_no_triangles(tmp_path, write_yolo, rows, boxes):
    write_yolo(tmp_path, {"train": {"a": rows[0], "b": f"\n{rows[1]}\n", "c": None}})
    split = read_yolo(tmp_path / "images" / "train", "train", ["cat", "dog"])
    assert [finding.kind for finding in split.errors] == (["predictions"] if boxes is None else [])
    assert len(split.records.labels_M) == (boxes or 0)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        # two key points; three with visibility; box and polygon, and a box
        (["0 .5 .5 .2 .2 .45 .45 .55 .55", "1 .3 .4 .1 .1 .3 .4 .33 .42"], True),
        (["0 .5 .5 .2 .2 .45 .45 2 .55 .55 1 0 0 0", "0 .5 .5 .2 .2 0 0 0 .5 .5 2 .5 .5 1"], True),
        (["0 .5 .5 .2 .2 .4 .4 .6 .4 .6 .6", "0 .3 .4 .1 .1"], True),
        # oriented boxes are polygons; of two rows one is a polygon
        (["0 .4 .4 .6 .4 .6 .6 .4 .6", "0 .1 .1 .2 .1 .2 .3 .1 .3"], False),
        (["0 .5 .5 .2 .2 .45 .45 .55 .55", "0 .1 .1 .2 .1 .2 .3 .1 .3"], False),
    ],
)
def test_boxes_with_points_are_no_polygons(tmp_path, write_yolo, rows, found):
    write_yolo(tmp_path, {"train": {"a": rows[0], "b": f"\n{rows[1]}\n"}})
    split = read_yolo(tmp_path / "images" / "train", "train", ["cat", "dog"])
    assert ("box and points" in [finding.kind for finding in split.errors]) == found


def test_labels_without_images_unreadable_images_and_equal_names(tmp_path, write_yolo, write_image):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .1 .1", "b": "0 .5 .5 .1 .1", "c": ""}})
    (tmp_path / "images" / "train" / "a.jpg").unlink()
    (tmp_path / "images" / "train" / "c.jpg").write_bytes(b"no image")
    write_image(tmp_path / "images" / "train" / "b.png")
    split = read_yolo(tmp_path / "images" / "train", "train", ["cat"])
    assert sorted(finding.kind for finding in split.findings) == [
        "duplicate image id", "label without image", "unreadable image",
    ]  # fmt: skip


_ONE = {"a": "0 .5 .5 .1 .1"}


def _yaml(root, text, name="data.yaml"):
    (root / name).write_text(text)
    return root / name


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat]\ntrain: images/train\nval: images/val\n",
        "names: {0: cat}\npath: .\ntrain: [images/train]\nval: images/val\n",
        "names: {0: cat}\npath: ../datasets/coco8\ntrain: images/train\nval: images/val\n",
        "names: [cat]\ntrain: ../images/train\nval: ../images/val\n",
        "names: [cat]\ntrain: train.txt\ntest: images/val\n",
    ],
)
def test_dataset_files(tmp_path, write_yolo, text):
    write_yolo(tmp_path, {"train": _ONE, "val": {"b": "0 .5 .5 .1 .1"}})
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\n")
    file = _yaml(tmp_path, text)
    for root in (tmp_path, file):
        splits = open_data(DataConfig(root=root))
        assert [record.image_id for record in splits["train"].records] == ["a"]
        assert [record.image_id for record in splits["val"].records] == ["b"]
        assert splits["train"].classes == ("cat",)
        assert not any(split.findings for split in splits.values())


def test_folders_alone_need_a_file_of_class_names(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": _ONE, "val": _ONE})
    with pytest.raises(UserError, match=r"add classes\.txt"):
        open_data(DataConfig(root=tmp_path))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert open_data(DataConfig(root=tmp_path))["val"].classes == ("cat", "dog")


def test_roboflow_folders(tmp_path, write_image):
    for part in ("train", "valid"):
        write_image(tmp_path / part / "images" / f"{part}.jpg")
        (tmp_path / part / "labels").mkdir()
        (tmp_path / part / "labels" / f"{part}.txt").write_text("0 .5 .5 .1 .1")
    _yaml(tmp_path, "names: [cat]\nnc: 1\ntrain: ../train/images\nval: ../valid/images\n")
    splits = open_data(DataConfig(root=tmp_path))
    assert [len(split.records[0].labels_K) for split in splits.values()] == [1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", "numbered 0…1 without gaps"),
        ("names: cat\ntrain: images/train\n", "names must list the classes"),
        ("names: [cat]\ntrain: images/nowhere\n", "no such images 'images/nowhere'"),
    ],
)
def test_a_wrong_dataset_file_is_refused(tmp_path, write_yolo, text, message):
    write_yolo(tmp_path, {"train": _ONE})
    _yaml(tmp_path, text)
    with pytest.raises(UserError, match=message):
        open_data(DataConfig(root=tmp_path))


def test_several_dataset_files_are_asked_about(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": _ONE})
    for name in ("a.yaml", "b.yml"):
        _yaml(tmp_path, "names: [cat]\ntrain: images/train\n", name)
    with pytest.raises(UserError, match=r"several dataset files: a\.yaml, b\.yml"):
        open_data(DataConfig(root=tmp_path))


def test_a_yaml_tag_runs_nothing(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": _ONE})
    _yaml(tmp_path, "names: !!python/object/apply:os.system ['touch ran']\ntrain: images/train\n")
    with pytest.raises(UserError):
        open_data(DataConfig(root=tmp_path))
    assert not (tmp_path / "ran").exists()


def test_key_points_after_a_box_are_no_polygon(tmp_path, write_yolo):
    row = "0 .5 .5 .25 .5 .1 .1 .9 .9\n"  # two key points of two numbers: as many as a polygon has
    write_yolo(tmp_path, {"train": {"a": row}, "val": {"b": row}})
    text = "names: [cat]\ntrain: images/train\nval: images/val\n"
    _yaml(tmp_path, text + "kpt_shape: [2, 2]\n")
    assert open_data(DataConfig(root=tmp_path))["train"].records[0].boxes_K4.tolist() == [[24, 12, 40, 36]]
    _yaml(tmp_path, text + "kpt_shape: two\n")
    with pytest.raises(UserError, match="kpt_shape"):
        open_data(DataConfig(root=tmp_path))


def test_ids_do_not_depend_on_where_the_dataset_lies(tmp_path, write_image):
    for place in ("here", "there/deep"):
        for name in ("a/1.jpg", "b/1.jpg"):
            write_image(tmp_path / place / "images" / name)
    ids = [
        [record.image_id for record in read_yolo(tmp_path / place / "images", "train", ["cat"]).records]
        for place in ("here", "there/deep")
    ]
    assert ids == [["a/1", "b/1"]] * 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[02146, 1.10, null]", ["02146", "1.10", "null"]),
        ("[yes, no, on, off, ~]", ["yes", "no", "on", "off", "~"]),
        ("[0x1F, 1_000, 1e3, 12:30:00, 2024-01-02]", ["0x1F", "1_000", "1e3", "12:30:00", "2024-01-02"]),
        ("[\"a b\", 'c: d', TRUE]", ["a b", "c: d", "TRUE"]),
        ('{"0": yes, "1": no}', ["yes", "no"]),
        ("{1: b, 0: a}", ["a", "b"]),
    ],
)
def test_class_names_are_as_written(tmp_path, write_yolo, names, expected):
    write_yolo(tmp_path, {"train": _ONE})
    _yaml(tmp_path, f"names: {names}\ntrain: images/train\n")
    assert list(open_data(DataConfig(root=tmp_path))["train"].classes) == expected


def test_a_part_that_is_null_is_absent(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": _ONE})
    _yaml(tmp_path, "names: [cat]\ntrain: images/train\nval:\ntest: null\n")
    assert set(open_data(DataConfig(root=tmp_path))) == {"train"}


_HEAD = "names: [cat]\ntrain: images/train\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names:\n\t0: red\ntrain: images/train\n", r"data\.yaml:2: not YAML"),
        (_HEAD + "date: 2024-13-45\n", r"data\.yaml: a value cannot be read: month"),
        (_HEAD + "number: " + "9" * 5000 + "\n", r"data\.yaml: a value cannot be read"),
        (_HEAD + "deep: " + "[" * 20000 + "]" * 20000 + "\n", r"data\.yaml: values are nested too deeply"),
        (_HEAD + "names: [dog]\n", r"data\.yaml:3: names is written twice"),
        (_HEAD + "open: [\n", r"data\.yaml:\d+: not YAML"),
        ("names: [cat, dog, cat]\ntrain: images/train\n", "classes 0 and 2 have the same name 'cat'"),
        ("names: {0: cat, 1: cat}\ntrain: images/train\n", "classes 0 and 1 have the same name 'cat'"),
        ("names: {0: cat, 0: dog}\ntrain: images/train\n", "each number once"),
        ("names: [[cat]]\ntrain: images/train\n", "names must list the classes"),
        ("names: [cat, '']\ntrain: images/train\n", "class 1 has an empty name"),
        ("names: &a [*a]\ntrain: images/train\n", "names must list the classes|nested too deeply"),
    ],
)
def test_a_data_yaml_that_cannot_be_read_is_one_line_with_its_name(tmp_path, write_yolo, text, message):
    write_yolo(tmp_path, {"train": _ONE})
    (tmp_path / "classes.txt").write_text("cat\n")  # not to be taken instead
    _yaml(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        open_data(DataConfig(root=tmp_path))
    assert "data.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("merged", [False, True])
def test_aliases_within_aliases_are_refused_at_once(tmp_path, write_yolo, merged):
    write_yolo(tmp_path, {"train": _ONE})
    lines = ["a0: &a0 {k: v}" if merged else "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 9):
        several = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{several}], k{i}: v}}" if merged else f"a{i}: &a{i} [{several}]")
    _yaml(tmp_path, "\n".join([*lines, "names: *a8", "train: images/train\n"]))
    with pytest.raises(UserError, match="more than 20 aliases"):
        open_data(DataConfig(root=tmp_path))


def test_other_yaml_files_are_left_alone(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": _ONE})
    _yaml(tmp_path, _HEAD)
    for name, text in (("mkdocs.yml", "extra: !!python/name:os.system\n"), ("tabs.yaml", "a:\n\tb: c\n")):
        _yaml(tmp_path, text, name)
    assert open_data(DataConfig(root=tmp_path))["train"].classes == ("cat",)
