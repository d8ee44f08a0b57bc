"""Python's side of the interchange test: a folder that our save_to_disk wrote, read by `datasets`.

    python datasets_reads_ours.py FOLDER

Prints {"features": ..., "rows": [...]} of a dataset, or {split: that} of a DatasetDict, as JSON; then maps it once, so
that Python's cache, which goes by the fingerprint, is used too. Exits with 77 if `datasets` is not installed.
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def main():
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as missing:
        print(f"skipped: {missing}", file=sys.stderr)
        sys.exit(77)

    def of(ds):
        assert len(ds.map(lambda row: {"one_more": 1})) == len(ds)
        return {"features": {name: str(feature) for name, feature in ds.features.items()}, "rows": ds.to_list()}

    loaded = load_from_disk(sys.argv[1])
    both = isinstance(loaded, DatasetDict)
    print(json.dumps({name: of(split) for name, split in loaded.items()} if both else of(loaded)))


if __name__ == "__main__":
    main()
