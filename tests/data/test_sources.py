import os
from itertools import permutations
from pathlib import Path

import pytest

from reslab.data.folder import _natural
from reslab.data.source import open_images
from reslab.errors import CallError, WorkError
from tests.conftest import COLOURS, draw


def test_digits_are_the_real_ones() -> None:
    images = open_images("digits")
    assert (len(images), images.classes, images.channels, images.image_size, images.upright) == (1797, tuple("0123456789"), 1, 8, True)
    assert images.array is not None
    assert (images.array.min(), images.array.max()) == (0, 255)


def test_folder_is_read_in_natural_order_with_rotation_and_grey(folder: Path) -> None:
    images = open_images(folder)
    assert images.classes == ("blue", "green", "red")
    assert [images.names[i] for i in (0, 1, 2, 10)] == ["blue/0.png", "blue/1.png", "blue/2.png", "blue/10.png"]
    assert (images.image_size, images.channels, images.upright) == (24, 3, False)


def test_declared_split_is_respected(folder: Path) -> None:
    root = folder.parent / "declared"
    for part, first in (("train", 0), ("val", 10), ("test", 20)):
        for c, (name, colour) in enumerate(COLOURS.items()):
            for i in range(first, first + 4):
                draw(root / part / name / f"{i}.png", colour, 100 * c + i)
    images = open_images(root)
    assert images.classes == ("blue", "green", "red")
    assert {part: images.declared.count(part) for part in ("train", "val", "test", "")} == {"train": 12, "val": 12, "test": 12, "": 0}


def test_a_class_called_train_is_a_class(folder: Path) -> None:
    (folder / "red").rename(folder / "train")
    assert open_images(folder).classes == ("blue", "green", "train")


def test_test_images_without_classes_beside_train_are_no_class(folder: Path) -> None:
    root = folder.parent / "competition"
    root.mkdir()
    folder.rename(root / "train")
    draw(root / "test" / "1.png", "red", 1)
    images = open_images(root)
    assert images.classes == ("blue", "green", "red")
    assert images.notes == (("folder test has no class folders and was left out", False),)


def test_numbers_as_folder_names_sort_by_value(folder: Path) -> None:
    for old, new in (("red", "10"), ("green", "9"), ("blue", "1")):
        (folder / old).rename(folder / new)
    images = open_images(folder)
    assert images.classes == ("1", "9", "10")
    assert not images.upright  # of more than ten classes the numbers say nothing of what is to be seen


def test_names_that_differ_only_in_how_a_number_is_written_have_one_order() -> None:
    names = ["1", "01", "001", "a1", "a01"]
    assert {tuple(sorted(shuffled, key=_natural)) for shuffled in permutations(names)} == {("001", "01", "1", "a01", "a1")}


def test_a_pipe_and_a_file_beyond_all_bounds_are_left_out_by_name(folder: Path) -> None:
    os.mkfifo(folder / "red" / "pipe.png")
    with (folder / "red" / "sparse.png").open("wb") as huge:
        huge.truncate(1 << 40)
    images = open_images(folder)
    assert images.problems == (("red/pipe.png", "not a regular file"), ("red/sparse.png", "1,099,511,627,776 bytes: the limit is 256 MiB"))
    assert len(images) == 72


def test_digits_and_letters_as_folder_names_are_characters(folder: Path) -> None:
    for old, new in (("red", "7"), ("green", "A"), ("blue", "ß")):
        (folder / old).rename(folder / new)
    assert open_images(folder).upright


def test_a_class_folder_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "red" / "more").mkdir()
    draw(folder / "red" / "more" / "25.png", COLOURS["red"], 25)
    look = os.scandir

    def guarded(path: str) -> object:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr("os.scandir", guarded)
    images = open_images(folder)
    assert images.problems == (("red/more", "Permission denied"),)
    assert len(images) == 72


@pytest.mark.parametrize("data", ["http://[x", "~nobody-of-that-name/x"])
def test_what_is_neither_path_nor_address_is_one_line(data: str) -> None:
    with pytest.raises(CallError, match=r"DATA must be a path, an address or one of digits.*; received .*:") as caught:
        open_images(data)
    assert "\n" not in str(caught.value)


