"""`ray job submit ... -- python jobs/export.py ...`: the same as `renee-ray export ...`."""

import sys

from renee_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
