"""`python -m renee_ray`: the same as `renee-ray`."""

from renee_ray.cli.program import program

program()