def test_odd_names_are_kept(folder: Path) -> None:
    names = ["with space", "emoji 🦊", "<script>alert(1)</script>".replace("/", "_"), "new\nline"]
    for i, name in enumerate(names):
        draw(folder / name / f"{name}.png", (10, 20, 30), 900 + i)
    images = open_images(folder)
    assert set(names) < set(images.classes)
    assert not images.problems


def test_bad_files_are_left_out_by_name(folder: Path) -> None:
    (folder / "red" / "empty.png").touch()
    (folder / "red" / "text.jpg").write_text("hello")
    (folder / "red" / "cut.png").write_bytes((folder / "red" / "1.png").read_bytes()[:300])
    (folder / "red" / "notes.txt").write_text("no image, no problem")
    images = open_images(folder)
    assert {p.name: p.reason.split(":")[0].split(" (")[0] for p in images.problems} == {
        "red/cut.png": "truncated", "red/empty.png": "empty file", "red/text.jpg": "not an image of a known format"
    }  # fmt: skip
    assert len(images) == 72


def test_links_stay_inside_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = draw(tmp_path / "outside" / "x.png", (1, 2, 3), 7)
    (folder / "red" / "leaves.png").symlink_to(outside)
    (folder / "red" / "loop.png").symlink_to(folder / "red" / "loop.png")
    (folder / "red" / "up").symlink_to(folder)
    (folder / "loop").symlink_to(folder)
    (folder / "red" / "inside.png").symlink_to(folder / "blue" / "1.png")
    images = open_images(folder)
    assert sorted(p.name for p in images.problems) == ["loop", "red/leaves.png", "red/loop.png", "red/up"]
    assert len(images) == 73
    assert images.classes == ("blue", "green", "red")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "has none: put the images of each class"),
        (lambda d: draw(d / "loose.png", (1, 1, 1), 0), "has none: put the images of each class"),
        (lambda d: (d / "a").mkdir(), "no images were found"),
        (lambda d: [(d / c).mkdir() or (d / c / "x.png").write_text("?") for c in "ab"], "none of the 2 files"),
    ],
    ids=["empty", "loose", "empty class", "no readable image"],
)
def test_folders_without_images_say_what_to_do(make, message: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    make(tmp_path / "d")
    with pytest.raises(WorkError, match=message):
        open_images(tmp_path / "d")


def test_unknown_sources_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="did you mean 'cifar10'"):
        open_images("cifar1O")
    with pytest.raises(CallError, match="there is no"):
        open_images(tmp_path / "nowhere" / "at.all")
    (tmp_path / "a.txt").touch()
    with pytest.raises(CallError, match="is a file"):
        open_images(tmp_path / "a.txt")


def write_csv(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    file = folder / "labels.csv"
    file.write_text(text, encoding=encoding)
    return file


def test_csv_with_bom_numbers_and_split(folder: Path) -> None:
    rows = [f"{name}/{i}.png,{c},{'test' if i > 18 else 'train'}" for c, name in enumerate(COLOURS) for i in range(24)]
    images = open_images(write_csv(folder, "path,label,split\n" + "\n".join(rows), "utf-8-sig"))
    assert images.classes == ("0", "1", "2")
    assert images.declared.count("test") == 15


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("file,class\na,b\n", "utf-8", "must have the columns path and label; .* has file, class"),
        ("", "utf-8", "has no rows"),
        ("path,label\nred/1.png,red\nred/none.png,red\n", "utf-8", "1 of 2 are not, first 'red/none.png'"),
        ("path,label\nred/1.png,\n", "utf-8", "needs a path and a label"),
        ("path,label,split\nred/1.png,red,holdout\n", "utf-8", "train, val or test"),
        ("path,label\nred/é.png,red\n", "latin-1", "must be UTF-8"),
        ("path,label\n", "utf-8", "a row an image; .* its first line only"),
        ('path,label\nred/1.png,"red\n' + "red/2.png,red\n" * 10_000, "utf-8", "each quote in a CSV must be closed; .*field larger"),
        ('path,label\n"red/1.png,red\n' + "red/2.png,red\n" * 99, "utf-8", r"needs a path and a label; .* has 'red/1\.png,red.{0,100}\.\.\.','': fill"),
    ],
)
def test_bad_csvs_say_what_to_do(folder: Path, text: str, encoding: str, message: str) -> None:
    with pytest.raises(WorkError, match=message):
        open_images(write_csv(folder, text, encoding))
