"""`ray job submit ... -- python jobs/evaluate.py ...`: the same as `renee-ray evaluate ...`."""

import sys

from renee_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
