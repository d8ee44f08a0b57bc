"""Python's side of the cache: huggingface_hub fetches every file of tester/poet, or finds it (HF_HUB_OFFLINE=1).

    python hub_cache.py NAME ...

Prints the files' paths as JSON. Exits with 77 if huggingface_hub is not installed, which the calling test reports as
skipped.
"""

import json
import sys

try:
    from huggingface_hub import hf_hub_download
except ImportError as missing:
    print(f"skipped: {missing}", file=sys.stderr)
    sys.exit(77)

print(json.dumps([hf_hub_download("tester/poet", name) for name in sys.argv[1:]]))
