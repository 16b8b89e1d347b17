"""`ray job submit ... -- python jobs/export.py ...`: the same as `renee-ray export ...`."""

import sys

from renee_ray.cli.program import program

if __name__ == "__main__":
    program(["export", *sys.argv[1:]])
