"""`ray job submit ... -- python jobs/convert.py ...`: the same as `renee-ray convert ...`."""

import sys

from renee_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
