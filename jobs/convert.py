"""`ray job submit ... -- python jobs/convert.py ...`: the same as `renee-ray convert ...`."""

import sys

from renee_ray.cli.program import program

if __name__ == "__main__":
    program(["convert", *sys.argv[1:]])
