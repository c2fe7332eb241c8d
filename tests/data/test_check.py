import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from reslab.data.check import Checkup, Finding, _cheap, _near, check, difference_hash, near_pairs
from reslab.data.images import Images
from reslab.data.source import open_images
from tests.conftest import COLOURS, draw
from tests.data.test_split import listed


def kinds(found: Checkup) -> dict[str, int]:
    return {finding.kind: len(finding.names) for finding in found.findings}


def photos(root: Path, n: int = 8) -> Path:
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(n):
            draw(root / name / f"{i}.png", colour, 100 * c + i, (64, 64))
    return root


def test_healthy_folder_has_no_findings(tmp_path: Path) -> None:
    found = check(open_images(photos(tmp_path / "p")))
    assert found.findings == []
    assert found.is_healthy
    assert found.counts == {name: {"all": 8} for name in ("blue", "green", "red")}
    assert found.sizes == {"width": [64, 64, 64], "height": [64, 64, 64]}


def test_each_fault_is_found_by_name(tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    (root / "empty").mkdir()
    (root / "red" / "cut.png").write_bytes((root / "red" / "1.png").read_bytes()[:900])
    shutil.copy(root / "red" / "2.png", root / "red" / "again.png")
    shutil.copy(root / "blue" / "2.png", root / "green" / "from blue.png")
    draw(root / "red" / "wide.png", COLOURS["red"], 77, (400, 64))
    Image.open(root / "green" / "5.png").resize((128, 128)).save(root / "green" / "larger.png")
    found = check(open_images(root))
    assert kinds(found) == {"unreadable": 1, "empty": 0, "contradiction": 1, "duplicates": 1, "aspect": 1, "near": 1}
    text = " ".join(name for finding in found.findings for name in finding.names)
    for named in (
        "red/cut.png (truncated",
        "red/2.png = red/again.png",
        "blue/2.png = green/from blue.png",
        "red/wide.png",
        "green/5.png = green/larger.png",
    ):
        assert named in text
    assert not found.is_healthy


def test_the_name_of_a_folder_is_no_finding(tmp_path: Path) -> None:
    """One that is called empty is no class without images."""
    root = photos(tmp_path / "p" / "train").parent
    photos(root / "test")
    (root / "empty bottles").mkdir()
    found = check(open_images(root))
    assert [finding.text for finding in found.findings if finding.kind == "stray"] == ["folder empty bottles is none of train, val and test and was left out"]
    assert "empty" not in kinds(found)


def test_leakage_between_declared_parts_is_found_exact_and_near(tmp_path: Path) -> None:
    root = photos(tmp_path / "d" / "train").parent
    photos(tmp_path / "other")
    for name in COLOURS:
        draw(root / "test" / name / "new.png", COLOURS[name], 555, (64, 64))
    shutil.copy(root / "train" / "red" / "2.png", root / "test" / "red" / "leak.png")
    Image.open(root / "train" / "blue" / "3.png").resize((80, 80)).save(root / "test" / "blue" / "near.png")
    found = check(open_images(root))
    assert kinds(found)["leakage"] == 1
    assert kinds(found)["near-leakage"] >= 1
    assert not found.is_healthy


def test_what_is_in_no_part_is_trained_on_and_leaks_nothing(tmp_path: Path) -> None:
    photos(tmp_path / "d")
    shutil.copy(tmp_path / "d" / "red" / "2.png", tmp_path / "d" / "red" / "copy.png")
    rows = [(path, "" if path.name == "copy.png" else "train") for path in sorted((tmp_path / "d").rglob("*.png"))]
    file = tmp_path / "list.csv"
    file.write_text("path,label,split\n" + "".join(f"{path},{path.parent.name},{part}\n" for path, part in rows))
    assert set(kinds(check(open_images(file)))) == {"duplicates"}


def test_imbalance_is_a_note(tmp_path: Path) -> None:
    root = photos(tmp_path / "p", 3)
    for i in range(40):
        draw(root / "red" / f"more{i}.png", COLOURS["red"], 2000 + i, (64, 64))
    found = check(open_images(root))
    assert kinds(found) == {"imbalance": 0}
    assert found.is_healthy


def test_near_pairs_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**63, 300, dtype=np.uint64)
    for i in range(60):
        flips = sum(1 << int(b) for b in rng.choice(64, rng.integers(1, 6), replace=False))
        hashes[200 + i] = hashes[i] ^ np.uint64(flips)
    want = [(i, j) for i in range(300) for j in range(i + 1, 300) if int(hashes[i] ^ hashes[j]).bit_count() <= 3]
    assert near_pairs(hashes) == want
    assert len(want) > 20


def test_very_many_alike_are_reported_without_all_their_pairs() -> None:
    hashes = np.uint64(0x123456789ABCDEF0) ^ (np.uint64(1) << (np.arange(1500, dtype=np.uint64) % np.uint64(64)))
    pairs = near_pairs(hashes)
    assert {i for pair in pairs for i in pair} == set(range(1500))
    assert len(pairs) <= 4 * 10 * 1500


def test_difference_hash_survives_resizing_and_not_other_content() -> None:
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    one, two = difference_hash(np.asarray(picture)), difference_hash(np.asarray(picture.resize((50, 50))))
    other = difference_hash(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert (one ^ two).bit_count() <= 3 < 10 < (one ^ other).bit_count()


def test_command_prints_a_table_or_json_and_its_status_says_healthy(cli: Callable, tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    good = cli("check", root)
    assert (good.returncode, "healthy" in good.stdout, good.stderr) == (0, True, "")
    (root / "red" / "zero.png").touch()
    bad = cli("check", root, "--json")
    assert bad.returncode == 1
    held = json.loads(bad.stdout)
    assert (held["healthy"], held["findings"][0]["kind"], held["images"]) == (False, "unreadable", 24)


def cheap(images: Images) -> dict[str, Finding]:
    return {finding.kind: finding for finding in _cheap(images, [])}


def test_from_when_on_classes_are_unequal_and_images_long() -> None:
    names = [str(i) for i in range(100)]
    for many, found in ((60, False), (61, True)):
        assert ("imbalance" in cheap(listed([0] * many + [1] * 6, names[: many + 6]))) == found, "ten times as many"
    for wide, found in ((30, False), (31, True)):
        images = replace(listed([0] * 6 + [1] * 6, names[:12]), sizes=np.array([(wide, 10)] * 12, np.int32))
        assert ("aspect" in cheap(images)) == found, "three times as wide as high"


def test_contradicting_labels_alone_are_a_problem() -> None:
    names = [str(i) for i in range(12)]
    assert cheap(listed([0] * 6 + [1] * 6, [*names[:6], "0", *names[7:]]))["contradiction"].is_problem


def test_images_that_are_nearly_alike_are_told_apart_by_label_and_part() -> None:
    images = replace(listed([0, 0, 1, 1], list("abcd"), ["train", "train", "train", "test"]), sizes=np.full((4, 2), 64, np.int32))
    one, other = 0x123456789ABCDEF0, 0xEDCBA9876543210F

    def kinds(*hashes: int) -> dict[str, list[str]]:
        return {finding.kind: finding.names for finding in _near(images, np.array(hashes, np.uint64))}

    assert kinds(one, one ^ 1, other, 0) == {"near": ["0 = 1"]}
    assert kinds(one, other, one ^ 1, 0) == {"near-contradiction": ["0 = 2"]}
    assert kinds(one, 0, 0, one ^ 1) == {"near-leakage": ["0 = 3"]}
    assert kinds(0, 0, 0, 0) == {}, "images of one colour"
