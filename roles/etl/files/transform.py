"""Transform: sort `<i>_*.jpg` of each split into `class_<ii>`, and write a manifest of what goes into the store.

Arguments: the dataset's description (JSON), the staging directory. The last line of output is JSON: images, bytes,
counts (by split, by class), left_out (files that aren't images of the set).
"""

import json
import os
import re
import sys

IMAGE = re.compile(r"^(\d+)_.*\.jpe?g$", re.IGNORECASE)
#: Beside the splits in the container. It holds no time, so that loading the same set again changes nothing.
MANIFEST = "labctl-manifest.json"


def find_splits(unpacked, splits):
    """The folder that holds the splits: the archive's root, or its only folder."""
    candidates = [unpacked, *(entry.path for entry in os.scandir(unpacked) if entry.is_dir())]
    for folder in candidates:
        if any(os.path.isdir(os.path.join(folder, split)) for split in splits):
            return folder
    sys.exit(f"The archive has none of the folders {', '.join(splits)}. Nothing was loaded.")


def sort(source, target, classes):
    """Move one split's images into their class folders. Returns (images by class, bytes, files left out)."""
    counts, size, left_out = [0] * classes, 0, 0
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        match = IMAGE.match(entry.name) if entry.is_file(follow_symlinks=False) else None
        if match is None:
            left_out += 1
            continue
        number = int(match[1])
        if number >= classes:
            sys.exit(f"{entry.name}: class {number} of a set of {classes} (0 to {classes - 1}). Nothing was loaded.")
        folder = os.path.join(target, f"class_{number:02d}")
        os.makedirs(folder, exist_ok=True)
        size += entry.stat().st_size
        os.rename(entry.path, os.path.join(folder, entry.name))
        counts[number] += 1
    return counts, size, left_out


def main():
    """Sort every split; stop if that leaves nothing."""
    with open(sys.argv[1], encoding="utf-8") as file:
        dataset = json.load(file)
    unpacked, target = os.path.join(sys.argv[2], "unpacked"), os.path.join(sys.argv[2], "sorted")
    source = find_splits(unpacked, dataset["splits"])
    result = {"images": 0, "bytes": 0, "counts": {}, "left_out": 0}
    for split in dataset["splits"]:
        folder = os.path.join(source, split)
        if not os.path.isdir(folder):
            continue
        counts, size, left_out = sort(folder, os.path.join(target, split), len(dataset["classes"]))
        result["counts"][split] = counts
        result["images"] += sum(counts)
        result["bytes"] += size
        result["left_out"] += left_out
    if not result["images"]:
        sys.exit("The archive has no file named <class>_<name>.jpg in any of its splits. Nothing was loaded.")
    manifest = {key: dataset[key] for key in ("name", "classes", "splits")} | result
    with open(os.path.join(target, MANIFEST), "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
    os.utime(file.name, (0, 0))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
