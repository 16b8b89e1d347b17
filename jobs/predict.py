"""`ray job submit ... -- python jobs/predict.py ...`: the same as `renee-ray predict ...`."""

import sys

from renee_ray.cli.program import program

if __name__ == "__main__":
    program(["predict", *sys.argv[1:]])
