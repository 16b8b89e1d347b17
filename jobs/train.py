"""`ray job submit ... -- python jobs/train.py ...`: the same as `renee-ray train ...`."""

import sys

from renee_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
