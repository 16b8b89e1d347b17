"""`ray job submit ... -- python jobs/evaluate.py ...`: the same as `renee-ray evaluate ...`."""

import sys

from renee_ray.cli.program import program

if __name__ == "__main__":
    program(["evaluate", *sys.argv[1:]])
