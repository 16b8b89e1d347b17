"""`ray job submit ... -- python jobs/train.py ...`: the same as `renee-ray train ...`."""

import sys

from renee_ray.cli.program import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
