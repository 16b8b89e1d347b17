"""`ray job submit ... -- python jobs/predict.py ...`: the same as `renee-ray predict ...`."""

import sys

from renee_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
