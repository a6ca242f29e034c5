"""What is lost if one of these fails: a true picture of the set, before hours of training on it."""

import base64
import re

from labctl.dataset import Inspection, words
from labctl.picture import page

FOLDERS = {
    "training": {"class_00": (30, 3_000_000), "class_01": (10, 1_000_000)},
    "validation": {"class_00": (5, 500_000)},
}
MANIFEST = {
    "dataset": "pets", "layout": "packed", "version": "0123456789abcdef", "classes": ["cat <b>", "dog"],
    "splits": ["training", "validation"], "counts": {"training": [30, 10], "validation": [5, 0]},
}  # fmt: skip
IMAGE = {"name": '0_1".jpg', "type": "image/jpeg", "base64": base64.b64encode(b"jpeg").decode()}


def inspection(manifest: dict | None = MANIFEST) -> Inspection:
    return Inspection("object-persist-ada", manifest, FOLDERS, 2, {"class_00": [IMAGE]})


def test_the_table_counts_every_class_of_every_split() -> None:
    rows = inspection().rows()
    assert rows[0] == ["class", "training (MB)", "validation (MB)", "all (MB)"]
    assert rows[1] == ["class_00 cat <b>", "30 (3.0)", "5 (0.5)", "35 (3.5)"]
    assert rows[2] == ["class_01 dog", "10 (1.0)", "0 (0.0)", "10 (1.0)"]
    assert rows[3] == ["all", "40 (4.0)", "5 (0.5)", "45 (4.5)"]


def test_the_page_holds_its_images_loads_nothing_and_escapes_names() -> None:
    text = page(inspection())
    assert "data:image/jpeg;base64,anBlZw==" in text
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(""", text)
    assert "cat <b>" not in text
    assert "cat &lt;b&gt;" in text
    assert "0_1&quot;.jpg" in text


def test_a_set_that_is_not_what_its_manifest_says_is_told() -> None:
    assert inspection().mismatch == ""
    wrong = {**MANIFEST, "counts": {"training": [30, 11]}}
    assert inspection(wrong).mismatch == "training/class_01 has 10 files, the manifest says 11"
    assert "the manifest says 11" in page(inspection(wrong))


def test_a_container_that_labctl_never_loaded_is_shown_by_its_folders() -> None:
    plain = inspection(None)
    assert plain.rows()[1][0] == "class_00"
    assert "not loaded by labctl" in page(plain)


def test_progress_says_how_much_how_fast_and_how_long() -> None:
    numbers = {
        "bytes": 5e6,
        "bytes_total": 2e7,
        "files": 3,
        "files_total": 9,
        "bytes_per_second": 1e6,
        "seconds_left": 15,
    }
    assert words(numbers) == "5.0 of 20.0 MB, 3 of 9 files, 1.0 MB/s, 15 s left"
